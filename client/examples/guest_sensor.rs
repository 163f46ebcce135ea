// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A sensor in a guest: sends the load of the guest to the host, ten times a second.
//!
//! ```text
//! cargo run --example guest_sensor -- /dev/barlink0    # on the host: barlink recv
//! ```

use std::io::Write;
use std::time::Duration;

use barlink::{ChannelOptions, Strategy, guest};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1);
    let device = guest::open(path.as_deref().unwrap_or("/dev/barlink0"))?;
    if let Some(choice) = device.choice() {
        eprintln!("cache mode {choice}");
    }
    let options = ChannelOptions::new()
        .strategy(Strategy::SLEEP)
        .drop_when_full(true);
    let mut sender = options.sender(&device, "up")?;
    let mut stream = sender.stream();
    for _ in 0..100 {
        let load = std::fs::read("/proc/loadavg")?;
        stream.write_all(&load)?;
        std::thread::sleep(Duration::from_millis(100));
    }
    eprintln!("{} lines are gone", stream.dropped());
    stream.finish()?;
    Ok(())
}
