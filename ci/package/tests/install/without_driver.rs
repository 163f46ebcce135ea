// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The udev rules of `docs/install.md` for guests without the driver, under a real udev.

use anyhow::{Result, ensure};
use barlink_package as package;
use barlink_sandbox::builds::{Artifacts, target_folder};
use barlink_sandbox::debian::SHOWN;
use barlink_vm::Vm;
use barlink_vm::broker::Broker;

use crate::support::*;

/// Writes a rule into a file of the booted system, and has udev apply it to the devices.
fn apply(vm: &Vm, name: &str, rule: &str) -> Result<()> {
    vm.run(["sh", "-c", "rm -f /etc/udev/rules.d/61-barlink-*"])?
        .require_success()?;
    let path = format!("/etc/udev/rules.d/61-barlink-{name}.rules");
    vm.put_file(&path, rule.as_bytes())?;
    let apply = "udevadm control --reload
        udevadm trigger --action=add --subsystem-match=pci
        udevadm settle";
    vm.run(["sh", "-ec", apply])?.require_success()
}

#[test]
fn udev_rules_open_device_without_driver() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run, since only root can install a Debian into a folder");
        return Ok(());
    }
    let artifacts = Artifacts::shared()?;
    let folder = tempfile::tempdir_in(target_folder()?)?;
    package::build(folder.path(), None)?;
    let debian = fresh(artifacts, folder.path())?;
    printed(debian.run(&format!(
        "systemd-sysusers --inline 'g barlink -'; dpkg --install {SHOWN}/barlink-guest_*.deb"
    ))?)?;
    let image = folder.path().join("disk.img");
    disk_image(&debian, &image)?;
    let broker = Broker::start(artifacts, &[])?;
    let iommu = ("-device", "intel-iommu,intremap=on".to_owned());
    let vm = boot_with(
        artifacts,
        &debian,
        &image,
        &broker,
        &[iommu],
        " intel_iommu=on",
    )?;
    let run = |script: &str| -> Result<String> { vm.run(["sh", "-ec", script])?.success() };
    let as_user = |user: &str, command: &str| {
        run(&format!(
            "runuser -u {user} -- barlink-guest {command} 2>&1"
        ))
    };
    let fails = |user: &str, command: &str, text: &str| -> Result<()> {
        let said = run(&format!(
            "! runuser -u {user} -- barlink-guest {command} 2>&1"
        ))?;
        ensure!(said.contains(text), "{said}");
        Ok(())
    };
    fails("member", "info", "/resource0: run as root")?;

    let rule = blocks("udev", "# files in sysfs\n")?;
    apply(&vm, "sysfs", &rule.replace("660", "640"))?;
    ensure!(as_user("member", "info")?.contains("sysfs:"));
    fails("member", "poke x", "/resource0 for writing: run as root")?;
    fails("somebody", "info", "/resource0: run as root")?;
    apply(&vm, "sysfs", &rule)?;
    as_user("member", "poke sysfs")?;
    ensure!(broker.run(["peek", "--raw", "--length", "5"])? == b"sysfs");
    streams(&vm, &broker)?;

    apply(&vm, "vfio", &blocks("udev", "# VFIO\n")?)?;
    eventually(|| as_user("member", "info"))?;
    let info = as_user("member", "info")?;
    ensure!(info.contains("by VFIO"), "{info}");
    fails("somebody", "info", "no permission to open /dev/vfio/")?;
    as_user("member", "poke vfio")?;
    ensure!(broker.run(["peek", "--raw", "--length", "4"])? == b"vfio");
    streams(&vm, &broker)
}
