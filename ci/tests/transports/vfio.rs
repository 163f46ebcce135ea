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
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::{COMMAND_TIMEOUT, Config, Iommu, Vm};
use barlink_vm_tests::run;
use rustix::process::Signal;
use serde_json::Value;

use super::{TRANSPORT, restore, tools};
use crate::debugger::debugger_is_refused;
use crate::support::*;

/// The module that knows IOMMUs.
pub const IOMMU_MODULE: &str = "drivers/vfio/vfio_iommu_type1.ko";

/// Loads a module of the kernel's, if the kernel has it.
pub fn load_module(vm: &Vm, name: &str) -> Result<()> {
    let path = match tools()?.module(name) {
        Err(_) if name.contains("virqfd") => return Ok(()),
        path => path?,
    };
    let file = path.file_name().context("no name")?.display().to_string();
    let file = format!("/tmp/{file}");
    vm.put_file(&file, &fs::read(&path)?)?;
    vm.run(["insmod", &file])?.require_success()
}

/// Loads the modules of VFIO.
pub fn load_vfio(vm: &Vm) -> Result<()> {
    let mut names = VFIO_MODULES.into_iter();
    names.try_for_each(|name| load_module(vm, name))
}

/// Gives the device to `vfio-pci`.
pub fn bind(vm: &Vm, address: &str) -> Result<()> {
    let bind = "cd /sys/bus/pci/devices/$0 && echo vfio-pci >driver_override && \
        { test ! -e driver || echo $0 >driver/unbind; } && \
        echo $0 >/sys/bus/pci/drivers_probe && test -e driver";
    vm.run(["sh", "-c", bind, address])?.require_success()
}

/// Starts a broker with these arguments, and restores a VM without the driver, whose device
/// `vfio-pci` has. Returns the device's address as well.
pub fn start_by_vfio(arguments: &[&str]) -> Result<(Broker, Vm, String)> {
    let broker = Broker::start_over(Artifacts::shared()?, &[TRANSPORT], arguments)?;
    let vm = restore(&Config {
        iommu: Some(Iommu::Remapping),
        ..broker.vm()?
    })?;
    load_vfio(&vm)?;
    let address = address(&vm)?;
    bind(&vm, &address)?;
    Ok((broker, vm, address))
}

/// Returns the options that name a device.
pub fn device(name: &str) -> [&str; 2] {
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
    debugger_is_refused(&broker, &vm)?;
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
