// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands `barlink-guest send`, `recv` and `echo`.

use std::error::Error;
use std::io;

use anyhow::{Context, Result};
use barlink::guest::Device;
use barlink::{EventError, Kind};
use barlink_cli::stream;
use rustix::io::Errno;

use crate::args::{Echo, Recv, Send};

pub fn send(device: &Device, args: &Send) -> Result<()> {
    stream::send(&args.stream, &args.channel, || {
        Ok(device.sender(&args.channel)?)
    })
    .map_err(explain)
}

pub fn recv(device: &Device, args: &Recv) -> Result<()> {
    stream::receive(&args.stream, &args.channel, || {
        Ok(device.receiver(&args.channel)?)
    })
    .map_err(explain)
}

/// Converts EFAULT into the error of a device that is gone. The kernel copies between the device
/// and a file. If the device's memory is gone, an access by this program raises SIGBUS, and an
/// access by the kernel fails with EFAULT.
fn explain(error: anyhow::Error) -> anyhow::Error {
    let is_fault = |cause: &(dyn Error + 'static)| {
        let cause = cause.downcast_ref::<io::Error>();
        cause.and_then(Errno::from_io_error) == Some(Errno::FAULT)
    };
    match error.chain().any(is_fault) {
        true => EventError::Gone.into(),
        false => error,
    }
}

/// Copies each record from the memory of one channel into that of the other, by way of a private
/// buffer.
pub fn echo(device: &Device, args: &Echo) -> Result<()> {
    let mut receiver = device.receiver(&args.from)?;
    let mut sender = device.sender(&args.to)?;
    let mut bytes = Vec::new();
    loop {
        let record = receiver.recv()?;
        let kind = record.kind();
        // The sender chooses the record's length. One byte more than the other channel carries is
        // enough for an error, so a longer copy is not needed.
        bytes.resize(record.len().min(sender.max_record() + 1), 0);
        record.copy_to(&mut bytes);
        let sent = match kind {
            // Begin and end are never dropped, even by a sender that drops.
            Kind::BEGIN | Kind::END => sender.reserve(0).and_then(|mark| mark.commit(kind)),
            _ => sender.send(kind, &bytes).map(drop),
        };
        if let Err(error) = sent {
            record.keep();
            return Err(error).with_context(|| format!("sending to channel `{}`", args.to));
        }
        record.release()?;
        if kind == Kind::END {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn efault_means_device_is_gone() {
        let failed =
            |errno: Errno| anyhow::Error::new(io::Error::from(errno)).context("cannot read");
        assert!(explain(failed(Errno::FAULT)).is::<EventError>());
        assert!(!explain(failed(Errno::IO)).is::<EventError>());
    }
}
