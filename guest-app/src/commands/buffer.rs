// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command `barlink-guest buffer`.

use std::fs::File;
use std::io::{Read, Write, stdin, stdout};

use anyhow::{Context, Result, ensure};
use barlink::EventError;
use barlink::guest::Device;

use crate::args;

pub fn buffer(device: &Device, args: &args::Buffer) -> Result<()> {
    let buffer = device.buffer(args.size)?;
    let (mut input, name): (Box<dyn Read>, _) = match &args.file {
        None => (Box::new(stdin()), "standard input".to_owned()),
        Some(path) => {
            let file = File::open(path).with_context(|| format!("cannot open {}", path.display()));
            (Box::new(file?), path.display().to_string())
        }
    };
    // One byte more than fits is enough to detect an input that is too large.
    let mut bytes = Vec::new();
    let read = input
        .by_ref()
        .take(buffer.size() + 1)
        .read_to_end(&mut bytes);
    read.with_context(|| format!("cannot read {name}"))?;
    ensure!(
        bytes.len() as u64 <= buffer.size(),
        "{name} does not fit into a buffer of {} bytes: choose a larger --size",
        buffer.size()
    );
    buffer.region().poke(0, &bytes)?;
    let report = match buffer.is_announced() {
        true => "announced to the device",
        false => {
            "not announced to the device: only barlink's own device takes a buffer, over vfio-user with --guest-memory"
        }
    };
    let mut output = stdout();
    writeln!(
        output,
        "{} bytes at {:#x}, of which {} are filled; {report}",
        buffer.size(),
        buffer.address(),
        bytes.len()
    )
    .and_then(|()| output.flush())
    .context("cannot write to standard output")?;
    device.wait_until_gone()?;
    Err(EventError::Gone.into())
}
