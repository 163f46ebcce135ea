// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands `barlink send`, `barlink recv` and `barlink tail`.

use anyhow::Result;
use barlink::Access;
use barlink_cli::{stream, tail, tap};

use crate::args::{Recv, Send, Tail};

pub fn send(args: &Send) -> Result<()> {
    stream::send(&args.stream, &args.channel, || {
        let attachment = super::attach(&args.which, Access::ReadWrite)?;
        Ok(attachment.sender(&args.channel)?)
    })
}

pub fn recv(args: &Recv) -> Result<()> {
    if args.stream.tap || args.stream.latest {
        let attachment = super::attach(&args.which, Access::ReadOnly)?;
        let tap = attachment.tap(&args.channel)?;
        return tap::receive(&args.stream, &args.channel, tap);
    }
    stream::receive(&args.stream, &args.channel, || {
        let attachment = super::attach(&args.which, Access::ReadWrite)?;
        Ok(attachment.receiver(&args.channel)?)
    })
}

pub fn tail(args: &Tail) -> Result<()> {
    let attachment = super::attach(&args.which, Access::ReadOnly)?;
    tail::tail(&args.tail, &args.channel, attachment.tap(&args.channel)?)
}
