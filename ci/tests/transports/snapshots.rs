// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A VM that is saved: `savevm` and `loadvm`, and a migration to a file, as `virsh managedsave`
//! makes it.

use std::io::Write;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use barlink_agent::Status;
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::{COMMAND_TIMEOUT, Vm};
use serde_json::{Value, json};

use super::TRANSPORT;
use crate::support::*;

/// Plugs a disk image into a VM, to which `savevm` can write.
fn add_disk(broker: &Broker, vm: &Vm) -> Result<()> {
    let path = broker.folder().join("disk.qcow2");
    let file = json!({ "driver": "file", "node-name": "file0", "filename": path });
    let create = |options: Value| {
        let id = format!("create-{}", options["driver"].as_str().unwrap_or_default());
        vm.qmp(
            "blockdev-create",
            &json!({ "job-id": id, "options": options }),
        )?;
        wait_until("the image is created", || {
            let jobs = vm.qmp("query-jobs", &json!({}))?;
            ensure!(jobs[0]["error"].is_null(), "{jobs}");
            Ok(jobs[0]["status"] == "concluded")
        })?;
        vm.qmp("job-dismiss", &json!({ "id": id }))
    };
    create(json!({ "driver": "file", "filename": path, "size": 0 }))?;
    vm.qmp("blockdev-add", &file)?;
    create(json!({ "driver": "qcow2", "file": "file0", "size": 4 << 30_u64 }))?;
    let disk = json!({ "driver": "qcow2", "node-name": "disk0", "file": "file0" });
    vm.qmp("blockdev-add", &disk)?;
    Ok(())
}

/// Runs a command of QEMU's monitor, and returns its output, which is empty on success.
fn monitor(vm: &Vm, command: &str) -> Result<String> {
    let arguments = json!({ "command-line": command });
    let printed = vm.qmp("human-monitor-command", &arguments)?;
    Ok(printed.as_str().unwrap_or_default().to_owned())
}

/// Returns the error with which QEMU refuses to save a VM, over this transport.
fn refusal() -> Option<&'static str> {
    match TRANSPORT {
        Transport::Ivshmem => Some("Migration is disabled when using feature 'peer mode'"),
        Transport::VhostUser => Some("State blocked by non-migratable device"),
        // QEMU 11.1 saves such a VM.
        Transport::VfioUser => None,
    }
}

/// Shows the effect of `savevm`, `loadvm` and `virsh managedsave`, which `docs/transports.md` and
/// `docs/operations.md` describe. QEMU refuses to save a VM, which goes on. Over vfio-user it saves
/// the VM without its device.
#[test]
fn saving_vm_fails_or_loses_device() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    add_disk(&broker, &vm)?;
    let Some(reason) = refusal() else {
        return restored_vm_has_no_device(&broker, &vm);
    };
    let trip = RoundTrip::start(&broker, &vm)?;
    let refused = monitor(&vm, "savevm one")?;
    ensure!(refused.contains(reason), "no `{reason}` in {refused}");
    let file = format!("file:{}", broker.folder().join("saved").display());
    let refused = vm.qmp("migrate", &json!({ "uri": file }));
    let error = format!("{:#}", refused.err().context("QEMU saves the VM")?);
    ensure!(error.contains(reason), "no `{reason}` in {error}");
    ensure!(vm.qmp("query-status", &json!({}))?["running"] == true);
    trip.finish()
}

/// Takes a VM over vfio-user back to a snapshot. Its device is then as after power-on: no address
/// and no region. Programs in it end with an error that says so, and the host sees that the guest
/// has left. The guest gets the device back by removing it and finding it again.
fn restored_vm_has_no_device(broker: &Broker, vm: &Vm) -> Result<()> {
    RoundTrip::start(broker, vm)?.finish()?;
    let buffer = vm.spawn(["barlink-guest", "buffer"])?;
    buffer.close_stdin()?;
    buffer.next_line(COMMAND_TIMEOUT)?.context("no line")?;
    let receiver = vm.spawn(["barlink-guest", "recv", "--follow"])?;
    let tap = vm.spawn(["barlink-guest", "tail", "down"])?;
    let sender = vm.spawn(["barlink-guest", "send"])?;
    wait_for_holder(broker, "down", "consumer", true)?;
    wait_for_holder(broker, "up", "producer", true)?;
    // The receiver has got a stream, and sleeps until it is rung.
    let mut app = broker.app(["send"]);
    let mut app = App::start(app.stdin(Stdio::piped()))?;
    let mut input = app.stdin.take().context("no input")?;
    input.write_all(b"before\n")?;
    drop(input);
    ensure!(wait_for_end(&mut app, "the sender")?.success());
    receiver.wait_for("before", COMMAND_TIMEOUT)?;
    tap.wait_for("before", COMMAND_TIMEOUT)?;
    ensure!(monitor(vm, "savevm one")?.is_empty());
    vm.run(["barlink-guest", "poke", "later"])?
        .require_success()?;
    ensure!(monitor(vm, "loadvm one")?.is_empty());
    ensure!(vm.qmp("query-status", &json!({}))?["running"] == true);
    wait_for_holder(broker, "down", "consumer", false)?;
    sender.write(b"sent to nobody")?;
    sender.close_stdin()?;
    let mut ends = Vec::new();
    for (name, process) in [
        ("sender", sender),
        ("receiver", receiver),
        ("tap", tap),
        ("buffer", buffer),
    ] {
        ends.push((name, process.wait(COMMAND_TIMEOUT).context(name)?));
    }
    for command in ["info", "peek", "poke", "send", "recv"] {
        ends.push((command, vm.run(["barlink-guest", command])?));
    }
    for (name, ended) in ends {
        let error = String::from_utf8_lossy(&ended.stderr).into_owned();
        ensure!(ended.status == Status::Code(3), "{name}: {error}");
        ensure!(error.contains("has lost its region"), "{name}: {error}");
    }
    // The region is not part of a snapshot.
    ensure!(broker.run(["peek", "--raw", "--length", "5"])? == b"later");

    let again = "rmmod barlink; cd /sys/bus/pci/devices/0000:01:00.0; echo 1 >remove; \
        echo 1 >/sys/bus/pci/rescan; insmod /lib/barlink.ko";
    vm.run(["sh", "-c", again])?.require_success()?;
    for channel in ["up", "down"] {
        broker.run(["reset-channel", channel])?;
    }
    RoundTrip::start(broker, vm)?.finish()
}
