// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `barlink peek` and `barlink poke`.

use anyhow::Result;
use barlink::Access;
use barlink_cli::place;

use crate::args::{Peek, Poke};

pub fn peek(args: &Peek) -> Result<()> {
    let attachment = super::attach(&args.which, Access::ReadOnly)?;
    let Some(slot) = args.guest else {
        return place::peek(&attachment.region(), attachment.layout(), &args.peek);
    };
    let mut bytes = vec![0; usize::try_from(args.peek.length)?];
    attachment.read_guest(slot, args.peek.place.at, &mut bytes)?;
    place::show(&bytes, &args.peek)
}

pub fn poke(args: &Poke) -> Result<()> {
    let attachment = super::attach(&args.which, Access::ReadWrite)?;
    place::poke(&attachment.region(), attachment.layout(), &args.poke)
}
