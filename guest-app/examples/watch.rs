// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Several channels with one `poll`, by taps: prints each record until each channel has ended. The
//! program claims nothing, so that it delays no end, and runs in a guest and on the host.
//!
//! ```text
//! cargo run --example watch -- /dev/barlink0 camera settings          # in a guest
//! cargo run --example watch -- /run/barlink/vm1.sock up camera        # on the host
//! ```

use anyhow::Context;
use barlink::host::AttachOptions;
use barlink::{Access, Error, Kind, Side, Tap, guest};
use rustix::event::{PollFd, PollFlags, poll};

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let place = args
        .next()
        .context("usage: watch DEVICE|CONTROL-SOCKET CHANNEL...")?;
    let names: Vec<_> = args.collect();
    // Reading needs no permission to write.
    if place.starts_with("/dev/") {
        let options = guest::OpenOptions::new().access(Access::ReadOnly);
        watch(&options.open(&place)?, &names)
    } else {
        let options = AttachOptions::new().access(Access::ReadOnly);
        watch(&options.connect_path(&place)?, &names)
    }
}

fn watch(side: &impl Side, names: &[String]) -> anyhow::Result<()> {
    let taps = names.iter().map(|name| Ok((Tap::new(side, name)?, name)));
    let mut taps: Vec<_> = taps.collect::<Result<_, Error>>()?;
    println!("watching {} channels", taps.len());
    while !taps.is_empty() {
        let files = taps.iter().map(|(tap, _)| PollFd::new(tap, PollFlags::IN));
        let mut files: Vec<_> = files.collect();
        poll(&mut files, None)?;
        let due: Vec<_> = files
            .iter()
            .map(|file| !file.revents().is_empty())
            .collect();
        // The highest index first, so that those of the others stay valid.
        for index in (0..taps.len()).rev().filter(|index| due[*index]) {
            let (tap, name) = &mut taps[index];
            if !drain(tap, name)? {
                taps.remove(index);
            }
        }
    }
    Ok(())
}

/// Copies records until there is none for now. Returns whether the channel goes on.
fn drain(tap: &mut Tap, name: &str) -> Result<bool, Error> {
    while let Some(record) = tap.try_recv()? {
        let (number, length) = (record.sequence, record.bytes.len());
        if record.kind == Kind::END {
            println!("{name}: end, {} missed", tap.missed());
            return Ok(false);
        }
        println!("{name}: record {number}, {length} bytes");
    }
    Ok(true)
}
