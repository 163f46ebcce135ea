// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A VM with its broker, and host apps that stream.

use std::io::{Read, Write};
use std::process::Stdio;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlink_agent::Status;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::{COMMAND_TIMEOUT, Config, Output, Process, Vm};
pub use barlink_vm_tests::wait_until;
pub use barlink_vm_tests::{App, wait_for_end};
use barlink_vm_tests::{Task, kill, read_all, run};
use serde_json::Value;

/// Starts a broker with these arguments, and restores a VM in its only slot with the driver loaded.
pub fn start(transport: Transport, arguments: &[&str]) -> Result<(Broker, Vm)> {
    let broker = Broker::start_over(Artifacts::shared()?, &[transport], arguments)?;
    let vm = guest(&broker)?;
    Ok((broker, vm))
}

/// Restores a VM in all slots of a broker, and loads the driver.
pub fn guest(broker: &Broker) -> Result<Vm> {
    guest_with(&broker.vm()?)
}

/// Restores a VM with this configuration, and loads the driver.
pub fn guest_with(config: &Config) -> Result<Vm> {
    let vm = Vm::restore(config)?;
    load(&vm)?;
    Ok(vm)
}

pub fn load(vm: &Vm) -> Result<()> {
    vm.run(["insmod", "/lib/barlink.ko"])?.require_success()
}

/// A shell command that unbinds the first device from the driver, on any bus.
pub const UNBIND: &str = "cd /sys/class/misc/barlink0/device && name=$(basename $(readlink -f .)) && \
    echo $name >driver/unbind";

/// Returns bytes in which no two aligned words of 4 bytes are equal.
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

/// Sends these bytes with a host app.
pub fn send(broker: &Broker, channel: &str, bytes: &[u8]) -> Result<()> {
    let path = broker.folder().join("to-send");
    std::fs::write(&path, bytes)?;
    let mut app = broker.app(["send", "--channel", channel]);
    let sent = run(app.arg(&path), "the sender")?;
    ensure!(sent.status.success(), "the sender ended: {sent:?}");
    Ok(())
}

/// A host app that receives. A thread reads its output, so that the app never waits for the test.
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
    /// Waits until the app has ended, and returns its exit code and the bytes that it received.
    pub fn end(mut self) -> Result<(Option<i32>, Vec<u8>)> {
        let bytes = self.bytes.end();
        if bytes.is_err() {
            kill(&mut self.app)?;
        }
        let status = wait_for_end(&mut self.app, "the receiver")?;
        Ok((status.code(), bytes??))
    }

    /// Waits until the app has ended with exit code 0, and returns the bytes that it received.
    pub fn bytes(self) -> Result<Vec<u8>> {
        let (code, bytes) = self.end()?;
        ensure!(code == Some(0), "the receiver ended with {code:?}");
        Ok(bytes)
    }
}

/// A stream that goes down to a guest and comes back until [`RoundTrip::finish`].
pub struct RoundTrip {
    stop: Sender<()>,
    writer: Task<Result<Vec<u8>>>,
    sender: App,
    echo: Process,
    receiver: Receiving,
}

impl RoundTrip {
    /// Starts the stream, and waits until all ends of the channels `down` and `up` are held.
    pub fn start(broker: &Broker, vm: &Vm) -> Result<Self> {
        let echo = vm.spawn(["barlink-guest", "echo"])?;
        let receiver = receive(broker, "up")?;
        let mut sender = App::start(broker.app(["send"]).stdin(Stdio::piped()))?;
        let mut input = sender.stdin.take().context("no input")?;
        for channel in ["down", "up"] {
            wait_for_holder(broker, channel, "producer", true)?;
            wait_for_holder(broker, channel, "consumer", true)?;
        }
        // The writer runs until `stop` is dropped.
        let (stop, stopped) = mpsc::channel::<()>();
        let writer = Task::start("the input of the round trip", move || {
            let mut written = Vec::new();
            let mut parts = 0;
            while stopped.recv_timeout(Duration::from_millis(5)) == Err(RecvTimeoutError::Timeout) {
                // All parts have different lengths.
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

    /// Ends the stream, and checks that all bytes have come back, each once.
    pub fn finish(mut self) -> Result<()> {
        drop(self.stop);
        // The receiver comes first, because the other ends wait for it while it does not take the
        // bytes.
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

/// Returns the process that holds an end of a channel.
pub fn holder(broker: &Broker, channel: &str, end: &str) -> Result<Option<u64>> {
    let snapshot = broker.inspect()?;
    let channels = snapshot["channels"].as_array().context("no channels")?;
    let channel = channels.iter().find(|entry| entry["name"] == channel);
    Ok(channel.context("no such channel")?[end].as_u64())
}

/// Waits until a process holds an end of a channel (`held`), or no process does.
pub fn wait_for_holder(broker: &Broker, channel: &str, end: &str, held: bool) -> Result<()> {
    wait_until(&format!("the {end} of {channel}"), || {
        Ok(holder(broker, channel, end)?.is_some() == held)
    })
}

/// Returns how often a process has gone to sleep, from the text of its `/proc/PID/status`.
pub fn sleeps(status: &str) -> Result<u64> {
    let mut lines = status.lines();
    let count = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    Ok(count.context("no count of switches")?.trim().parse()?)
}

/// A sender in the guest that may outlive its device or its driver's epoch. It has sent `before `,
/// which a host app has received and released.
pub struct LivingSender<'a> {
    broker: &'a Broker,
    sender: Process,
}

impl<'a> LivingSender<'a> {
    pub fn start(broker: &'a Broker, vm: &Vm) -> Result<Self> {
        let sender = vm.spawn(["barlink-guest", "send"])?;
        sender.write(b"before ")?;
        let mut receiver = receive(broker, "up")?;
        wait_until("the first bytes are released", || {
            let channel = &broker.inspect()?["channels"][0];
            Ok(channel["records"] == 1 && channel["fill"] == 0)
        })?;
        kill(&mut receiver.app)?;
        wait_for_holder(broker, "up", "consumer", false)?;
        Ok(Self { broker, sender })
    }

    /// Checks that the host cannot reset the channel without force. Returns the error.
    pub fn keeps_its_end(&self) -> Result<String> {
        let mut app = self.broker.app(["reset-channel", "up"]);
        let refused = run(&mut app, "the reset")?;
        let text = String::from_utf8(refused.stderr)?;
        ensure!(refused.status.code() == Some(4), "{text}");
        Ok(text)
    }

    /// Checks that the sender's next bytes reach the host, and no others.
    pub fn sends_on(&self) -> Result<()> {
        self.sender.write(b"after")?;
        // A receiver that finds no record of a sender whose VM is lost does not wait for it.
        wait_until("the next bytes are sent", || {
            Ok(self.broker.inspect()?["channels"][0]["records"] == 2)
        })?;
        let mut app = self.broker.app(["recv", "--partial"]);
        let mut receiver = App::start(app.stdout(Stdio::piped()))?;
        let mut output = receiver.stdout.take().context("no output")?;
        let mut bytes = [0; 5];
        output.read_exact(&mut bytes)?;
        ensure!(&bytes == b"after", "{bytes:?} came again");
        kill(&mut receiver)?;
        wait_for_holder(self.broker, "up", "consumer", false)
    }

    /// Resets the channel by force, and checks that the sender ends with an error that says so.
    pub fn ends_by_force(self) -> Result<()> {
        self.broker.run(["reset-channel", "up", "--force"])?;
        self.ends_with("the channel was reset")
    }

    /// Checks that the sender ends at its next bytes, with an error that has this text.
    pub fn ends_with(self, cause: &str) -> Result<()> {
        self.sender.write(b"too late")?;
        let ended = self.sender.wait(COMMAND_TIMEOUT)?;
        let text = String::from_utf8_lossy(&ended.stderr);
        ensure!(text.contains(cause), "{:?}: {text}", ended.status);
        Ok(())
    }
}

/// Sends a stream from the guest, and checks that the host receives it and nothing else.
pub fn sends_anew(broker: &Broker, vm: &Vm) -> Result<()> {
    vm.run(["sh", "-c", "echo new | barlink-guest send"])?
        .require_success()?;
    let bytes = receive(broker, "up")?.bytes()?;
    ensure!(bytes == b"new\n", "{bytes:?}");
    Ok(())
}

/// Returns the PCI address of the device.
pub fn address(vm: &Vm) -> Result<String> {
    let find = "cd /sys/bus/pci/devices && dirname $(grep -l 0x1110 */device)";
    Ok(vm.run(["sh", "-c", find])?.success()?.trim_end().to_owned())
}

pub fn info(vm: &Vm, options: &[&str]) -> Result<Value> {
    let words = ["barlink-guest", "info", "--json"];
    let printed = vm.run(words.iter().chain(options).copied())?;
    Ok(serde_json::from_str(&printed.success()?)?)
}

/// Checks that a program ended with this code and one line with this text.
pub fn refused(output: &Output, code: i32, text: &str) -> Result<()> {
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status == Status::Code(code),
        "{:?}: {errors}",
        output.status
    );
    ensure!(
        errors.contains(text) && errors.lines().count() == 1,
        "{errors}, not {text}"
    );
    Ok(())
}

/// Sends bytes down and back, and compares them.
pub fn echo(broker: &Broker, vm: &Vm, options: &[&str], length: usize) -> Result<()> {
    let words = ["barlink-guest", "echo"];
    let echo = vm.spawn(words.iter().chain(options).copied())?;
    let receiver = receive(broker, "up")?;
    let bytes = noise(length);
    let path = broker.folder().join("to-send");
    std::fs::write(&path, &bytes)?;
    let sent = run(broker.app(["send"]).arg(&path), "the sender")?;
    ensure!(sent.status.success(), "{sent:?}");
    ensure!(receiver.bytes()? == bytes, "{length} bytes");
    echo.wait(COMMAND_TIMEOUT)?.require_success()
}

/// Checks that programs of a guest without the driver use the only device, which has this name, and
/// say so in one line.
pub fn uses_only_device(vm: &Vm, name: &str) -> Result<()> {
    let output = vm.run(["barlink-guest", "poke", "of the guest"])?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status == Status::Code(0)
            && errors.starts_with(&format!("barlink-guest: no driver, using {name} ("))
            && errors.lines().count() == 1,
        "{errors}"
    );
    Ok(())
}
