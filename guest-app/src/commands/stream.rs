// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands `barlink-guest send`, `recv` and `echo`.

use anyhow::Result;
use barlink::guest::Device;
use barlink_cli::{echo, stream, tap};

use super::broker;
use crate::args::{Echo, Recv, Send};

pub fn send(device: &Device, args: &Send) -> Result<()> {
    stream::send(&args.stream, &args.channel, || {
        let confirm = || broker::confirm(device, Some(&args.channel));
        Ok((device.sender(&args.channel)?, confirm))
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

pub fn echo(device: &Device, args: &Echo) -> Result<()> {
    let receiver = device.receiver(&args.from)?;
    let sender = device.sender(&args.to)?;
    echo::echo(receiver, sender, &args.to, args.timeout)
}
