// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `barlink peek` and `barlink poke`.

use std::io::{Read, Write, stdin, stdout};

use anyhow::{Context, Result, ensure};
use barlink::Access;
use barlink::protocol::wire::layout::Layout;
use indicatif::BinaryBytes;
use pretty_hex::{HexConfig, config_hex};

use crate::args::{Peek, Place, Poke};

pub fn peek(args: &Peek) -> Result<()> {
    let attachment = super::attach(&args.which, Access::ReadOnly)?;
    let offset = resolve(&args.place, attachment.layout(), args.length)?;
    let mut bytes = vec![0; usize::try_from(args.length)?];
    attachment.region().peek(offset, &mut bytes)?;
    let written = if args.raw {
        stdout().write_all(&bytes)
    } else {
        let config = HexConfig {
            title: false,
            display_offset: usize::try_from(args.place.at)?,
            ..HexConfig::default()
        };
        writeln!(stdout(), "{}", config_hex(&bytes, config))
    };
    written
        .and_then(|()| stdout().flush())
        .context("cannot write to standard output")
}

pub fn poke(args: &Poke) -> Result<()> {
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
    let attachment = super::attach(&args.which, Access::ReadWrite)?;
    let offset = resolve(&args.place, attachment.layout(), bytes.len() as u64)?;
    Ok(attachment.region().poke(offset, &bytes)?)
}

/// The offset in the region of so many bytes at a place, which they must not leave.
fn resolve(place: &Place, layout: &Layout, length: u64) -> Result<u64> {
    let (what, start, size) = match place.region {
        true => ("region", 0, layout.region_size),
        false => ("raw window", layout.raw_offset, layout.raw_size),
    };
    let fits = place.at.checked_add(length).is_some_and(|end| end <= size);
    ensure!(
        fits,
        "{length} bytes at {:#x} leave the {what}, which has {} ({size} bytes)",
        place.at,
        BinaryBytes(size)
    );
    Ok(start + place.at)
}
