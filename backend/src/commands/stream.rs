// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands `barlink send`, `barlink recv` and `barlink tail`.

use anyhow::Result;
use barlink::Access;
use barlink::host::Attachment;
use barlink_cli::{notice, stream, tail, tap};

use crate::args::{Recv, Send, Tail, Which};

pub fn send(args: &Send) -> Result<()> {
    stream::send(&args.stream, &args.channel, || {
        let attachment = attach(&args.which, Access::ReadWrite, args.stream.json)?;
        let sender = attachment.sender(&args.channel)?;
        let confirm = move || super::confirm(&attachment, &args.which, Some(&args.channel));
        Ok((sender, confirm))
    })
}

pub fn recv(args: &Recv) -> Result<()> {
    if args.stream.tap || args.stream.latest {
        let attachment = attach(&args.which, Access::ReadOnly, args.stream.json)?;
        let begin = || Ok(attachment.tap(&args.channel)?);
        return tap::receive(&args.stream, &args.channel, begin);
    }
    stream::receive(&args.stream, &args.channel, || {
        let attachment = attach(&args.which, Access::ReadWrite, args.stream.json)?;
        Ok(attachment.receiver(&args.channel)?)
    })
}

pub fn tail(args: &Tail) -> Result<()> {
    let attachment = attach(&args.which, Access::ReadOnly, false)?;
    tail::tail(&args.tail, &args.channel, attachment.tap(&args.channel)?)
}

/// Attaches for a stream, which goes on if the connection to the broker ends. Standard error
/// reports that end, unless it is for JSON.
fn attach(which: &Which, access: Access, json: bool) -> Result<Attachment> {
    let attachment = super::attach(which, access)?;
    if !json {
        let which = which.clone();
        notice::watch_broker(&attachment, move || super::found(&super::look(&which)));
    }
    Ok(attachment)
}
