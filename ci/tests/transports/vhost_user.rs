// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The conformance suite over vhost-user, without `restart.rs`: a broker over vhost-user has no
//! successor while a VM is there.
#![expect(
    clippy::duplicate_mod,
    reason = "the same tests over another transport"
)]

use anyhow::{Context, Result, ensure};
use barlink_agent::Status;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::{COMMAND_TIMEOUT, Vm};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::foreign_device::{self, Fault};
use crate::support::*;

const TRANSPORT: Transport = Transport::VhostUser;

#[path = "cache.rs"]
mod cache;
#[path = "channels.rs"]
mod channels;
#[path = "idle.rs"]
mod idle;
#[path = "mixed.rs"]
mod mixed;
#[path = "names.rs"]
mod names;
#[path = "outlived.rs"]
mod outlived;
#[path = "programs.rs"]
mod programs;
#[path = "silence.rs"]
mod silence;
#[path = "snapshots.rs"]
mod snapshots;
#[path = "table.rs"]
mod table;
#[path = "taps.rs"]
mod taps;
#[path = "unplugged.rs"]
mod unplugged;

/// Sends a line from the guest through a channel, and checks that the host receives it.
fn line(broker: &Broker, vm: &Vm, text: &str) -> Result<()> {
    let receiver = receive(broker, "up")?;
    let script = format!("echo {text} | barlink-guest send");
    vm.run(["sh", "-c", &script])?.require_success()?;
    ensure!(receiver.bytes()? == format!("{text}\n").as_bytes());
    Ok(())
}

#[test]
fn driver_declines_foreign_virtio_devices() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let broker = Broker::start_over(Artifacts::shared()?, &[TRANSPORT], &[])?;
    let mut config = broker.vm()?;
    config.paths.push(folder.path().to_owned());
    for fault in Fault::ALL {
        config
            .arguments
            .extend(foreign_device::start(folder.path(), fault)?);
    }
    let vm = Vm::boot(&config)?;
    load(&vm)?;
    let log = vm.run(["dmesg"])?.success()?;
    for fault in Fault::ALL {
        let count = log.matches(fault.message()).count();
        ensure!(count == 1, "{fault:?} is reported {count} times: {log}");
    }
    let bound = vm.run([
        "sh",
        "-c",
        "ls /dev/barlink* /sys/bus/virtio/drivers/barlink",
    ])?;
    let bound = bound.success()?;
    ensure!(bound.matches("/dev/barlink").count() == 1, "{bound}");
    ensure!(bound.matches("virtio").count() == 2, "{bound}");
    // The device that is barlink's is not affected.
    line(&broker, &vm, "whole")
}

#[test]
fn driver_locates_and_reserves_virtio_device() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &["--size", "2M"])?;
    let info = vm.run(["barlink-guest", "info", "--json"])?.success()?;
    let info: Value = serde_json::from_str(&info)?;
    let address = info["pci_address"].as_str().context("no address")?;
    let script =
        format!("cat /sys/bus/pci/devices/{address}/vendor /sys/bus/pci/devices/{address}/device");
    ensure!(vm.run(["sh", "-c", &script])?.success()? == "0x1af4\n0x1046\n");
    // The driver has reserved the region, so that no other driver can use it.
    let memory = vm.run(["cat", "/proc/iomem"])?.success()?;
    let taken = memory.lines().find(|line| line.ends_with(" : barlink"));
    let (range, _) = taken
        .context("nothing is taken")?
        .split_once(" :")
        .context("no range")?;
    let (first, last) = range.trim().split_once('-').context("no range")?;
    let number = |text| u64::from_str_radix(text, 16);
    ensure!(number(last)? - number(first)? + 1 == 2 << 20, "{range}");
    line(&broker, &vm, "here")
}

#[test]
fn driver_rebinds_virtio_device() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    for epoch in [3, 5, 7] {
        line(&broker, &vm, "before")?;
        let script = format!("{UNBIND} && cd / && test ! -e /dev/barlink0 && cat /proc/iomem");
        let memory = vm.run(["sh", "-c", &script])?.success()?;
        ensure!(!memory.contains("barlink"), "{memory}");
        let guest = || -> Result<Value> { Ok(broker.inspect()?["guests"][0].clone()) };
        wait_until("the host learns that the driver is gone", || {
            Ok(guest()?["present"] == false)
        })?;
        let script = "cd /sys/bus/virtio/drivers/barlink && for device in ../../devices/*; do \
            test \"$(cat $device/device)\" = 0x0006 && echo $(basename $device) >bind; done; test -e /dev/barlink0";
        vm.run(["sh", "-c", script])?.require_success()?;
        ensure!(guest()?["epoch"] == epoch, "{}", guest()?);
    }
    line(&broker, &vm, "after")
}

/// Resets the device with the function level reset of PCI, which takes queues and region away.
#[test]
fn reset_virtio_device_returns_after_rebinding() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let receiver = vm.spawn(["barlink-guest", "recv"])?;
    wait_for_holder(&broker, "down", "consumer", true)?;
    let reset = "cd -P /sys/class/misc/barlink0/device && basename $PWD && echo 1 >../reset";
    let name = vm.run(["sh", "-c", reset])?.success()?;
    let ended = receiver.wait(COMMAND_TIMEOUT)?;
    let error = String::from_utf8_lossy(&ended.stderr).into_owned();
    ensure!(error.contains("gone"), "{error}");
    wait_until("the host learns that the driver is gone", || {
        Ok(broker.inspect()?["guests"][0]["present"] == false)
    })?;
    let bind = format!(
        "test ! -e /dev/barlink0 && cd /sys/bus/virtio/drivers/barlink && echo {0} >unbind && echo {0} >bind",
        name.trim_end()
    );
    vm.run(["sh", "-c", &bind])?.require_success()?;
    line(&broker, &vm, "after")?;
    let log = vm.run(["dmesg"])?.success()?;
    ensure!(!log.contains("Call Trace"), "{log}");
    Ok(())
}

#[test]
fn module_stays_while_virtio_device_is_used() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let user = vm.spawn(["barlink-guest", "recv"])?;
    wait_for_holder(&broker, "down", "consumer", true)?;
    let refused = vm.run(["rmmod", "barlink"])?;
    ensure!(refused.status != Status::Code(0), "it is gone");
    user.kill(Signal::KILL)?;
    user.wait(COMMAND_TIMEOUT)?;
    for _ in 0..3 {
        vm.run(["rmmod", "barlink"])?.require_success()?;
        ensure!(vm.run(["test", "-e", "/dev/barlink0"])?.status != Status::Code(0));
        load(&vm)?;
    }
    line(&broker, &vm, "again")
}

/// Shows that the memory stays usable, and that no program hangs for good: rings are lost, and a
/// sleeping program can be killed.
#[test]
fn guest_survives_death_of_vhost_user_broker() -> Result<()> {
    let (mut broker, vm) = start(
        TRANSPORT,
        &["--channel", "up=up,1M", "--channel", "down=down,64K"],
    )?;
    let sleeper = vm.spawn(["barlink-guest", "recv"])?;
    wait_for_holder(&broker, "down", "consumer", true)?;
    broker.kill()?;
    let poke = vm.spawn(["barlink-guest", "poke", "written by one"])?;
    // Each program would ask for the broker before it ends.
    let flood = "for i in $(seq 40); do \
                 echo $i | barlink-guest send & sleep 0.2; kill -KILL $!; wait $!; done; true";
    vm.run(["sh", "-c", flood])?.require_success()?;
    let peek = ["barlink-guest", "peek", "--raw", "--length", "14"];
    ensure!(vm.run(peek)?.success()? == "written by one");
    // No program has the region that it wrote into.
    let poke = poke.wait(COMMAND_TIMEOUT)?;
    ensure!(poke.status == Status::Code(8), "{:?}", poke.status);
    sleeper.kill(Signal::INT)?;
    sleeper.wait(COMMAND_TIMEOUT)?;
    vm.run(["rmmod", "barlink"])?.require_success()
}

/// Shows a limit that `docs/transports.md` warns users of.
#[test]
fn reboot_after_brokers_death_ends_qemu() -> Result<()> {
    let (mut broker, vm) = start(TRANSPORT, &[])?;
    line(&broker, &vm, "before")?;
    broker.kill()?;
    // QEMU ends during the reset, or when the driver looks at the device.
    let rebooted = vm.reset().and_then(|()| load(&vm));
    rebooted.expect_err("QEMU lives on: tell the user so");
    let answer = vm.qmp("query-status", &json!({}));
    ensure!(answer.is_err(), "{}", vm.errors());
    Ok(())
}
