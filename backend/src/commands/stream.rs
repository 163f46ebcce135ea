// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands `barlink send` and `barlink recv`.

use anyhow::Result;
use barlink::Access;
use barlink_cli::stream;

use crate::args::{Recv, Send};

pub fn send(args: &Send) -> Result<()> {
    stream::send(&args.stream, &args.channel, || {
        let attachment = super::attach(&args.which, Access::ReadWrite)?;
        Ok(attachment.sender(&args.channel)?)
    })
}

pub fn recv(args: &Recv) -> Result<()> {
    stream::receive(&args.stream, &args.channel, || {
        let attachment = super::attach(&args.which, Access::ReadWrite)?;
        Ok(attachment.receiver(&args.channel)?)
    })
}
