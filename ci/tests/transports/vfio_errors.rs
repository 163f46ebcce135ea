// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The errors of VFIO in guests that lack a part of it. Each one names its cause and its cure, and
//! the cure works.

use anyhow::{Context, Result, ensure};
use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::setup::VFIO_MODULES;
use barlink_vm::broker::Broker;
use barlink_vm::{Config, Iommu, Vm};

use super::vfio::{IOMMU_MODULE, bind, device, load_module, load_vfio, start_by_vfio};
use super::{TRANSPORT, restore};
use crate::support::*;

/// Checks that programs cannot use the device by VFIO, and say this in one line.
fn is_refused(vm: &Vm, address: &str, code: i32, text: &str) -> Result<()> {
    let named = format!("vfio:{address}");
    let output = vm.run(["barlink-guest", "--device", &named, "poke", "x"])?;
    refused(&output, code, text)
}

/// Checks that programs use the device by VFIO.
fn is_usable(broker: &Broker, vm: &Vm, address: &str) -> Result<()> {
    let named = format!("vfio:{address}");
    vm.run(["barlink-guest", "--device", &named, "poke", "cured"])?
        .require_success()?;
    ensure!(broker.run(["peek", "--raw", "--length", "5"])? == b"cured");
    Ok(())
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
    // There are no rights to read alone.
    let readable =
        "chmod 444 /dev/vfio/$(basename $(readlink /sys/bus/pci/devices/$0/iommu_group))";
    for command in ["", readable] {
        vm.run(["sh", "-c", command, &address])?.require_success()?;
        for command in ["info", "poke y"] {
            refused(
                &as_user(command)?,
                1,
                "run as root, or give that file to this user (chown USER /dev/vfio/",
            )?;
        }
    }
    let give = "chown 1000 /dev/vfio/$(basename $(readlink /sys/bus/pci/devices/$0/iommu_group)) && \
        chmod 600 /dev/vfio/$(basename $(readlink /sys/bus/pci/devices/$0/iommu_group))";
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

#[test]
fn missing_part_of_vfio_is_named() -> Result<()> {
    let broker = Broker::start_over(Artifacts::shared()?, &[TRANSPORT], &[])?;
    let vm = restore(&Config {
        iommu: Some(Iommu::Remapping),
        ..broker.vm()?
    })?;
    let address = address(&vm)?;
    let refused = |code, text: &str| is_refused(&vm, &address, code, text);
    let help = format!("or use sysfs:{address} (docs/install.md, \"By VFIO\")");
    refused(
        3,
        "has no driver: give it to vfio-pci (modprobe vfio-pci; echo",
    )?;
    for name in VFIO_MODULES
        .into_iter()
        .filter(|name| *name != IOMMU_MODULE)
    {
        load_module(&vm, name)?;
    }
    bind(&vm, &address)?;
    refused(
        1,
        &format!(
            "lacks VFIO's part for the IOMMU: load the module (modprobe vfio_iommu_type1), {help}"
        ),
    )?;
    load_module(&vm, IOMMU_MODULE)?;
    is_usable(&broker, &vm, &address)?;

    // A container can lack each of the files.
    let group = "basename $(readlink /sys/bus/pci/devices/$0/iommu_group)";
    let group = vm.run(["sh", "-c", group, &address])?.success()?;
    for (file, module) in [("vfio", "vfio"), (group.trim_end(), "vfio-pci")] {
        let file = format!("/dev/vfio/{file}");
        let moved = |from: &str, to: &str| vm.run(["mv", from, to])?.require_success();
        moved(&file, "/dev/vfio/moved")?;
        refused(
            1,
            &format!("lacks {file}: load the module (modprobe {module}), {help}"),
        )?;
        moved("/dev/vfio/moved", &file)?;
    }
    is_usable(&broker, &vm, &address)
}

#[test]
fn missing_iommu_is_named() -> Result<()> {
    let broker = Broker::start_over(Artifacts::shared()?, &[TRANSPORT], &[])?;
    let vm = restore(&broker.vm()?)?;
    load_vfio(&vm)?;
    let address = address(&vm)?;
    // The kernel does not give the device to VFIO.
    ensure!(bind(&vm, &address).is_err());
    let text = format!(
        "the kernel has PCI device {address} behind no IOMMU, and VFIO needs one: give the VM an IOMMU and boot with \
         intel_iommu=on, "
    );
    is_refused(&vm, &address, 1, &text)
}

#[test]
fn missing_interrupt_remapping_is_named() -> Result<()> {
    let broker = Broker::start_over(Artifacts::shared()?, &[TRANSPORT], &[])?;
    let vm = restore(&Config {
        iommu: Some(Iommu::Translating),
        ..broker.vm()?
    })?;
    load_vfio(&vm)?;
    let address = address(&vm)?;
    bind(&vm, &address)?;
    let text = format!(
        "the IOMMU of this VM does not remap interrupts, and so VFIO refuses vfio:{address}: give the VM's IOMMU \
         intremap=on, or load vfio_iommu_type1 with allow_unsafe_interrupts=1"
    );
    is_refused(&vm, &address, 1, &text)?;
    let permit = "echo Y >/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
    vm.run(["sh", "-c", permit])?.require_success()?;
    is_usable(&broker, &vm, &address)
}

/// Puts another device beside barlink's, as function 0 of the same slot. The kernel cannot isolate
/// the functions from each other.
fn beside_other_device(broker: &Broker) -> Result<Config> {
    let mut config = Config {
        iommu: Some(Iommu::Remapping),
        ..broker.vm()?
    };
    let own = config.arguments.last_mut().context("no device")?;
    *own = match own.strip_suffix('}') {
        Some(json) => format!("{json},\"addr\":\"0.1\",\"multifunction\":true}}"),
        None => format!("{own},addr=0.1,multifunction=on"),
    };
    let other = "virtio-rng-pci,bus=barlink0-port,addr=0.0,multifunction=on";
    let other = ["-device", other].map(str::to_owned);
    config.arguments.extend(other);
    Ok(config)
}

#[test]
fn device_of_same_group_is_named() -> Result<()> {
    let broker = Broker::start_over(Artifacts::shared()?, &[TRANSPORT], &[])?;
    let vm = restore(&beside_other_device(&broker)?)?;
    load_vfio(&vm)?;
    let address = address(&vm)?;
    let other = address.strip_suffix('1').context("it is function 1")?;
    let other = format!("{other}0");
    bind(&vm, &address)?;
    let text = format!(
        "of PCI device {address} has devices with other drivers ({other} virtio-pci): give them to vfio-pci as well, \
         or give {address} a root port of its own"
    );
    is_refused(&vm, &address, 4, &text)?;
    bind(&vm, &other)?;
    is_usable(&broker, &vm, &address)
}
