//! A VM at a broker, and host apps that stream.

use std::io::Write;
use std::process::Stdio;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlink_sandbox::builds::Artifacts;
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::{COMMAND_TIMEOUT, Config, Process, Vm};
pub use barlink_vm_tests::wait_until;
pub use barlink_vm_tests::{App, wait_for_end};
use barlink_vm_tests::{Task, kill, read_all};

/// A broker with these arguments, and a VM at its only slot with the driver loaded.
pub fn start(transport: Transport, arguments: &[&str]) -> Result<(Broker, Vm)> {
    let broker = Broker::start_over(Artifacts::shared()?, &[transport], arguments)?;
    let vm = guest(&broker)?;
    Ok((broker, vm))
}

/// A VM at a broker's slots with the driver loaded.
pub fn guest(broker: &Broker) -> Result<Vm> {
    guest_with(&broker.vm()?)
}

/// A VM with these devices and the driver loaded.
pub fn guest_with(config: &Config) -> Result<Vm> {
    let vm = Vm::restore(config)?;
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
    pub app: App,
    bytes: Task<std::io::Result<Vec<u8>>>,
}

pub fn receive(broker: &Broker, channel: &str) -> Result<Receiving> {
    let mut app = broker.app(["recv", "--channel", channel]);
    let mut app = App::start(app.stdout(Stdio::piped()))?;
    let output = app.stdout.take().context("no output")?;
    let bytes = read_all(output, &format!("the receiver of {channel}"));
    Ok(Receiving { app, bytes })
}

impl Receiving {
    /// Its exit code, once it has ended, and what it received.
    pub fn end(mut self) -> Result<(Option<i32>, Vec<u8>)> {
        let bytes = self.bytes.end();
        if bytes.is_err() {
            kill(&mut self.app)?;
        }
        let status = wait_for_end(&mut self.app, "the receiver")?;
        Ok((status.code(), bytes??))
    }

    /// What it received, once it has ended well.
    pub fn bytes(self) -> Result<Vec<u8>> {
        let (code, bytes) = self.end()?;
        ensure!(code == Some(0), "the receiver ended with {code:?}");
        Ok(bytes)
    }
}

/// Bytes that go down to a guest, which sends them back, until it is finished.
pub struct RoundTrip {
    stop: Sender<()>,
    writer: Task<Result<Vec<u8>>>,
    sender: App,
    echo: Process,
    receiver: Receiving,
}

impl RoundTrip {
    /// Has all its ends hold their channels, `down` and `up`.
    pub fn start(broker: &Broker, vm: &Vm) -> Result<Self> {
        let echo = vm.spawn(["barlink-guest", "echo"])?;
        let receiver = receive(broker, "up")?;
        let mut sender = App::start(broker.app(["send"]).stdin(Stdio::piped()))?;
        let mut input = sender.stdin.take().context("no input")?;
        wait_for_holder(broker, "down", "consumer", true)?;
        wait_for_holder(broker, "up", "consumer", true)?;
        // Until it is told to stop, or nobody is left to tell it.
        let (stop, stopped) = mpsc::channel::<()>();
        let writer = Task::start("the input of the round trip", move || {
            let mut written = Vec::new();
            let mut parts = 0;
            while stopped.recv_timeout(Duration::from_millis(5)) == Err(RecvTimeoutError::Timeout) {
                // No two are of one length.
                let part = noise(100_000 + 4 * parts);
                input.write_all(&part)?;
                written.extend(part);
                parts += 1;
            }
            Ok(written)
        });
        Ok(Self {
            stop,
            writer,
            sender,
            echo,
            receiver,
        })
    }

    /// Ends it, and waits until all have come back, each once.
    pub fn finish(mut self) -> Result<()> {
        drop(self.stop);
        // First, since nobody else ends while there is no one to take what is sent.
        let came = self.receiver.bytes();
        if came.is_err() {
            kill(&mut self.sender)?;
        }
        let came = came?;
        let bytes = self.writer.end()??;
        ensure!(came == bytes, "bytes were lost or came twice");
        ensure!(wait_for_end(&mut self.sender, "the sender")?.success());
        self.echo.wait(COMMAND_TIMEOUT)?.require_success()?;
        Ok(())
    }
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
