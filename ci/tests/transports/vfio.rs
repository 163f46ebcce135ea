// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Guests that have given the device to `vfio-pci`, behind an IOMMU.

use std::fs;
use std::io::Write;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlink_agent::Status;
use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::setup::VFIO_MODULES;
use barlink_sandbox::tools::Tools;
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::{COMMAND_TIMEOUT, Config, Vm};
use barlink_vm_tests::run;
use rustix::process::Signal;
use serde_json::Value;

use super::{TRANSPORT, restore, tools};
use crate::support::*;

/// Loads the modules of VFIO.
fn load_vfio(vm: &Vm, tools: &Tools) -> Result<()> {
    for name in VFIO_MODULES {
        let path = match tools.module(name) {
            Err(_) if name.contains("virqfd") => continue,
            path => path?,
        };
        let file = path.file_name().context("no name")?.display().to_string();
        let file = format!("/tmp/{file}");
        vm.put_file(&file, &fs::read(&path)?)?;
        vm.run(["insmod", &file])?.require_success()?;
    }
    Ok(())
}

/// Gives the device to `vfio-pci`.
fn bind(vm: &Vm, address: &str) -> Result<()> {
    let bind = "cd /sys/bus/pci/devices/$0 && echo vfio-pci >driver_override && \
        echo $0 >/sys/bus/pci/drivers_probe && test -e driver";
    vm.run(["sh", "-c", bind, address])?.require_success()
}

/// Starts a broker with these arguments, and restores a VM without the driver, whose device
/// `vfio-pci` has. Returns the device's address as well.
fn start_by_vfio(arguments: &[&str]) -> Result<(Broker, Vm, String)> {
    let broker = Broker::start_over(Artifacts::shared()?, &[TRANSPORT], arguments)?;
    let vm = restore(&Config {
        iommu: true,
        ..broker.vm()?
    })?;
    load_vfio(&vm, &tools()?)?;
    let address = address(&vm)?;
    bind(&vm, &address)?;
    Ok((broker, vm, address))
}

/// Returns the options that name a device.
fn device(name: &str) -> [&str; 2] {
    ["--device", name]
}

#[test]
fn guest_streams_by_vfio() -> Result<()> {
    let (broker, vm, address) = start_by_vfio(&["--size", "4M"])?;
    let named = format!("vfio:{address}");
    let named = named.as_str();

    uses_only_device(&vm, named)?;
    ensure!(broker.run(["peek", "--raw", "--length", "12"])? == b"of the guest");
    broker.run(["poke", "of the host"])?;
    let words = ["barlink-guest", "peek", "--raw", "--length", "11"];
    let output = vm.run(words.into_iter().chain(device(named)))?;
    ensure!(output.stderr.is_empty(), "{output:?}");
    ensure!(output.success()? == "of the host");
    // So is the one that the broker's name means.
    let by_name = info(&vm, &device("control"))?;
    let by_address = info(&vm, &device(named))?;
    ensure!(by_name["instance"] == by_address["instance"]);
    for (field, value) in [
        ("driver", Value::from(false)),
        ("pci_address", address.as_str().into()),
        ("name", "control".into()),
        ("cache_mode", "uncached-minus".into()),
        // The broker has answered.
        ("broker_fault", Value::Null),
    ] {
        ensure!(by_address[field] == value, "{field} in {by_address}");
    }
    ensure!(by_address["vectors"].as_u64() > Some(2), "{by_address}");
    ensure!(broker.inspect()?["guests"][0]["present"] == false);

    for length in [0, 7, 131_049, 8_000_003] {
        echo(&broker, &vm, &device(named), length)?;
    }
    RoundTrip::start(&broker, &vm)?.finish()?;
    wait_until("each program has ended its epoch", || {
        Ok(broker.inspect()?["guests"][0]["present"] == false)
    })?;
    idle_end_sleeps(&broker, &vm)?;
    killed_program_frees_device(&broker, &vm, named)
}

/// Shows that an idle end sleeps without a look by the clock, so that interrupts wake it.
fn idle_end_sleeps(broker: &Broker, vm: &Vm) -> Result<()> {
    let receiver = vm.spawn(["barlink-guest", "recv"])?;
    let mut sender = App::start(broker.app(["send"]).stdin(Stdio::piped()))?;
    let mut input = sender.stdin.take().context("no input")?;
    wait_for_holder(broker, "down", "consumer", true)?;
    let guest = holder(broker, "down", "consumer")?.context("no consumer")?;
    let status = format!("/proc/{guest}/status");
    let look = || sleeps(&vm.run(["cat", &status])?.success()?);
    let mut slept = false;
    let mut ticks = 0;
    // As in `idle_ends_sleep_until_rung`.
    while !slept && ticks < 10 {
        input.write_all(b"tick")?;
        ticks += 1;
        wait_until("all has arrived", || {
            Ok(broker.inspect()?["channels"][1]["fill"] == 0)
        })?;
        thread::sleep(Duration::from_millis(2500));
        let before = look()?;
        thread::sleep(Duration::from_secs(2));
        slept = before == look()?;
    }
    drop(input);
    ensure!(wait_for_end(&mut sender, "the sender")?.success());
    ensure!(receiver.wait(COMMAND_TIMEOUT)?.success()? == "tick".repeat(ticks));
    ensure!(slept, "the guest program was not rung by the host");
    Ok(())
}

/// Shows that a second program gets an error, and that the device of a killed one is free.
fn killed_program_frees_device(broker: &Broker, vm: &Vm, named: &str) -> Result<()> {
    let up = || -> Result<Value> { Ok(broker.inspect()?["channels"][0].clone()) };
    let before = up()?["records"].as_u64();
    let first = vm.spawn(["barlink-guest", "send"])?;
    wait_for_holder(broker, "up", "producer", true)?;
    let second = vm.run(["barlink-guest", "--device", named, "info"])?;
    refused(
        &second,
        4,
        &format!("{named} is in use by another program, or by this one, and by VFIO"),
    )?;
    // Killed in the middle of a stream. The next program begins an epoch without holders.
    first.write(b"half")?;
    let receiver = receive(broker, "up")?;
    wait_until("the first bytes are released", || {
        let channel = up()?;
        Ok(channel["records"].as_u64() > before && channel["fill"] == 0)
    })?;
    first.kill(Signal::KILL)?;
    first.wait(COMMAND_TIMEOUT)?;
    if TRANSPORT == Transport::VfioUser {
        // The kernel has reset the device, which the broker sees.
        wait_for_holder(broker, "up", "producer", false)?;
    }
    vm.run(["barlink-guest", "poke", "x"])?.require_success()?;
    ensure!(receiver.end()? == (Some(5), b"half".to_vec()));
    let receiver = receive(broker, "up")?;
    vm.run(["sh", "-c", "echo whole | barlink-guest send"])?
        .require_success()?;
    ensure!(receiver.bytes()? == b"whole\n");
    // A tap needs no end.
    let path = broker.folder().join("to-send");
    fs::write(&path, b"first")?;
    let sent = run(broker.app(["send"]).arg(&path), "the sender")?;
    ensure!(sent.status.success(), "{sent:?}");
    let tail = ["barlink-guest", "tail", "down", "--latest", "-n", "1"];
    let line = vm.run(tail)?.success()?;
    ensure!(line.contains(" end "), "{line}");
    ensure!(vm.run(["barlink-guest", "recv"])?.success()? == "first");
    Ok(())
}

#[test]
fn removal_ends_program_by_vfio() -> Result<()> {
    // All channels then have vector 0, which ends watch in any case.
    let (broker, vm, address) = start_by_vfio(&["--vectors", "1"])?;
    let named = format!("vfio:{address}");
    let folder = format!("/sys/bus/pci/devices/{address}");
    let unbind = format!(
        "echo {address} >{folder}/driver/unbind && echo {address} >/sys/bus/pci/drivers_probe"
    );
    let remove = format!("echo 1 >{folder}/remove");
    let mut receiver = App::start(&mut broker.app(["recv", "-o", "/dev/null"]))?;
    // The kernel waits for the program, which releases its end first.
    for (command, order) in [
        // An end that does not sleep, a tap, and an end that sleeps.
        ("send /dev/zero", &unbind),
        ("tail up", &unbind),
        ("recv", &remove),
    ] {
        let words = ["barlink-guest", "--device", &named];
        let program = vm.spawn(words.into_iter().chain(command.split(' ')))?;
        match command {
            "recv" => wait_for_holder(&broker, "down", "consumer", true)?,
            // The program has asked for the broker, for which it begins an epoch.
            "tail up" => wait_until("the tap is there", || {
                Ok(broker.inspect()?["guests"][0]["present"] == true)
            })?,
            _ => wait_until("the stream has begun", || {
                Ok(broker.inspect()?["channels"][0]["records"].as_u64() > Some(0))
            })?,
        }
        vm.run(["sh", "-c", order])?.require_success()?;
        let ended = program.wait(COMMAND_TIMEOUT)?;
        let errors = String::from_utf8_lossy(&ended.stderr);
        ensure!(
            ended.status == Status::Code(3) && errors.contains("the device is gone"),
            "{command}: {:?}: {errors}",
            ended.status
        );
    }
    ensure!(wait_for_end(&mut receiver, "the receiver")?.code() == Some(5));
    vm.run(["sh", "-c", "echo 1 >/sys/bus/pci/rescan"])?
        .require_success()?;
    bind(&vm, &address)?;
    echo(&broker, &vm, &device(&named), 100_000)
}

#[test]
fn errors_of_vfio_name_cure() -> Result<()> {
    let (broker, vm, address) = start_by_vfio(&[])?;
    let named = format!("vfio:{address}");
    let options = device(&named);
    let run = |words: &[&str]| {
        let words = ["barlink-guest"].iter().chain(words);
        vm.run(words.chain(&options).copied())
    };
    for cache in ["write-combining", "write-back"] {
        let text = format!("{named} cannot be mapped {cache}: VFIO maps a device noncached");
        refused(&run(&["--cache", cache, "peek"])?, 1, &text)?;
    }
    let output = run(&["--cache", "auto", "peek", "--raw", "--length", "1"])?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        errors.contains(
            "noncached: reads by write-back not granted, write-combining not granted, noncached "
        ),
        "{errors}"
    );
    output.require_success()?;
    let buffer = "has no driver, and so there is no DMA buffer: load the driver";
    refused(&run(&["buffer"])?, 1, buffer)?;
    let by_sysfs = format!("sysfs:{address}");
    refused(
        &vm.run(["barlink-guest", "--device", &by_sysfs, "info"])?,
        4,
        &format!("driver vfio-pci has PCI device {address}: use vfio:{address}, or take"),
    )?;

    // A user needs the group's file, and nothing else.
    let user = "echo user:x:1000:1000::/:/bin/sh >>/etc/passwd";
    vm.run(["sh", "-c", user])?.require_success()?;
    let as_user = |command: &str| {
        let command = format!("barlink-guest --device {named} {command}");
        vm.run(["su", "user", "-c", &command])
    };
    refused(
        &as_user("poke y")?,
        1,
        "run as root, or give that file to this user (chown USER /dev/vfio/",
    )?;
    let give = "chown 1000 /dev/vfio/$(basename $(readlink /sys/bus/pci/devices/$0/iommu_group))";
    vm.run(["sh", "-c", give, &address])?.require_success()?;
    as_user("poke y")?.require_success()?;
    ensure!(broker.run(["peek", "--raw", "--length", "1"])? == b"y");
    let text = as_user("info")?.success()?;
    ensure!(
        text.contains("driver       none: one program at a time uses the device, by VFIO"),
        "{text}"
    );

    let unbind = "cd /sys/bus/pci/devices/$0 && echo $0 >driver/unbind && echo >driver_override";
    vm.run(["sh", "-c", unbind, &address])?.require_success()?;
    let text =
        format!("PCI device {address} has no driver: give it to vfio-pci (modprobe vfio-pci;");
    refused(&run(&["info"])?, 3, &text)?;
    let other = vm.run(["barlink-guest", "--device", "vfio:0000:00:1f.0", "info"])?;
    refused(&other, 3, "not 1af4:1110: `lspci")
}
