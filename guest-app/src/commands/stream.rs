// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `barlink-guest send`, `recv` and `echo`.

use anyhow::{Context, Result};
use barlink_cli::stream;
use barlink_guest::Device;
use barlink_guest::protocol::Wakeup;
use barlink_guest::protocol::cursor::Kind;
use barlink_guest::protocol::stream::mark;

use crate::args::{Echo, Recv, Send};

pub fn send(device: &Device, args: &Send) -> Result<()> {
    stream::send(&args.stream, &args.channel, || {
        Ok(device.sender(&args.channel)?)
    })
}

pub fn recv(device: &Device, args: &Recv) -> Result<()> {
    stream::receive(&args.stream, &args.channel, || {
        Ok(device.receiver(&args.channel)?)
    })
}

/// Copies each record from the memory of one channel into that of the other, by way of a private buffer.
pub fn echo(device: &Device, args: &Echo) -> Result<()> {
    let mut receiver = device.receiver(&args.from)?;
    let mut sender = device.sender(&args.to)?;
    let mut bytes = Vec::new();
    loop {
        if receiver.wait(None)? != Wakeup::Ready {
            continue;
        }
        let Some(record) = receiver.record() else {
            continue;
        };
        let kind = record.header().kind;
        bytes.resize(record.length(), 0);
        record.copy_to(0, &mut bytes);
        // The end is told even in a channel that drops.
        let sent = match kind {
            Kind::END => mark(&mut sender, kind),
            _ => sender.send(kind, &bytes, None).map(drop),
        };
        sent.with_context(|| format!("sending to channel `{}`", args.to))?;
        receiver.release()?;
        if kind == Kind::END {
            return Ok(());
        }
    }
}
