// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An IOMMU between the device and the guest's memory: the host reads exactly the memory that the
//! guest maps for the device.

use std::fs::{self, File};

use anyhow::{Context, Result, ensure};
use barlink_vm::broker::Broker;
use barlink_vm::{Bare, COMMAND_TIMEOUT, Config, Executor, Iommu, Process, Vm};
use barlink_vm_tests::{App, wait_for_end, wait_until};
use rustix::process::Signal;
use serde_json::json;

use super::Setting;
use super::buffer::{guest_with, pattern, peek, wait_for_its_end};

/// Size of the buffer in bytes: 2 MiB that the IOMMU maps as one page where it can, and 256 pages
/// that it maps one by one. These are more ranges than QEMU reports otherwise.
const SIZE: usize = 3 << 20;
const PAGE: usize = 4096;

/// Folder of the device in the guest's sysfs.
const DEVICE: &str = "/sys/bus/pci/devices/0000:01:00.0";

/// Returns the number of bytes of the guest's memory that the host can read.
fn readable(broker: &Broker) -> Result<u64> {
    let memory = &broker.inspect()?["broker"]["slots"][0]["vm"]["guest_memory"];
    memory["readable"].as_u64().context("no number")
}

fn read(vm: &Vm, path: &str) -> Result<String> {
    Ok(String::from_utf8(vm.get_file(path)?)?.trim().to_owned())
}

/// Starts a process in the guest that fills a buffer with `/tmp/pattern`, waits until the buffer is
/// filled, and returns the process and the buffer's address.
fn fill(vm: &Vm) -> Result<(Process, u64)> {
    let fill = "barlink-guest buffer --size 3M --file /tmp/pattern";
    let process = vm.spawn(fill.split(' '))?;
    let line = process.next_line(COMMAND_TIMEOUT)?.context("no line")?;
    ensure!(line.ends_with("filled; announced to the device"), "{line}");
    let address = line.split("at 0x").nth(1).context("no address")?;
    let digits = address.split(',').next().unwrap_or_default();
    Ok((process, u64::from_str_radix(digits, 16)?))
}

/// Returns the physical addresses of the buffer's pages as the guest's processor uses them, from
/// the page table of the process that has the buffer mapped.
fn frames(vm: &Vm) -> Result<Vec<u64>> {
    let process = vm.run(["pidof", "barlink-guest"])?.success()?;
    let process = process.trim();
    let areas = read(vm, &format!("/proc/{process}/maps"))?;
    let area = areas.lines().find(|line| line.contains("barlink-buffer"));
    let start = area.and_then(|line| line.split('-').next());
    let start = u64::from_str_radix(start.context("no buffer is mapped")?, 16)?;
    let words = [
        "dd".to_owned(),
        format!("if=/proc/{process}/pagemap"),
        "bs=8".to_owned(),
        format!("skip={}", start / PAGE as u64),
        format!("count={}", SIZE / PAGE),
    ];
    let output = vm.run(words)?;
    output.require_success()?;
    let (entries, _) = output.stdout.as_chunks();
    let entries = entries.iter().map(|entry| u64::from_le_bytes(*entry));
    // An entry holds the number of a frame in bits 0 to 54; bit 63 means that a frame is present
    // (`Documentation/admin-guide/mm/pagemap.rst`).
    let frames: Vec<_> = entries
        .filter(|entry| entry >> 63 == 1)
        .map(|entry| (entry & ((1 << 55) - 1)) * PAGE as u64)
        .collect();
    ensure!(frames.len() == SIZE / PAGE, "{} pages", frames.len());
    Ok(frames)
}

/// Returns a page of the guest's memory at a physical address, as QEMU saves it.
fn physical(broker: &Broker, vm: &Vm, address: u64) -> Result<Vec<u8>> {
    let path = broker.folder().join("page");
    let save = json!({ "val": address, "size": PAGE, "filename": path.display().to_string() });
    vm.qmp("pmemsave", &save)?;
    Ok(fs::read(path)?)
}

/// Sends bytes down to the guest, which sends them back, through ends that sleep and are rung.
/// Returns whether all bytes came back.
fn streams(broker: &Broker, vm: &Vm, bytes: &[u8]) -> Result<bool> {
    let path = |name| broker.folder().join(name);
    fs::write(path("down"), bytes)?;
    let echo = vm.spawn(["barlink-guest", "echo"])?;
    let mut receiver = broker.app(["recv"]);
    let receiver = App::start(receiver.stdout(File::create(path("up"))?))?;
    let mut sender = broker.app(["send"]);
    let sender = App::start(sender.stdin(File::open(path("down"))?))?;
    for (mut program, what) in [(sender, "the sender"), (receiver, "the receiver")] {
        let status = wait_for_end(&mut program, what)?;
        ensure!(status.success(), "{what} ended with {status}");
    }
    echo.wait(COMMAND_TIMEOUT)?.require_success()?;
    Ok(fs::read(path("up"))? == bytes)
}

pub fn host_reads_dma_buffer_behind_iommu(_: Executor) -> Result<()> {
    let (mut broker, vm) = guest_with(&["--guest-memory"], true)?;
    // The device's addresses are translated, and its interrupts are remapped.
    let kind = read(&vm, &format!("{DEVICE}/iommu_group/type"))?;
    assert!(["DMA", "DMA-FQ"].contains(&kind.as_str()), "{kind}");
    let interrupts = read(&vm, "/proc/interrupts")?;
    let ours = interrupts.lines().filter(|line| line.ends_with("barlink"));
    let remapped = ours.filter(|line| line.contains("IR-PCI-MSIX"));
    assert_eq!(remapped.count(), 3, "{interrupts}");
    // The device therefore has no memory until the driver maps some for it.
    let by_address = |address: u64| {
        let at = address.to_string();
        let peek = ["peek", "--guest", "0", "--raw", "--length", "4096"];
        broker.run([&peek[..], &["--at", &at]].concat())
    };
    assert_eq!(readable(&broker)?, 0);
    let error = format!("{:#}", by_address(1 << 20).expect_err("it is hidden"));
    assert!(error.contains("behind an IOMMU"), "{error}");
    let pattern = pattern(SIZE);
    vm.put_file("/tmp/pattern", &pattern)?;
    let (process, address) = fill(&vm)?;
    assert_eq!(readable(&broker)?, SIZE as u64);
    assert!(peek(&broker, SIZE)? == pattern, "the host sees others");
    assert!(by_address(address)? == pattern[..PAGE]);
    // The guest has less memory than that, so this address exists only for the device. The
    // processor uses other addresses for the same pages.
    assert!(address >= 256 << 20, "{address:#x}");
    let frames = frames(&vm)?;
    for index in [0, 1, 511, 512, 513, 600, SIZE / PAGE - 1] {
        let offset = index * PAGE;
        assert_ne!(frames[index], address + offset as u64);
        assert!(
            physical(&broker, &vm, frames[index])? == pattern[offset..][..PAGE],
            "page {index} is elsewhere"
        );
        by_address(frames[index]).expect_err("the device has no such address");
    }
    // The IOMMU does not affect channels, and a broker's successor takes over all ranges.
    assert!(streams(&broker, &vm, &pattern)?, "the stream is another");
    broker.replace()?;
    assert!(peek(&broker, SIZE)? == pattern, "it is lost");
    assert!(streams(&broker, &vm, &pattern)?, "the stream is another");
    // The buffer ends with its process, with the driver's binding to the device, with the module,
    // and with the guest.
    process.kill(Signal::KILL)?;
    process.wait(COMMAND_TIMEOUT)?;
    let is_gone = || {
        wait_for_its_end(&broker)?;
        wait_until("nothing is mapped", || Ok(readable(&broker)? == 0))
    };
    is_gone()?;
    let (process, _) = fill(&vm)?;
    let unbind = "cd /sys/bus/pci/drivers/barlink && echo 0000:01:00.0 >unbind";
    vm.run(["sh", "-c", unbind])?.require_success()?;
    is_gone()?;
    process.wait(COMMAND_TIMEOUT)?;
    vm.run(["rmmod", "barlink"])?.require_success()?;
    vm.run(["insmod", "/lib/barlink.ko"])?.require_success()?;
    fill(&vm)?;
    assert!(peek(&broker, SIZE)? == pattern, "the host sees others");
    vm.reset()?;
    is_gone()?;
    vm.run(["insmod", "/lib/barlink.ko"])?.require_success()?;
    vm.put_file("/tmp/pattern", &pattern)?;
    fill(&vm)?;
    assert!(peek(&broker, SIZE)? == pattern, "the host sees others");
    assert!(!broker.log()?.contains("cannot be read"));
    let errors = vm.errors();
    assert_eq!(errors, "", "QEMU complains");
    Ok(())
}

/// Registers of QEMU's IOMMU: global command, global status, and root table address (Intel VT-d,
/// 11.4).
const IOMMU: u64 = 0xfed9_0000;
const ORDER: u64 = IOMMU + 0x18;
const DONE: u64 = IOMMU + 0x1c;
const TABLES: u64 = IOMMU + 0x20;
const TRANSLATE: u32 = 1 << 31;
const TAKE_TABLES: u32 = 1 << 30;

/// Address of guest memory that is all zeros: a root table in which no device is present.
const EMPTY: u64 = 64 << 20;

/// Switches the IOMMU on with empty tables, so that nothing is mapped for any device.
fn switch_on(machine: &mut Bare) -> Result<()> {
    machine.write(TABLES, EMPTY as u32)?;
    machine.write(TABLES + 4, 0)?;
    machine.write(ORDER, TAKE_TABLES)?;
    ensure!(machine.read(DONE)? & TAKE_TABLES != 0, "no tables");
    machine.write(ORDER, TRANSLATE)
}

fn setting(executor: Executor) -> Result<(Setting, Config)> {
    let setting = Setting::with(executor, &["--size", "1M", "--guest-memory"])?;
    let config = Config {
        arguments: setting.broker.arguments(0)?,
        shared_memory: true,
        ..setting.config()?
    };
    Ok((setting, config))
}

pub fn enabled_iommu_hides_guest_memory(executor: Executor) -> Result<()> {
    let (setting, config) = setting(executor)?;
    let config = Config {
        iommu: Some(Iommu::Remapping),
        ..config
    };
    let (mut machine, _) = setting.started(&config)?;
    let all = 128 << 20;
    let is_there = || wait_until("it is there", || Ok(readable(&setting.broker)? >= all));
    is_there()?;
    for _ in 0..3 {
        switch_on(&mut machine)?;
        assert!(machine.read(DONE)? & TRANSLATE != 0);
        assert_eq!(readable(&setting.broker)?, 0);
        machine.write(ORDER, 0)?;
        is_there()?;
    }
    // A reset of the machine switches the IOMMU off, so that the memory is readable again.
    switch_on(&mut machine)?;
    machine.qmp("system_reset", &json!({}))?;
    is_there()?;
    // QEMU may report missing memory for other devices, which the firmware may still use.
    let errors = machine.errors()?;
    assert!(!errors.contains("vfio"), "{errors}");
    Ok(())
}

pub fn iommu_without_caching_mode_ends_qemu(executor: Executor) -> Result<()> {
    let (setting, mut config) = setting(executor)?;
    let iommu = ["-device", "intel-iommu"].map(str::to_owned);
    config.arguments.splice(0..0, iommu);
    let (mut machine, _) = setting.started(&config)?;
    // QEMU ends instead of answering this access.
    let _ = switch_on(&mut machine);
    let status = machine.end()?;
    assert!(!status.success(), "QEMU lives on: tell the user so");
    let errors = machine.errors()?;
    assert!(errors.contains("requires caching mode"), "{errors}");
    Ok(())
}
