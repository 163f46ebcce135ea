// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Two devices in one VM, of two brokers, named by their brokers.

use anyhow::{Result, ensure};
use barlink_agent::Status;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::Vm;
use barlink_vm::broker::Broker;
use serde_json::Value;

use super::TRANSPORT;
use crate::support::*;

/// Reads what `barlink-guest info` prints of a device.
fn info(vm: &Vm, device: &str) -> Result<Value> {
    let printed = vm.run(["barlink-guest", "--device", device, "info", "--json"])?;
    Ok(serde_json::from_str(&printed.success()?)?)
}

/// Unbinds both devices, and binds them in the other order.
const REBIND: &str = "cd /sys/class/misc
    first=$(readlink -f barlink0/device) && second=$(readlink -f barlink1/device) &&
    driver=$(readlink -f barlink0/device/driver) &&
    basename $first >$driver/unbind && basename $second >$driver/unbind &&
    basename $second >$driver/bind && basename $first >$driver/bind";

#[test]
fn names_follow_devices_bound_in_other_order() -> Result<()> {
    let artifacts = Artifacts::shared()?;
    let names = ["camera", "vm-2.log"];
    let [camera, log] = names.map(|name| Broker::start_named(artifacts, name, TRANSPORT));
    let (camera, log) = (camera?, log?);
    let mut config = camera.vm()?;
    config
        .arguments
        .extend(log.arguments_with(0, "second", 70)?);
    config.paths.extend(log.vm()?.paths);
    let vm = guest_with(&config)?;
    let instance =
        |broker: &Broker| -> Result<Value> { Ok(broker.inspect()?["region"]["instance"].clone()) };
    ensure!(instance(&camera)? != instance(&log)?);

    let by_number = ["/dev/barlink0", "/dev/barlink1"];
    let before = [info(&vm, by_number[0])?, info(&vm, by_number[1])?];
    vm.run(["sh", "-c", REBIND])?.require_success()?;
    // The numbers are those of the other devices now.
    for (number, other) in by_number.iter().zip(before.iter().rev()) {
        ensure!(info(&vm, number)?["instance"] == other["instance"]);
    }
    for (name, broker) in names.iter().zip([&camera, &log]) {
        let found = info(&vm, name)?;
        ensure!(found["name"] == *name, "{found}");
        ensure!(found["instance"] == instance(broker)?, "{found}");
        // udev makes its links of the attributes.
        let shown =
            "grep -l \"^$1$\" /sys/class/misc/*/name | xargs dirname | xargs -I {} cat {}/instance";
        let shown = vm.run(["sh", "-c", shown, "sh", name])?.success()?;
        ensure!(instance(broker)? == *shown.trim_end(), "{shown}");
    }
    // Bytes come from the region that the name names.
    log.run(["poke", "of the log"])?;
    camera.run(["poke", "of the camera"])?;
    let peek = [
        "barlink-guest",
        "--device",
        "vm-2.log",
        "peek",
        "--raw",
        "--length",
        "10",
    ];
    ensure!(vm.run(peek)?.success()? == "of the log");

    // A command that names no device says which one it uses.
    let chosen = vm.run(["barlink-guest", "poke", "text"])?;
    let said = String::from_utf8_lossy(&chosen.stderr).into_owned();
    chosen.success()?;
    let first = info(&vm, by_number[0])?["name"].clone();
    let text = format!(
        "warning: /dev/barlink0 is used, that of broker `{}`, and there are 2 devices: choose one with --device",
        first.as_str().unwrap_or_default()
    );
    ensure!(said.contains(&text), "{said}");
    // A program that reads standard error finds errors there and nothing else.
    let json = vm.run(["barlink-guest", "--cache", "auto", "info", "--json"])?;
    ensure!(json.stderr.is_empty(), "{json:?}");
    let json: Value = serde_json::from_str(&json.success()?)?;
    ensure!(
        json["name"] == first && json["broker_fault"].is_null(),
        "{json}"
    );
    let send = "echo text | barlink-guest --cache auto send --json";
    let sent = vm.run(["sh", "-c", send])?;
    serde_json::from_slice::<Value>(&sent.stderr)?;
    sent.success()?;
    let named = vm.run(["barlink-guest", "--device", by_number[0], "poke", "text"])?;
    ensure!(!String::from_utf8_lossy(&named.stderr).contains("warning"));

    let unknown = vm.run(["barlink-guest", "--device", "vm-3", "info"])?;
    ensure!(unknown.status == Status::Code(3), "{:?}", unknown.status);
    let error = String::from_utf8_lossy(&unknown.stderr).into_owned();
    ensure!(
        error.contains("a broker named `vm-3`: there are those of `"),
        "{error}"
    );
    Ok(())
}
