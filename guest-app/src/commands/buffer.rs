// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command `barlink-guest buffer`.

use std::fs::File;

use anyhow::{Context, Result, ensure};
use barlink::EventError;
use barlink::guest::Device;
use barlink_cli::standard::{input, print, read_all};

use crate::args;

pub fn buffer(device: &Device, args: &args::Buffer) -> Result<()> {
    let buffer = device.buffer(args.size)?;
    // One byte more than fits is enough to detect an input that is too large.
    let limit = buffer.size() + 1;
    let (read, name) = match &args.file {
        None => (read_all(input()?, limit), "standard input".to_owned()),
        Some(path) => {
            let file = File::open(path).with_context(|| format!("cannot open {}", path.display()));
            (read_all(file?, limit), path.display().to_string())
        }
    };
    let bytes = read.with_context(|| format!("cannot read {name}"))?;
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
    print(format!(
        "{} bytes at {:#x}, of which {} are filled; {report}\n",
        buffer.size(),
        buffer.address(),
        bytes.len()
    ))?;
    device.wait_until_gone()?;
    // The device may have lost its region, and the buffer with it.
    device.check()?;
    Err(EventError::Gone.into())
}
