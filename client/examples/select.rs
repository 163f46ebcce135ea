// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Several channels with one `poll`: prints every record until each channel has ended.
//!
//! ```text
//! barlink serve --ivshmem /tmp/vm.sock --channel a=host-host,64K --channel b=host-host,64K &
//! cargo run --example select -- a b &
//! barlink send --channel a README.md
//! barlink send --channel b Cargo.toml
//! ```

use barlink::{Kind, Receiver, host};
use rustix::event::{PollFd, PollFlags, poll};

fn main() -> anyhow::Result<()> {
    let broker = host::connect("default")?;
    let mut channels = Vec::new();
    for name in std::env::args().skip(1) {
        channels.push((broker.receiver(&name)?, name));
    }
    while !channels.is_empty() {
        let files = channels
            .iter()
            .map(|(receiver, _)| PollFd::new(receiver, PollFlags::IN));
        let mut files: Vec<_> = files.collect();
        poll(&mut files, None)?;
        let ready = files.iter().map(|file| !file.revents().is_empty());
        let mut ready = ready.collect::<Vec<_>>().into_iter();
        let mut failed = None;
        channels.retain_mut(|(receiver, name)| {
            if ready.next() != Some(true) {
                return true;
            }
            drain(receiver, name).unwrap_or_else(|error| {
                failed = Some(error);
                false
            })
        });
        if let Some(error) = failed {
            return Err(error.into());
        }
    }
    Ok(())
}

/// Receives until there is no record for now. Returns whether the channel goes on.
fn drain(receiver: &mut Receiver, name: &str) -> Result<bool, barlink::Error> {
    while let Some(record) = receiver.try_recv()? {
        match record.kind() {
            Kind::END => {
                println!("{name}: end");
                return Ok(false);
            }
            _ => println!("{name}: {} bytes", record.len()),
        }
    }
    Ok(true)
}
