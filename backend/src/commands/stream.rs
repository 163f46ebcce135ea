// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands `barlink send`, `barlink recv` and `barlink tail`.

use anyhow::Result;
use barlink::Access;
use barlink::host::Attachment;
use barlink_cli::{notice, stream, tail, tap};

use crate::args::{Recv, Send, Tail, Which};

pub fn send(args: &Send) -> Result<()> {
    stream::send(&args.stream, &args.channel, || {
        let attachment = super::attach(&args.which, Access::ReadWrite)?;
        let sender = attachment.sender(&args.channel)?;
        watch(&attachment, &args.which);
        let confirm = move || super::confirm(&attachment, &args.which, Some(&args.channel));
        Ok((sender, confirm))
    })
}

pub fn recv(args: &Recv) -> Result<()> {
    if args.stream.tap || args.stream.latest {
        let attachment = super::attach(&args.which, Access::ReadOnly)?;
        watch(&attachment, &args.which);
        let begin = || Ok(attachment.tap(&args.channel)?);
        return tap::receive(&args.stream, &args.channel, begin);
    }
    stream::receive(&args.stream, &args.channel, || {
        let attachment = super::attach(&args.which, Access::ReadWrite)?;
        let receiver = attachment.receiver(&args.channel)?;
        watch(&attachment, &args.which);
        Ok(receiver)
    })
}

pub fn tail(args: &Tail) -> Result<()> {
    let attachment = super::attach(&args.which, Access::ReadOnly)?;
    let tap = attachment.tap(&args.channel)?;
    watch(&attachment, &args.which);
    tail::tail(&args.tail, &args.channel, tap)
}

/// Reports the end of the connection to the broker on standard error. The stream goes on. So the
/// watch begins once the end is claimed: a claim that fails closes the connection, too.
fn watch(attachment: &Attachment, which: &Which) {
    let which = which.clone();
    notice::watch_broker(attachment, move || super::found(&super::look(&which)));
}
