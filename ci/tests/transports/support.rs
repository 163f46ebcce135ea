//! A VM at a broker, and host apps that stream.

use std::io::Read;
use std::process::{Child, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use xtask::broker::{Broker, Transport};
use xtask::builds::Artifacts;
use xtask::vm::{COMMAND_TIMEOUT, Vm};

/// A broker with these arguments, and a VM at its only slot with the driver loaded.
pub fn start(transport: Transport, arguments: &[&str]) -> Result<(Broker, Vm)> {
    let broker = Broker::start_over(Artifacts::shared()?, &[transport], arguments)?;
    let vm = boot(&broker)?;
    Ok((broker, vm))
}

pub fn boot(broker: &Broker) -> Result<Vm> {
    let vm = Vm::boot(&broker.vm()?)?;
    load(&vm)?;
    Ok(vm)
}

pub fn load(vm: &Vm) -> Result<()> {
    vm.run(["insmod", "/lib/barlink.ko"])?.require_success()
}

/// A shell's command that takes the first device from the driver, whatever bus it is on.
pub const UNBIND: &str = "cd /sys/class/misc/barlink0/device && name=$(basename $(readlink -f .)) && \
    echo $name >driver/unbind";

/// Bytes in which every place is different.
pub fn noise(length: usize) -> Vec<u8> {
    (0..length.div_ceil(4) as u32)
        .flat_map(|number| {
            number
                .wrapping_mul(2_654_435_761)
                .rotate_left(9)
                .to_le_bytes()
        })
        .take(length)
        .collect()
}

/// A host app that receives. What it receives is taken from it as it comes, so that it never waits for us.
pub struct Receiving {
    pub app: Child,
    bytes: JoinHandle<std::io::Result<Vec<u8>>>,
}

pub fn receive(broker: &Broker, channel: &str) -> Result<Receiving> {
    let mut app = broker
        .app(["recv", "--channel", channel])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut output = app.stdout.take().context("no output")?;
    let bytes = thread::spawn(move || {
        let mut bytes = Vec::new();
        output.read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    Ok(Receiving { app, bytes })
}

impl Receiving {
    /// Its exit code, once it has ended, and what it received.
    pub fn end(mut self) -> Result<(Option<i32>, Vec<u8>)> {
        let bytes = self.bytes.join().map_err(|_| anyhow!("nobody reads"))??;
        Ok((self.app.wait()?.code(), bytes))
    }

    /// What it received, once it has ended well.
    pub fn bytes(self) -> Result<Vec<u8>> {
        let (code, bytes) = self.end()?;
        ensure!(code == Some(0), "the receiver ended with {code:?}");
        Ok(bytes)
    }
}

pub fn wait_until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !done()? {
        ensure!(start.elapsed() < COMMAND_TIMEOUT, "in vain: {what}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Waits until a process of the guest holds an end of a channel, or none does.
pub fn wait_for_holder(broker: &Broker, channel: &str, end: &str, held: bool) -> Result<()> {
    wait_until(&format!("the {end} of {channel}"), || {
        let snapshot = broker.inspect()?;
        let channels = snapshot["channels"].as_array().context("no channels")?;
        let channel = channels.iter().find(|entry| entry["name"] == channel);
        Ok(channel.context("no such channel")?[end].is_u64() == held)
    })
}
