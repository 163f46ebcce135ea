// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `barlink-guest peek` and `barlink-guest poke`.

use std::io::{Read, Write, stdin, stdout};

use anyhow::{Context, Result, ensure};
use barlink_guest::Device;
use barlink_guest::protocol::wire::layout::Layout;
use pretty_hex::{HexConfig, config_hex};

use crate::args::{Peek, Place, Poke};

pub fn peek(device: &Device, args: &Peek) -> Result<()> {
    let offset = resolve(&args.place, device.layout(), args.length)?;
    let mut bytes = vec![0; usize::try_from(args.length)?];
    device.region().peek(offset, &mut bytes)?;
    let mut out = stdout();
    let written = if args.raw {
        out.write_all(&bytes)
    } else {
        let display_offset = usize::try_from(args.place.at)?;
        writeln!(
            out,
            "{}",
            config_hex(
                &bytes,
                HexConfig {
                    title: false,
                    display_offset,
                    ..HexConfig::default()
                }
            )
        )
    };
    written
        .and_then(|()| out.flush())
        .context("cannot write to standard output")
}

pub fn poke(device: &Device, args: &Poke) -> Result<()> {
    let bytes = match &args.text {
        Some(text) => text.clone().into_bytes(),
        None => {
            let mut bytes = Vec::new();
            stdin()
                .read_to_end(&mut bytes)
                .context("cannot read standard input")?;
            bytes
        }
    };
    let offset = resolve(&args.place, device.layout(), bytes.len() as u64)?;
    Ok(device.region().poke(offset, &bytes)?)
}

/// The offset in the region of so many bytes at a place, which they must not leave.
fn resolve(place: &Place, layout: &Layout, length: u64) -> Result<u64> {
    let (what, start, size) = match place.region {
        true => ("region", 0, layout.mappable_size()),
        false => ("raw window", layout.raw_offset, layout.raw_size),
    };
    let fits = place.at.checked_add(length).is_some_and(|end| end <= size);
    ensure!(
        fits,
        "{length} bytes at {:#x} leave the {what}, which has {size} bytes",
        place.at
    );
    Ok(start + place.at)
}
