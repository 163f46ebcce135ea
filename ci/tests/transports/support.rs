//! A VM at a broker, and host apps that stream.

use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use xtask::broker::{Broker, Transport};
use xtask::builds::Artifacts;
use xtask::vm::{COMMAND_TIMEOUT, Process, Vm};

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

/// Bytes that go down to a guest, which sends them back, for a second at the least.
pub struct RoundTrip {
    bytes: Vec<u8>,
    writer: JoinHandle<Result<()>>,
    sender: Child,
    echo: Process,
    receiver: Receiving,
}

impl RoundTrip {
    /// Has all its ends hold their channels, `down` and `up`.
    pub fn start(broker: &Broker, vm: &Vm) -> Result<Self> {
        let echo = vm.spawn(["barlink-guest", "echo"])?;
        let receiver = receive(broker, "up")?;
        let mut sender = broker.app(["send"]).stdin(Stdio::piped()).spawn()?;
        let mut input = sender.stdin.take().context("no input")?;
        wait_for_holder(broker, "down", "consumer", true)?;
        wait_for_holder(broker, "up", "consumer", true)?;
        let bytes = noise(20_000_000);
        let sent = bytes.clone();
        let writer = thread::spawn(move || {
            for part in sent.chunks(100_000) {
                input.write_all(part)?;
                thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        });
        Ok(Self {
            bytes,
            writer,
            sender,
            echo,
            receiver,
        })
    }

    /// Whether there are bytes left to send.
    pub fn is_on(&self) -> bool {
        !self.writer.is_finished()
    }

    /// Waits until all have come back, each once.
    pub fn finish(mut self) -> Result<()> {
        // First, since nobody else ends while there is no one to take what is sent.
        let came = self.receiver.bytes();
        if came.is_err() {
            self.sender.kill()?;
        }
        ensure!(came? == self.bytes, "bytes were lost or came twice");
        self.writer.join().map_err(|_| anyhow!("nobody writes"))??;
        ensure!(self.sender.wait()?.success());
        self.echo.wait(COMMAND_TIMEOUT)?.require_success()?;
        Ok(())
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
