// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A sensor in a guest: sends the load of the guest to the host, ten times a second.
//!
//! ```text
//! cargo run --example guest_sensor -- /dev/barlink0 100    # on the host: barlink recv
//! ```

use std::io::Write;
use std::time::Duration;

use barlink::{ChannelOptions, Strategy, guest};

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let device = guest::open(args.next().as_deref().unwrap_or("/dev/barlink0"))?;
    let lines: u32 = args.next().as_deref().unwrap_or("100").parse()?;
    if let Some(choice) = device.choice() {
        eprintln!("cache mode {choice}");
    }
    let options = ChannelOptions::new()
        .strategy(Strategy::SLEEP)
        .drop_when_full(true);
    let mut sender = options.sender(&device, "up")?;
    let mut stream = sender.stream();
    for _ in 0..lines {
        let load = std::fs::read("/proc/loadavg")?;
        stream.write_all(&load)?;
        std::thread::sleep(Duration::from_millis(100));
    }
    eprintln!("{} lines are gone", stream.dropped());
    stream.finish()?;
    Ok(())
}
