// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands `peek` and `poke`: they print and write bytes of a region.

use std::ops::Deref;

use anyhow::{Context, Result, ensure};
use barlink_protocol::AtomicU64;
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{FIRST_FREE, Layout};
use clap::Args;
use indicatif::BinaryBytes;
use pretty_hex::{HexConfig, config_hex};

use crate::size::{parse_offset, parse_size};
use crate::standard::{input, print, read_all};

/// Bytes that `peek` copies and prints at once, in whole lines of a hex dump.
const PART: u64 = 1 << 20;

/// Arguments that select a place in the region.
#[derive(Debug, Args)]
#[group(skip)]
pub struct Place {
    /// Offset in the raw window: bytes, a number with the unit K, M or G (powers of 1024), or 0x
    /// and hexadecimal digits
    #[arg(long, value_name = "OFFSET", default_value = "0", value_parser = parse_offset)]
    pub at: u64,
    /// Count OFFSET from the region's start instead
    #[arg(long)]
    pub region: bool,
}

/// Arguments of `peek`.
#[derive(Debug, Args)]
#[group(skip)]
pub struct Peek {
    /// Number of bytes, or a number with the unit K, M or G (powers of 1024)
    #[arg(long, default_value = "256", value_parser = parse_size)]
    pub length: u64,
    /// Print the bytes themselves instead of a hex dump
    #[arg(long)]
    pub raw: bool,
    /// Place of the first byte.
    #[command(flatten)]
    pub place: Place,
}

/// Arguments of `poke`.
#[derive(Debug, Args)]
#[group(skip)]
pub struct Poke {
    /// Text to write [default: standard input]
    pub text: Option<String>,
    /// Place of the first byte.
    #[command(flatten)]
    pub place: Place,
}

impl Place {
    /// Returns the offset of the place in the region, and the number of bytes from there to the end
    /// of the raw window or of the mapping.
    fn find(&self, layout: &Layout, mapped: u64) -> Result<(u64, u64)> {
        let (what, start, size) = match self.region {
            true => ("region", 0, mapped),
            false => ("raw window", layout.raw_offset, layout.raw_size),
        };
        ensure!(
            size > 0,
            "this region has no raw window: serve one with smaller channels or a larger --size, or count from the \
             region's start with --region"
        );
        let room = size.checked_sub(self.at).with_context(|| {
            format!(
                "{:#x} is not in the {what}, which has {} ({size} bytes): choose a smaller --at",
                self.at,
                BinaryBytes(size)
            )
        })?;
        Ok((start + self.at, room))
    }

    fn fits(&self, length: u64, room: u64) -> Result<()> {
        let what = if self.region { "region" } else { "raw window" };
        ensure!(
            length <= room,
            "{length} bytes at {:#x} do not fit into the {what}, which has {room} bytes from there on: use no more, or a smaller --at",
            self.at
        );
        Ok(())
    }
}

/// Prints bytes of a region.
pub fn peek<M>(region: &Region<M>, layout: &Layout, args: &Peek) -> Result<()>
where
    M: Deref<Target = [AtomicU64]>,
{
    let (offset, room) = args.place.find(layout, region.size())?;
    args.place.fits(args.length, room)?;
    // The memory of this program need not hold as much as the region.
    let mut bytes = vec![0; usize::try_from(args.length.min(PART))?];
    let mut done = 0;
    loop {
        let part = usize::try_from((args.length - done).min(PART))?;
        let part = &mut bytes[..part];
        region.peek(offset + done, part)?;
        show(part, args, done)?;
        done += part.len() as u64;
        if done == args.length {
            return Ok(());
        }
    }
}

/// Prints bytes that are `done` bytes behind the place of the first one, as a hex dump or raw.
pub fn show(bytes: &[u8], args: &Peek, done: u64) -> Result<()> {
    if args.raw {
        return print(bytes);
    }
    let config = HexConfig {
        title: false,
        display_offset: usize::try_from(args.place.at + done)?,
        ..HexConfig::default()
    };
    print(format!("{}\n", config_hex(&bytes, config)))
}

/// Writes bytes into a region.
pub fn poke<M>(region: &Region<M>, layout: &Layout, args: &Poke) -> Result<()>
where
    M: Deref<Target = [AtomicU64]>,
{
    let (offset, room) = args.place.find(layout, region.size())?;
    ensure!(
        offset >= FIRST_FREE,
        "the first {} of a region describe it, and no program could attach to it without them: choose --at {FIRST_FREE} or more",
        BinaryBytes(FIRST_FREE)
    );
    let bytes = match &args.text {
        Some(text) => text.clone().into_bytes(),
        None => {
            // One byte more than fits is enough to detect an input that is too large.
            let bytes = read_all(input()?, room.saturating_add(1));
            bytes.context("cannot read standard input")?
        }
    };
    args.place.fits(bytes.len() as u64, room)?;
    Ok(region.poke(offset, &bytes)?)
}
