// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Programs in a guest that live while the PCI function of their device is reset, while their VM is
//! stopped, or while the connection of their QEMU to the broker is lost. No record comes again, and
//! the error of a sender that ends names the cause. `channels.rs` shows the same for a suspend, and
//! `unplugged.rs` for a device that is unplugged.

use std::fs;
use std::io::Write;
use std::process::Stdio;
use std::sync::mpsc;

use anyhow::{Context, Result, bail, ensure};
use barlink_vm::COMMAND_TIMEOUT;
use barlink_vm::broker::{Broker, Transport};
use barlink_vm_tests::{Task, run};
use rustix::process::{Pid, Signal, kill_process};

use super::TRANSPORT;
use crate::support::*;

/// A shell command that resets the PCI function of the first device. It prints a command that binds
/// the device to the driver anew.
const RESET_FUNCTION: &str = "\
cd -P /sys/class/misc/barlink0/device && name=${PWD##*/} && \
echo \"cd $(readlink -f driver) && echo $name >unbind && echo $name >bind\" && \
if [ ! -e reset ]; then cd ..; fi && \
echo 1 >reset";

#[test]
fn function_reset_repeats_no_record() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let sender = LivingSender::start(&broker, &vm)?;
    let rebind = vm.run(["sh", "-c", RESET_FUNCTION])?.success()?;
    if TRANSPORT == Transport::VhostUser {
        // Region and queues go with the reset. The driver has taken the mappings away before, so
        // that no force is needed.
        sender.ends_with("the device is gone")?;
        broker.run(["reset-channel", "up"])?;
    } else {
        sender.keeps_its_end()?;
        sender.sends_on()?;
        sender.ends_by_force()?;
    }
    vm.run(["sh", "-c", rebind.trim_end()])?.require_success()?;
    sends_anew(&broker, &vm)?;
    let log = vm.run(["dmesg"])?.success()?;
    ensure!(!log.contains("Call Trace"), "{log}");
    Ok(())
}

/// A debugger, a frozen cgroup or swap stops QEMU within any instruction of a sender.
#[test]
fn stopped_vm_repeats_no_record() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let sender = LivingSender::start(&broker, &vm)?;
    let pid = broker.inspect()?["broker"]["slots"][0]["vm"]["pid"].as_i64();
    let pid = pid.and_then(|pid| Pid::from_raw(pid as i32));
    let qemu = pid.context("no VM")?;
    kill_process(qemu, Signal::STOP)?;
    wait_until("QEMU stands still", || stands_still(qemu))?;
    sender.keeps_its_end()?;
    broker.run(["reset-channel", "up", "--force"])?;
    kill_process(qemu, Signal::CONT)?;
    sender.ends_with("the channel was reset")?;
    sends_anew(&broker, &vm)
}

/// Returns whether a VM is connected to the only slot.
fn has_vm(broker: &Broker) -> Result<bool> {
    Ok(!broker.inspect()?["broker"]["slots"][0]["vm"].is_null())
}

/// Receives the rest of a stream of a VM whose connection is lost. The host cannot see whether the
/// sender is there. So a receiver that finds no record ends with exit code 5, and another one goes
/// on.
fn rest(broker: &Broker) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    wait_until("the end of the stream", || {
        let mut app = broker.app(["recv", "--partial"]);
        let output = run(&mut app, "a receiver")?;
        bytes.extend(output.stdout);
        match output.status.code() {
            Some(0) => Ok(true),
            Some(5) => Ok(false),
            other => bail!("{other:?}: {}", String::from_utf8_lossy(&output.stderr)),
        }
    })?;
    Ok(bytes)
}

/// QEMU has the region and the eventfds for good, so its guest sends on.
#[test]
fn lost_connection_repeats_no_record() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let sender = LivingSender::start(&broker, &vm)?;
    broker.disconnect(0)?;
    wait_until("the connection is lost", || Ok(!has_vm(&broker)?))?;
    let text = sender.keeps_its_end()?;
    ensure!(
        text.contains("its device or its connection was lost"),
        "{text}"
    );
    sender.sends_on()?;
    sender.ends_by_force()?;
    let sender = vm.spawn(["sh", "-c", "echo new | barlink-guest send"])?;
    let bytes = rest(&broker)?;
    ensure!(bytes == b"new\n", "{bytes:?}");
    sender.wait(COMMAND_TIMEOUT)?.require_success()?;
    drop(vm);
    wait_until("the slot is free", || {
        Ok(broker.inspect()?["broker"]["slots"][0]["former"].is_null())
    })?;
    sends_anew(&broker, &guest(&broker)?)
}

/// A stream from the guest is under way when the connection is lost. No byte comes twice, and the
/// receiver that does not get all of them says so.
#[test]
fn stream_from_lost_guest_comes_once() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &["--channel=up=up,64K"])?;
    let bytes = noise(1_200_000);
    let sender = vm.spawn(["barlink-guest", "send"])?;
    let first = receive(&broker, "up")?;
    let (before, after) = bytes.split_at(1_000_000);
    sender.write(before)?;
    wait_until("some records are received", || {
        Ok(broker.inspect()?["channels"][0]["records"].as_u64() > Some(3))
    })?;
    broker.disconnect(0)?;
    let (code, mut came) = first.end()?;
    ensure!(code == Some(5), "the receiver ended with {code:?}");
    sender.write(after)?;
    sender.close_stdin()?;
    came.extend(rest(&broker)?);
    ensure!(came == bytes, "{} of {} bytes", came.len(), bytes.len());
    sender.wait(COMMAND_TIMEOUT)?.require_success()
}

/// A stream to the guest is under way when the connection is lost. From then on no doorbell reaches
/// either end, except over ivshmem.
#[test]
fn stream_to_lost_guest_comes_once() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &["--channel=down=down,64K"])?;
    let bytes = noise(1_200_000);
    let receiver = vm.spawn(["barlink-guest", "recv"])?;
    let mut sender = App::start(broker.app(["send"]).stdin(Stdio::piped()))?;
    let mut input = sender.stdin.take().context("no input")?;
    let (before, after) = bytes.split_at(1_000_000);
    let (before, after) = (before.to_vec(), after.to_vec());
    let (lose, lost) = mpsc::channel();
    let writer = Task::start("the input of the stream", move || {
        input.write_all(&before)?;
        // The test has ended if this fails.
        let _ = lost.recv();
        input.write_all(&after)
    });
    wait_until("some records are sent", || {
        Ok(broker.inspect()?["channels"][0]["records"].as_u64() > Some(3))
    })?;
    broker.disconnect(0)?;
    lose.send(())?;
    writer.end()??;
    ensure!(wait_for_end(&mut sender, "the sender")?.success());
    let received = receiver.wait(COMMAND_TIMEOUT)?;
    received.require_success()?;
    ensure!(received.stdout == bytes, "{} bytes", received.stdout.len());
    Ok(())
}

/// Returns whether all threads of a process are stopped.
fn stands_still(process: Pid) -> Result<bool> {
    for thread in fs::read_dir(format!("/proc/{process}/task"))? {
        // A thread may end meanwhile.
        let status = fs::read_to_string(thread?.path().join("status"));
        if status.is_ok_and(|status| !status.contains("State:\tT")) {
            return Ok(false);
        }
    }
    Ok(true)
}
