// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `peek` and `poke`: the bytes at a place.

use std::io::{Read, Write, stdin, stdout};
use std::ops::Deref;

use anyhow::{Context, Result, ensure};
use barlink_protocol::AtomicU64;
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{FIRST_FREE, Layout};
use clap::Args;
use indicatif::BinaryBytes;
use pretty_hex::{HexConfig, config_hex};

use crate::size::{parse_offset, parse_size};

/// A place in the region.
#[derive(Debug, Args)]
#[group(skip)]
pub struct Place {
    /// Offset in the raw window
    #[arg(long, value_name = "OFFSET", default_value = "0", value_parser = parse_offset)]
    pub at: u64,
    /// Count OFFSET from the region's start instead
    #[arg(long)]
    pub region: bool,
}

/// What `peek` is told.
#[derive(Debug, Args)]
#[group(skip)]
pub struct Peek {
    /// How many bytes
    #[arg(long, default_value = "256", value_parser = parse_size)]
    pub length: u64,
    /// Print the bytes as they are, rather than a hex dump
    #[arg(long)]
    pub raw: bool,
    /// Where.
    #[command(flatten)]
    pub place: Place,
}

/// What `poke` is told.
#[derive(Debug, Args)]
#[group(skip)]
pub struct Poke {
    /// The text; standard input if not given
    pub text: Option<String>,
    /// Where.
    #[command(flatten)]
    pub place: Place,
}

impl Place {
    /// Returns the offset of the place in the region, and the bytes that fit there.
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
            "{length} bytes at {:#x} leave the {what}, where {room} bytes are left: take no more, or a smaller --at",
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
    let mut bytes = vec![0; usize::try_from(args.length)?];
    region.peek(offset, &mut bytes)?;
    show(&bytes, args)
}

/// Prints bytes of a place.
pub fn show(bytes: &[u8], args: &Peek) -> Result<()> {
    let written = if args.raw {
        stdout().write_all(bytes)
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

/// Writes bytes into a region.
pub fn poke<M>(region: &Region<M>, layout: &Layout, args: &Poke) -> Result<()>
where
    M: Deref<Target = [AtomicU64]>,
{
    let (offset, room) = args.place.find(layout, region.size())?;
    ensure!(
        offset >= FIRST_FREE,
        "the first {} of a region tell what is in it, and whoever reads them anew would find nothing: choose --at {FIRST_FREE} or more",
        BinaryBytes(FIRST_FREE)
    );
    let bytes = match &args.text {
        Some(text) => text.clone().into_bytes(),
        None => {
            // One byte more than fits is enough to detect an input that is too large.
            let mut bytes = Vec::new();
            let input = stdin().take(room.saturating_add(1)).read_to_end(&mut bytes);
            input.context("cannot read standard input")?;
            bytes
        }
    };
    args.place.fits(bytes.len() as u64, room)?;
    Ok(region.poke(offset, &bytes)?)
}
