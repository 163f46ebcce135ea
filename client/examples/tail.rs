// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A look at a channel that another program receives, from the newest record on. It claims nothing
//! and writes nothing, so it delays neither end.
//!
//! ```text
//! cargo run --example tail -- up
//! ```

use std::io::Write;

use barlink::host::AttachOptions;
use barlink::{Access, Kind};

fn main() -> anyhow::Result<()> {
    let channel = std::env::args().nth(1);
    let options = AttachOptions::new().access(Access::ReadOnly);
    let broker = options.connect("default")?;
    let mut tap = broker.tap(channel.as_deref().unwrap_or("up"))?;
    let mut output = std::io::stdout();
    let mut newest = tap.latest()?;
    loop {
        let record = match newest.take() {
            Some(record) => record,
            None => tap.recv()?,
        };
        if record.kind == Kind::END {
            writeln!(output, "end, {} records missed", tap.missed())?;
            return Ok(());
        }
        let (number, length) = (record.sequence, record.bytes.len());
        writeln!(output, "record {number}: {length} bytes")?;
        output.flush()?;
    }
}
