// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device goes and comes back while its VM runs.

use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use barlink_driver_checks::tier::rounds;
use barlink_sandbox::tools::Accel;
use barlink_vm::Bare;
use barlink_vm::broker::Transport;
use barlink_vm_tests::wait_until;
use serde_json::json;

use crate::stage::{ALL, Device, FIRST, HOST, LIMIT, Setting, Stage, VECTORS, VM};

/// The ports by which ACPI's hot-plug of q35 selects a bus, shows the devices that are to go, and
/// ejects them (QEMU, `docs/specs/acpi_pci_hotplug.rst`).
const GOING: u16 = 0xcc4;
const EJECT: u16 = 0xcc8;
const BUS: u16 = 0xcd0;

/// Tells QEMU to remove the device, and lets the guest eject it.
pub fn eject(machine: &mut Bare) -> Result<()> {
    machine.qmp("device_del", &json!({ "id": "barlink0" }))?;
    wait_until("the guest is told which device goes", || {
        for bus in 0..8 {
            machine.write_port(BUS, bus)?;
            if machine.read_port(GOING)? & 1 != 0 {
                machine.write_port(EJECT, 1)?;
                return Ok(true);
            }
        }
        Ok(false)
    })
}

/// Waits until QEMU has removed the device, and for the time that an operator must wait
/// (`docs/decisions/0005-hot-unplug.md`). Then removes the connection to the broker.
pub fn removed(stage: &Stage, machine: &Bare, chardev: &str) -> Result<()> {
    machine.wait_for_event("DEVICE_DELETED", "barlink0")?;
    thread::sleep(Duration::from_millis(300));
    machine.qmp("chardev-remove", &json!({ "id": chardev }))?;
    stage.wait_until_free()
}

/// Plugs the device in again, with a new connection to the broker.
pub fn plug(stage: &Stage, machine: &Bare, chardev: &str) -> Result<()> {
    let address = json!({ "type": "unix", "data": { "path": stage.broker.socket(0) } });
    let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
    machine.qmp("chardev-add", &json!({ "id": chardev, "backend": backend }))?;
    let mut device = match stage.setting.transport {
        Transport::VhostUser => json!({
            "driver": "vhost-user-test-device-pci", "virtio-id": 6, "num_vqs": 2, "vq_size": 64,
            "config_size": 64,
        }),
        _ => json!({ "driver": "ivshmem-doorbell", "vectors": VECTORS }),
    };
    device["id"] = json!("barlink0");
    device["bus"] = json!("barlink0-port");
    device["chardev"] = json!(chardev);
    machine.qmp("device_add", &device).map(drop)
}

/// Gives a device that was plugged in the addresses that it had before, in the windows of its port.
pub fn place(machine: &mut Bare, device: &Device) -> Result<()> {
    let config = device.pci.config;
    wait_until("the device is there", || {
        Ok(machine.read(config)? & 0xffff == 0x1af4)
    })?;
    for (bar, (address, _)) in (0..).zip(&device.pci.bars) {
        if *address != 0 {
            let register = config + 0x10 + 4 * bar;
            machine.write(register, *address as u32)?;
            if *address >> 32 != 0 {
                machine.write(register + 4, (*address >> 32) as u32)?;
            }
        }
    }
    // Enables memory accesses.
    machine.write(config + 4, 2)
}

/// The name of the connection in round `round`. QEMU's own name for it is that of its arguments.
pub fn chardev(round: u64) -> String {
    match round {
        0 => "barlink0-socket".to_owned(),
        round => format!("late{round}"),
    }
}

/// Checks that rings come both ways, each of them once.
fn works(stage: &Stage, machine: &mut Bare, device: &Device) -> Result<()> {
    device.enable(machine)?;
    stage.interrupts_come(machine, 2)?;
    stage.tap.rings(HOST, 3)?;
    machine.repeat(device.doorbell(), HOST << 16 | 3, 20)?;
    let rings = stage.tap.rings(HOST, 3)?;
    ensure!(rings == 20, "{rings} doorbells");
    Ok(())
}

/// A driver comes and goes with the device.
pub fn device_that_left_in_order_comes_back(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let (mut machine, device) = stage.machine()?;
    for round in 0..rounds(3, 30) {
        stage.set_epoch(2 * round + 1)?;
        works(&stage, &mut machine, &device)?;
        // The driver goes: it disables the interrupts, and ends its epoch.
        device.set_msix(&mut machine, false, false)?;
        stage.set_epoch(2 * round + 2)?;
        eject(&mut machine)?;
        removed(&stage, &machine, &chardev(round))?;
        plug(&stage, &machine, &chardev(round + 1))?;
        place(&mut machine, &device)?;
    }
    works(&stage, &mut machine, &device)?;
    stage.check_quiet(&machine)
}

/// A device goes that no driver has used, so the broker rings its eventfds before it serves the
/// device again. QEMU without KVM does not endure that (`docs/decisions/0005-hot-unplug.md`).
pub fn device_without_driver_comes_back(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let (mut machine, device) = stage.machine()?;
    for round in 0..rounds(3, 30) {
        eject(&mut machine)?;
        removed(&stage, &machine, &chardev(round))?;
        plug(&stage, &machine, &chardev(round + 1))?;
        place(&mut machine, &device)?;
        works(&stage, &mut machine, &device)?;
        device.set_msix(&mut machine, false, false)?;
    }
    stage.check_quiet(&machine)
}

/// A guest hangs while it uses the device, which goes when the machine is reset. Under KVM its
/// vectors stay with the former VM, so the slot is not given away before that has ended.
pub fn device_of_hung_guest_keeps_its_slot(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let (mut machine, device) = stage.machine()?;
    stage.set_epoch(1)?;
    device.enable(&mut machine)?;
    stage.interrupts_come(&mut machine, 2)?;
    // The guest ejects nothing. QEMU removes the device when the machine is reset.
    machine.qmp("device_del", &json!({ "id": "barlink0" }))?;
    machine.qmp("system_reset", &json!({}))?;
    removed(&stage, &machine, &chardev(0))?;
    machine.wait_for_firmware(2)?;
    if setting.accel == Accel::Kvm {
        // The fault of QEMU: rings for the device that is gone interrupt the guest.
        for ring in 1..=3 {
            stage.tap.ring(VM, 1, 1)?;
            ensure!(machine.sleep_until(FIRST + 1, ring, LIMIT)? == ring);
        }
        let error = refused(plug(&stage, &machine, &chardev(1)))?;
        ensure!(error.contains("server sent version 1"), "{error}");
        stage.wait_for_log("went with its interrupts enabled")?;
        machine.qmp("query-status", &json!({}))?;
    }
    // Another VM does not get the slot either.
    let error = refused(setting.machine(&stage.config(0)?))?;
    ensure!(error.contains("server sent version 1"), "{error}");
    stage.wait_for_log("and can still write to the region")?;
    drop(machine);
    // QEMU itself ends a moment after its sandbox.
    wait_until("the slot has no former VM", || {
        Ok(stage.broker.inspect()?["broker"]["slots"][0]["former"].is_null())
    })?;
    let (mut machine, device) = stage.machine()?;
    works(&stage, &mut machine, &device)?;
    let all = machine.taken(FIRST, ALL)?;
    ensure!(all == 2 * u64::from(VECTORS), "{all} interrupts");
    stage.check_quiet(&machine)
}

/// The same without KVM, and the QEMU plugs the device in again: it watches the eventfds of the
/// device that is gone, and ends when the broker rings them
/// (`docs/decisions/0005-hot-unplug.md`). The broker serves the next VM.
pub fn replug_after_hung_guest_ends_qemu(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let (mut machine, device) = stage.machine()?;
    stage.set_epoch(1)?;
    device.enable(&mut machine)?;
    stage.interrupts_come(&mut machine, 2)?;
    machine.qmp("device_del", &json!({ "id": "barlink0" }))?;
    machine.qmp("system_reset", &json!({}))?;
    removed(&stage, &machine, &chardev(0))?;
    // QEMU can end before it has answered.
    let _ = plug(&stage, &machine, &chardev(1));
    ensure!(!machine.end()?.success(), "QEMU lives on: tell the user so");
    drop(machine);
    wait_until("the slot has no former VM", || {
        Ok(stage.broker.inspect()?["broker"]["slots"][0]["former"].is_null())
    })?;
    let (mut machine, device) = stage.machine()?;
    works(&stage, &mut machine, &device)?;
    stage.check_quiet(&machine)
}

/// Returns the text of an error that must have come.
pub fn refused<T>(result: Result<T>) -> Result<String> {
    match result {
        Ok(_) => bail!("the slot is given away"),
        Err(error) => Ok(format!("{error:#}")),
    }
}
