// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Two devices in a VM without the driver: by sysfs, and by VFIO. Their names and addresses stay.

use anyhow::{Context, Result, ensure};
use barlink_sandbox::builds::Artifacts;
use barlink_vm::broker::Broker;
use barlink_vm::{Config, Iommu, Vm};
use serde_json::Value;

use super::vfio::{bind, device, load_vfio};
use super::{TRANSPORT, restore};
use crate::support::*;

/// Checks that a text names the device of this broker, by its address in one of two ways.
fn is_device_of(vm: &Vm, text: &str, broker: &Broker, address: &str) -> Result<()> {
    let found = info(vm, &device(text))?;
    let instance = &broker.inspect()?["region"]["instance"];
    ensure!(found["instance"] == *instance, "{text}: {found}");
    ensure!(found["pci_address"] == *address, "{text}: {found}");
    ensure!(found["driver"] == false, "{text}: {found}");
    Ok(())
}

/// Lists the addresses of the devices, in their order.
fn addresses(vm: &Vm) -> Result<Vec<String>> {
    let find = "cd /sys/bus/pci/devices && grep -l 0x1110 */device | xargs -n 1 dirname";
    let lines = vm.run(["sh", "-c", find])?.success()?;
    Ok(lines.lines().map(str::to_owned).collect())
}

#[test]
fn names_find_devices_without_driver() -> Result<()> {
    let artifacts = Artifacts::shared()?;
    let names = ["camera", "vm-2.log"];
    let [camera, log] = names.map(|name| Broker::start_named(artifacts, name, TRANSPORT));
    let (camera, log) = (camera?, log?);
    let mut config = Config {
        iommu: Some(Iommu::Remapping),
        ..camera.vm()?
    };
    let second = log.arguments_with(0, "second", 70)?;
    config.arguments.extend(second);
    config.paths.extend(log.vm()?.paths);
    let vm = restore(&config)?;
    let all = addresses(&vm)?;
    let [first, second] = &all[..] else {
        anyhow::bail!("{all:?}");
    };
    let sysfs = |address: &str| format!("sysfs:{address}");
    let by_name = |vm: &Vm| -> Result<()> {
        is_device_of(vm, "camera", &camera, first)?;
        is_device_of(vm, "vm-2.log", &log, second)
    };
    by_name(&vm)?;
    is_device_of(&vm, &sysfs(first), &camera, first)?;
    let several = format!(
        "no barlink device at /dev/barlink0, and several without a driver: choose one by --device {} or --device {}",
        sysfs(first),
        sysfs(second)
    );
    refused(&vm.run(["barlink-guest", "info"])?, 1, &several)?;

    // One device goes to VFIO. The other one is the only one by sysfs, which needs no name.
    load_vfio(&vm)?;
    bind(&vm, first)?;
    by_name(&vm)?;
    is_device_of(&vm, &format!("vfio:{first}"), &camera, first)?;
    let chosen: Value =
        serde_json::from_str(&vm.run(["barlink-guest", "info", "--json"])?.success()?)?;
    ensure!(chosen["pci_address"] == **second, "{chosen}");
    bind(&vm, second)?;
    by_name(&vm)?;
    let several = several.replace("sysfs:", "vfio:");
    refused(&vm.run(["barlink-guest", "info"])?, 1, &several)?;

    // Both go and come back in the other order.
    let unbind = "for device; do echo $device >/sys/bus/pci/devices/$device/driver/unbind; done
        for device; do echo >/sys/bus/pci/devices/$device/driver_override; done
        for device; do echo 1 >/sys/bus/pci/devices/$device/remove; done
        echo 1 >/sys/bus/pci/rescan";
    vm.run(["sh", "-ec", unbind, "sh", second, first])?
        .require_success()?;
    by_name(&vm)?;
    let unknown = vm.run(["barlink-guest", "--device", "vm-3", "info"])?;
    let text = String::from_utf8_lossy(&unknown.stderr).into_owned();
    text.find("a broker named `vm-3`").context(text.clone())?;
    Ok(())
}
