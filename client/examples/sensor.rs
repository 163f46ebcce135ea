// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A sensor whose newest value is read: `set` sends some values, and `get` reads the newest one,
//! also when `set` has ended. No value waits for a reader.
//!
//! ```text
//! barlink serve --ivshmem /tmp/vm.sock --channel sensor=host-taps,4K,overwrite &
//! cargo run --example sensor -- set 21.5 21.7
//! cargo run --example sensor -- get
//! ```

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use barlink::host::{self, AttachOptions};
use barlink::{Access, Clock, Kind, Stamp};

const CHANNEL: &str = "sensor";
const CELSIUS: Kind = Kind::USER;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some("set") => set(args),
        Some("get") => get(),
        _ => anyhow::bail!("usage: sensor set VALUE... | get"),
    }
}

fn set(values: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let mut sensor = host::connect("default")?.sender(CHANNEL)?;
    for value in values {
        let value: f64 = value.parse()?;
        // The time of day, which a reader on any side understands.
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let stamp = Stamp::new(now.as_nanos() as u64, Clock::REALTIME);
        sensor.send_at(CELSIUS, &value.to_le_bytes(), stamp)?;
    }
    Ok(())
}

fn get() -> anyhow::Result<()> {
    let options = AttachOptions::new().access(Access::ReadOnly);
    let mut sensor = options.connect("default")?.tap(CHANNEL)?;
    let Some(record) = sensor.latest()? else {
        println!("no value yet");
        return Ok(());
    };
    let value = f64::from_le_bytes(record.bytes.as_slice().try_into()?);
    let age = match record.clock {
        Clock::REALTIME => (UNIX_EPOCH + Duration::from_nanos(record.time)).elapsed()?,
        clock => anyhow::bail!("a time by the {clock} clock"),
    };
    println!("{value} °C, {} s ago", age.as_secs());
    Ok(())
}
