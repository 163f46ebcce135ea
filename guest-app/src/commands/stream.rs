// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands `barlink-guest send`, `recv` and `echo`.

use anyhow::{Context, Result};
use barlink::guest::Device;
use barlink::{Kind, Sent};
use barlink_cli::failure::{records_dropped, timed_out};
use barlink_cli::{stream, tap};

use crate::args::{Echo, Recv, Send};

pub fn send(device: &Device, args: &Send) -> Result<()> {
    stream::send(&args.stream, &args.channel, || {
        Ok(device.sender(&args.channel)?)
    })
}

pub fn recv(device: &Device, args: &Recv) -> Result<()> {
    if args.stream.tap || args.stream.latest {
        let begin = || Ok(device.tap(&args.channel)?);
        return tap::receive(&args.stream, &args.channel, begin);
    }
    stream::receive(&args.stream, &args.channel, || {
        Ok(device.receiver(&args.channel)?)
    })
}

/// Copies each record from the memory of one channel into that of the other, by way of a private
/// buffer.
pub fn echo(device: &Device, args: &Echo) -> Result<()> {
    let mut receiver = device.receiver(&args.from)?;
    let mut sender = device.sender(&args.to)?;
    let mut bytes = Vec::new();
    let mut dropped = 0;
    loop {
        let record = match args.timeout {
            None => receiver.recv()?,
            Some(timeout) => {
                let record = receiver.recv_timeout(timeout)?;
                record.ok_or_else(|| timed_out(timeout))?
            }
        };
        let kind = record.kind();
        // The sender chooses the record's length. One byte more than the other channel carries is
        // enough for an error, so a longer copy is not needed.
        bytes.resize(record.len().min(sender.max_record() + 1), 0);
        record.copy_to(&mut bytes);
        let sent = match kind {
            // A sender that drops waits a moment before it drops the beginning or the end.
            Kind::BEGIN | Kind::END => stream::mark(&mut sender, kind, args.timeout),
            _ => stream::put(&mut sender, kind, &bytes, args.timeout)
                .map(|sent| dropped += u64::from(sent == Sent::Dropped)),
        };
        if let Err(error) = sent {
            record.keep();
            return Err(error).with_context(|| format!("sending to channel `{}`", args.to));
        }
        record.release()?;
        if kind == Kind::END {
            return match dropped {
                0 => Ok(()),
                dropped => Err(records_dropped(dropped)),
            };
        }
    }
}
