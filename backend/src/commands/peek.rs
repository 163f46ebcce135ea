// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands `barlink peek` and `barlink poke`.

use anyhow::Result;
use barlink::Access;
use barlink::control::message::MAX_COPY;
use barlink_cli::place;

use crate::args::{Peek, Poke};

pub fn peek(args: &Peek) -> Result<()> {
    let attachment = super::attach(&args.which, Access::ReadOnly)?;
    let Some(slot) = args.guest else {
        return place::peek(attachment.region().ring(), attachment.layout(), &args.peek);
    };
    // The vector grows with each answer: the length on the command line may exceed the guest's
    // memory, whose size is not known here.
    let length = usize::try_from(args.peek.length)?;
    let mut bytes = Vec::new();
    while bytes.len() < length {
        let start = bytes.len();
        bytes.resize(length.min(start + MAX_COPY), 0);
        let address = args.peek.place.at.saturating_add(start as u64);
        let part = &mut bytes[start..];
        match args.buffer {
            true => attachment.read_buffer(slot, address, part)?,
            false => attachment.read_guest(slot, address, part)?,
        }
    }
    place::show(&bytes, &args.peek, 0)
}

pub fn poke(args: &Poke) -> Result<()> {
    let attachment = super::attach(&args.which, Access::ReadWrite)?;
    place::poke(attachment.region().ring(), attachment.layout(), &args.poke)?;
    super::confirm(&attachment, &args.which, None)
}
