// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A DMA buffer that a guest's driver allocates, as the host reads it.

use anyhow::{Context, Result};
use barlink_agent::Status;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::{COMMAND_TIMEOUT, Config, Executor, Iommu, Vm};
use barlink_vm_tests::wait_until;
use rustix::process::Signal;

const SIZE: usize = 128 << 10;
/// Part of the error that a user without access to a guest's memory receives.
const FORBIDDEN: &str = "needs `barlink serve --vfio-user SOCKET --guest-memory`";
/// Part of the error that a user with access receives while there is no buffer.
const NONE: &str = "no DMA buffer";

fn guest(arguments: &[&str]) -> Result<(Broker, Vm)> {
    guest_with(arguments, false)
}

/// Restores a VM whose memory is shared, with the driver loaded.
pub(super) fn guest_with(arguments: &[&str], iommu: bool) -> Result<(Broker, Vm)> {
    let arguments = [&["--size", "1M"], arguments].concat();
    let broker = Broker::start_over(Artifacts::shared()?, &[Transport::VfioUser], &arguments)?;
    let vm = Vm::restore(&Config {
        arguments: broker.arguments(0)?,
        paths: vec![broker.folder().to_owned()],
        shared_memory: true,
        iommu: iommu.then_some(Iommu::Remapping),
        ..Config::default()
    })?;
    vm.run(["insmod", "/lib/barlink.ko"])?.require_success()?;
    Ok((broker, vm))
}

/// Returns `size` bytes in which no two aligned words of 8 bytes are equal. `size` is a multiple of
/// 8.
pub(super) fn pattern(size: usize) -> Vec<u8> {
    let words = 0..size as u64 / 8;
    let words = words.map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_le_bytes).collect()
}

/// Returns the first bytes of the buffer, or an error with the reason why there are none.
pub(super) fn peek(broker: &Broker, length: usize) -> Result<Vec<u8>> {
    let length = length.to_string();
    let arguments = ["peek", "--guest", "0", "--buffer", "--raw", "--length"];
    broker.run([&arguments[..], &[&length]].concat())
}

/// Waits until the error for the buffer is that there is none.
pub(super) fn wait_for_its_end(broker: &Broker) -> Result<()> {
    wait_until("the buffer is gone", || {
        let refused = peek(broker, 1).err();
        Ok(refused.is_some_and(|error| format!("{error:#}").contains(NONE)))
    })
}

pub fn host_reads_dma_buffer_of_guest(_: Executor) -> Result<()> {
    let (broker, vm) = guest(&["--guest-memory"])?;
    let error = format!("{:#}", peek(&broker, 1).expect_err("there is none"));
    assert!(error.contains(NONE), "{error}");
    let pattern = pattern(SIZE);
    vm.put_file("/tmp/pattern", &pattern)?;
    let fill = [
        "barlink-guest",
        "buffer",
        "--size",
        "128K",
        "--file",
        "/tmp/pattern",
    ];
    let process = vm.spawn(fill)?;
    let line = process.next_line(COMMAND_TIMEOUT)?.context("no line")?;
    assert!(
        line.ends_with("131072 are filled; announced to the device"),
        "{line}"
    );
    assert!(
        peek(&broker, SIZE)? == pattern,
        "the host sees something else"
    );
    // The buffer is at the address that the guest prints, and has exactly the length that it
    // prints.
    let buffer = broker.inspect()?["broker"]["slots"][0]["vm"]["buffer"].take();
    let address = buffer["address"].as_u64().context("no address")?;
    assert!(
        line.starts_with(&format!("131072 bytes at {address:#x},")),
        "{line}"
    );
    let at = address.to_string();
    let place = [
        "peek", "--guest", "0", "--raw", "--length", "64", "--at", &at,
    ];
    assert_eq!(broker.run(place)?, pattern[..64]);
    peek(&broker, SIZE + 1).expect_err("it ends there");
    // A device has one buffer at a time, and none after the buffer's process is killed.
    let second = vm.run(["barlink-guest", "buffer"])?;
    assert_eq!(second.status, Status::Code(4), "{second:?}");
    process.kill(Signal::KILL)?;
    process.wait(COMMAND_TIMEOUT)?;
    wait_for_its_end(&broker)?;
    let buffer = broker.inspect()?["broker"]["slots"][0]["vm"]["buffer"].take();
    assert!(buffer.is_null(), "{buffer}");
    // The buffer also ends when the driver is unbound, and its process exits with an error.
    let process = vm.spawn(fill)?;
    process.next_line(COMMAND_TIMEOUT)?.context("no line")?;
    assert_eq!(peek(&broker, 64)?, pattern[..64]);
    vm.run(["rmmod", "barlink"])?
        .require_success()
        .expect_err("the module is in use");
    let unbind = "cd /sys/bus/pci/drivers/barlink && echo 0000:01:00.0 >unbind";
    vm.run(["sh", "-c", unbind])?.require_success()?;
    assert_eq!(process.wait(COMMAND_TIMEOUT)?.status, Status::Code(3));
    wait_for_its_end(&broker)
}

/// Suspends the guest to memory. Then binds the virtio console again, because the kernel takes the
/// host's end of the command port for closed after a suspend.
const SUSPEND: &str = "echo deep >/sys/power/mem_sleep
    echo mem >/sys/power/state
    cd /sys/bus/virtio/drivers/virtio_console
    for port in virtio*; do echo $port >unbind; echo $port >bind; done";

pub fn driver_announces_buffer_again_after_suspend(_: Executor) -> Result<()> {
    suspend(false)
}

/// Checks the same behind an IOMMU. The reset also clears the IOMMU, and the guest's kernel sets it
/// up again before it resumes any driver.
pub fn driver_announces_iommu_buffer_again_after_suspend(_: Executor) -> Result<()> {
    suspend(true)
}

fn suspend(iommu: bool) -> Result<()> {
    let (broker, vm) = guest_with(&["--guest-memory"], iommu)?;
    let process = vm.spawn(["barlink-guest", "buffer"])?;
    process.write(b"as it was")?;
    process.close_stdin()?;
    process.next_line(COMMAND_TIMEOUT)?.context("no line")?;
    assert_eq!(peek(&broker, 9)?, b"as it was");
    let asleep = vm.spawn(["sh", "-c", SUSPEND])?;
    vm.wake()?;
    asleep.wait(COMMAND_TIMEOUT)?.require_success()?;
    // The machine's reset was also a reset of the device, which forgot the buffer. The driver has
    // announced the buffer again.
    assert_eq!(peek(&broker, 9)?, b"as it was");
    process.kill(Signal::KILL)?;
    process.wait(COMMAND_TIMEOUT)?;
    wait_for_its_end(&broker)
}

pub fn driver_announces_no_buffer_without_guest_memory(_: Executor) -> Result<()> {
    let (broker, vm) = guest(&[])?;
    let process = vm.spawn(["barlink-guest", "buffer"])?;
    process.write(b"not seen")?;
    process.close_stdin()?;
    let line = process.next_line(COMMAND_TIMEOUT)?.context("no line")?;
    assert!(line.starts_with("65536 bytes at 0x"), "{line}");
    assert!(
        line.contains("of which 8 are filled; not announced to the device"),
        "{line}"
    );
    let error = format!("{:#}", peek(&broker, 1).expect_err("it is not announced"));
    assert!(error.contains(FORBIDDEN), "{error}");
    assert!(broker.inspect()?["broker"]["slots"][0]["vm"]["buffer"].is_null());
    Ok(())
}
