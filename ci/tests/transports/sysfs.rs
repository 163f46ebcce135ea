// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Guests without the driver: programs use the device by its files in sysfs.

use std::fs;
use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlink_agent::Status;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::broker::Broker;
use barlink_vm::{COMMAND_TIMEOUT, Vm};
use barlink_vm_tests::{kill, run};
use rustix::process::Signal;
use serde_json::Value;

use super::{HAS_DRIVER, TRANSPORT, restore};
use crate::debugger::debugger_reads_and_writes;
use crate::support::*;

/// Starts a broker with these arguments, and restores a VM without the driver.
fn start_without_driver(arguments: &[&str]) -> Result<(Broker, Vm)> {
    let broker = Broker::start_over(Artifacts::shared()?, &[TRANSPORT], arguments)?;
    let vm = restore(&broker.vm()?)?;
    Ok((broker, vm))
}

#[test]
fn guest_without_driver_streams_both_ways() -> Result<()> {
    let (broker, vm) = start_without_driver(&["--size", "4M"])?;
    let address = address(&vm)?;
    let named = format!("sysfs:{address}");

    uses_only_device(&vm, &named)?;
    let output = vm.run(["barlink-guest", "info", "--json"])?;
    ensure!(output.stderr.is_empty(), "{output:?}");
    ensure!(broker.run(["peek", "--raw", "--length", "12"])? == b"of the guest");
    broker.run(["poke", "of the host"])?;
    let output = vm.run([
        "barlink-guest",
        "--device",
        &named,
        "peek",
        "--raw",
        "--length",
        "11",
    ])?;
    ensure!(output.stderr.is_empty(), "{output:?}");
    ensure!(output.success()? == "of the host");
    // So is the one that the broker's name means.
    let by_name = info(&vm, &["--device", "control"])?;
    let by_address = info(&vm, &["--device", &named])?;
    ensure!(by_name["instance"] == by_address["instance"]);
    for (field, value) in [
        ("driver", Value::from(false)),
        ("vectors", 0.into()),
        ("pci_address", address.clone().into()),
        ("name", "control".into()),
    ] {
        ensure!(by_address[field] == value, "{field} in {by_address}");
    }
    ensure!(broker.inspect()?["guests"][0]["present"] == false);

    for length in [0, 7, 131_049, 8_000_003] {
        echo(&broker, &vm, &[], length)?;
    }
    RoundTrip::start(&broker, &vm)?.finish()?;
    wait_until("each program has ended its epoch", || {
        Ok(broker.inspect()?["guests"][0]["present"] == false)
    })?;
    debugger_reads_and_writes(&broker, &vm)?;
    modes(&broker, &vm)?;
    let buffer = vm.run(["barlink-guest", "--device", &named, "buffer"])?;
    refused(
        &buffer,
        1,
        "has no driver, and so there is no DMA buffer: load the driver",
    )?;

    match HAS_DRIVER {
        true => driver_takes_device(&broker, &vm, &address),
        false => Ok(()),
    }
}

/// Loads the driver, which takes the device from the programs.
fn driver_takes_device(broker: &Broker, vm: &Vm, address: &str) -> Result<()> {
    let named = format!("sysfs:{address}");
    let receiver = vm.spawn(["barlink-guest", "--device", &named, "recv"])?;
    wait_for_holder(broker, "down", "consumer", true)?;
    load(vm)?;
    refused(&receiver.wait(COMMAND_TIMEOUT)?, 3, "the device is gone")?;
    wait_for_holder(broker, "down", "consumer", false)?;
    let taken = vm.run(["barlink-guest", "--device", &named, "info"])?;
    refused(
        &taken,
        4,
        &format!("driver barlink has PCI device {address}: use its node"),
    )?;
    echo(broker, vm, &[], 100_000)?;
    ensure!(info(vm, &[])?["driver"] == true);
    vm.run(["rmmod", "barlink"])?.require_success()?;
    echo(broker, vm, &[], 100_000)
}

/// Shows that each cache mode is granted that the kernel has for a device without a driver, and
/// that all programs have one mode at a time.
fn modes(broker: &Broker, vm: &Vm) -> Result<()> {
    for (cache, name, other) in [
        ("noncached", "uncached-minus", "write-combining"),
        ("write-combining", "write-combining", "noncached"),
    ] {
        let options = ["--cache", cache];
        echo(broker, vm, &options, 1_000_003)?;
        let receiver = vm.spawn(["barlink-guest", "--cache", cache, "recv"])?;
        wait_for_holder(broker, "down", "consumer", true)?;
        let seen = &broker.inspect()?["guests"][0]["cache"];
        ensure!(seen["asked"] == name && seen["granted"] == name, "{seen}");
        let device = ["--device", "control"];
        let seen = info(vm, &device)?["cache"].clone();
        ensure!(seen["asked"] == name && seen["granted"] == name, "{seen}");
        let words = ["barlink-guest", "--cache", other, "poke", "x"];
        let output = vm.run(words.iter().chain(&device).copied())?;
        refused(
            &output,
            4,
            &format!("another process has it mapped {cache},"),
        )?;
        receiver.kill(Signal::TERM)?;
        receiver.wait(COMMAND_TIMEOUT)?;
    }
    let device = ["--device", "control"];
    let words = ["barlink-guest", "--cache", "write-back", "peek"];
    let output = vm.run(words.iter().chain(&device).copied())?;
    refused(
        &output,
        1,
        "cannot be mapped write-back: without the driver",
    )?;
    let output = vm.run([
        "barlink-guest",
        "--cache",
        "auto",
        "peek",
        "--device",
        "control",
    ])?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        errors.contains("reads by write-back not granted, write-combining ")
            && errors.contains("MiB/s, noncached "),
        "{errors}"
    );
    output.require_success()
}

#[test]
fn killed_ends_are_found_without_driver() -> Result<()> {
    let (broker, vm) =
        start_without_driver(&["--channel", "up=up,64K", "--channel", "down=down,64K"])?;
    let send = "barlink-guest send 2>&1";
    let first = vm.spawn(["barlink-guest", "send"])?;
    wait_for_holder(&broker, "up", "producer", true)?;
    let second = vm.run(["sh", "-c", send])?;
    ensure!(second.status == Status::Code(4), "{second:?}");
    let text = String::from_utf8_lossy(&second.stdout).into_owned();
    ensure!(
        text.contains("channel `up` already has a producer"),
        "{text}"
    );

    // Killed in the middle of a stream. The next program that writes notices.
    first.write(b"half")?;
    let receiver = receive(&broker, "up")?;
    wait_until("the first bytes are released", || {
        let channel = &broker.inspect()?["channels"][0];
        Ok(channel["records"] == 1 && channel["fill"] == 0)
    })?;
    first.kill(Signal::KILL)?;
    first.wait(COMMAND_TIMEOUT)?;
    ensure!(broker.inspect()?["channels"][0]["producer"].is_u64());
    vm.run(["barlink-guest", "poke", "x"])?.require_success()?;
    ensure!(receiver.end()? == (Some(5), b"half".to_vec()));
    let receiver = receive(&broker, "up")?;
    vm.run(["sh", "-c", "echo whole | barlink-guest send"])?
        .require_success()?;
    ensure!(receiver.bytes()? == b"whole\n");

    // A program that waits finds the end of the other one within seconds.
    let waiting = vm.spawn(["barlink-guest", "recv"])?;
    wait_for_holder(&broker, "down", "consumer", true)?;
    let first = vm.spawn(["barlink-guest", "send"])?;
    wait_for_holder(&broker, "up", "producer", true)?;
    first.kill(Signal::KILL)?;
    wait_for_holder(&broker, "up", "producer", false)?;
    ensure!(broker.inspect()?["channels"][1]["consumer"].is_u64());
    // The host's producer is killed in the middle of a stream.
    let mut producer = App::start(broker.app(["send"]).stdin(Stdio::piped()))?;
    let mut input = producer.stdin.take().context("no input")?;
    input.write_all(b"half")?;
    waiting.wait_for("half", COMMAND_TIMEOUT)?;
    kill(&mut producer)?;
    let ended = waiting.wait(COMMAND_TIMEOUT)?;
    ensure!(ended.status == Status::Code(5), "{ended:?}");
    wait_for_holder(&broker, "down", "consumer", false)?;
    taps(&broker, &vm)?;
    reader(&vm)
}

/// Shows the records of a channel by a tap.
fn taps(broker: &Broker, vm: &Vm) -> Result<()> {
    let path = broker.folder().join("to-send");
    fs::write(&path, b"first")?;
    let sent = run(broker.app(["send"]).arg(&path), "the sender")?;
    ensure!(sent.status.success(), "{sent:?}");
    let device = ["--device", "control"];
    let words = ["barlink-guest", "tail", "down", "--latest", "-n", "4"];
    let tail = vm.spawn(words.iter().chain(&device).copied())?;
    let line = tail.next_line(COMMAND_TIMEOUT)?.context("no line")?;
    ensure!(line.contains(" end "), "{line}");
    fs::write(&path, b"second")?;
    let sent = run(broker.app(["send"]).arg(&path), "the sender")?;
    ensure!(sent.status.success(), "{sent:?}");
    let rest = tail.wait(COMMAND_TIMEOUT)?.success()?;
    ensure!(rest.contains(" 6 \"second\"\n"), "{rest}");
    for text in ["first", "second"] {
        ensure!(vm.run(["barlink-guest", "recv"])?.success()? == text);
    }
    Ok(())
}

/// Shows the use of the device by a user to whom a udev rule has given its files.
fn reader(vm: &Vm) -> Result<()> {
    let address = address(vm)?;
    let device = format!("sysfs:{address}");
    let as_user = |command: &str| {
        let command = format!("barlink-guest --device {device} {command}");
        vm.run(["su", "user", "-c", &command])
    };
    let user = "echo user:x:1000:1000::/:/bin/sh >>/etc/passwd";
    vm.run(["sh", "-c", user])?.require_success()?;
    refused(
        &as_user("info")?,
        1,
        "/resource0: run as root, or permit it by a udev rule (docs/install.md",
    )?;
    let permit = format!(
        "cd /sys/bus/pci/devices/{address} && chgrp 1000 resource0 resource2 && chmod \"$0\" resource0 resource2"
    );
    let permit = |mode: &str| vm.run(["sh", "-c", &permit, mode])?.require_success();
    permit("640")?;
    ensure!(as_user("peek --raw --length 1")?.success()? == "x");
    refused(
        &as_user("poke y")?,
        1,
        "/resource0 for writing: run as root",
    )?;
    permit("660")?;
    as_user("poke y")?.require_success()?;
    ensure!(as_user("peek --raw --length 1")?.success()? == "y");
    // Root alone can know the mode.
    ensure!(
        as_user("info")?
            .success()?
            .contains("asked uncached-minus, granted unknown")
    );
    Ok(())
}

/// Time within which a program notices that its device is gone.
const NOTICED: Duration = Duration::from_secs(20);

#[test]
fn unplugged_device_ends_programs_without_driver() -> Result<()> {
    let (broker, vm) = start_without_driver(&[])?;
    let apps = [
        vm.spawn(["barlink-guest", "--device", "control", "recv"])?,
        vm.spawn(["barlink-guest", "--device", "control", "send", "/dev/zero"])?,
        vm.spawn(["barlink-guest", "--device", "control", "tail", "up"])?,
    ];
    let mut receiver = App::start(&mut broker.app(["recv", "-o", "/dev/null"]))?;
    wait_for_holder(&broker, "down", "consumer", true)?;
    wait_for_holder(&broker, "up", "producer", true)?;
    // A tap holds no end of its channel, but it shows the records that come.
    let line = apps[2].next_line(COMMAND_TIMEOUT)?;
    ensure!(line.is_some(), "the tap has ended");
    let address = address(&vm)?;
    let remove = format!("echo 1 >/sys/bus/pci/devices/{address}/remove");
    vm.run(["sh", "-c", &remove])?.require_success()?;
    for app in apps {
        let ended = app.wait(NOTICED)?;
        let errors = String::from_utf8_lossy(&ended.stderr);
        ensure!(
            ended.status == Status::Code(3),
            "{:?}: {errors}",
            ended.status
        );
        ensure!(errors.contains("the device is gone"), "{errors}");
    }
    // The device that comes back has no locks, and its memory is switched off.
    vm.run(["sh", "-c", "echo 1 >/sys/bus/pci/rescan"])?
        .require_success()?;
    vm.run(["barlink-guest", "poke", "back"])?
        .require_success()?;
    ensure!(wait_for_end(&mut receiver, "the receiver")?.code() == Some(5));
    ensure!(broker.run(["peek", "--raw", "--length", "4"])? == b"back");
    echo(&broker, &vm, &[], 100_000)
}
