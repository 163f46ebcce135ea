// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of suspend and resume, while processes have files open and memory mapped.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use barlink_protocol::wire::layout::PAGE_SIZE as PAGE;
use rustix::io::Errno;

use crate::ask::{RAW, Region};
use crate::binding::{attribute, bind, is_bound, is_virtio, make_second_node, node, open, unbind};
use crate::calls::Mapping;
use crate::checks::rounds::{is_counted_after, many_times};
use crate::device::{DOWN, DOWN_VECTOR, Device, SPARE_VECTOR, UP, UP_VECTOR, fails};
use crate::host;
use crate::module;
use crate::process::{Child, child};

/// Suspends the system to memory (ACPI's S3) until the host wakes it. The machine is reset then,
/// and its firmware returns to the kernel. A q35 can do so once in a VM's life, because QEMU's
/// firmware loses ACPI's registers (`docs/driver.md`, section 8).
///
/// If there are several processors, no device with 256 interrupts may be bound: the boot processor
/// cannot take all of them while the others are off.
fn suspend() -> Result<()> {
    fs::write("/sys/power/mem_sleep", "deep")?;
    host::wake()?;
    let slept = fs::write("/sys/power/state", "mem");
    rebind_ports()?;
    slept.context("the system does not suspend")
}

fn rebind_ports() -> Result<()> {
    // On resume the kernel asks the host whether the agent's port is open (`virtcons_restore`), but
    // cannot receive the answer yet and takes the port for closed. Binding the driver again makes
    // it ask once more.
    const PORTS: &str = "/sys/bus/virtio/drivers/virtio_console";
    for entry in fs::read_dir(PORTS)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("virtio") {
            for what in ["unbind", "bind"] {
                fs::write(format!("{PORTS}/{what}"), &*name)?;
            }
        }
    }
    Ok(())
}

pub(super) fn hibernation_is_refused() -> Result<()> {
    let device = open(Region::Main)?;
    let refused = fs::write("/sys/power/state", "disk");
    rebind_ports()?;
    let error = refused.err().context("it is not")?;
    assert_eq!(Errno::from_io_error(&error), Some(Errno::BUSY));
    // The driver itself has refused (-16 is `EBUSY`), and the device still works.
    ensure!(module::log()?.contains("failed to freeze: error -16"));
    device.info()?;
    Ok(())
}

/// Suspends the system to idle until the host presses a key. Processes and devices are suspended as
/// by [`suspend`], but the machine stays on.
fn idle() -> Result<()> {
    const KEYBOARD: &str = "/sys/devices/platform/i8042/serio0/power/wakeup";
    fs::write(KEYBOARD, "enabled").context("no key wakes it")?;
    host::press()?;
    let slept = fs::write("/sys/power/state", "freeze");
    rebind_ports()?;
    host::calm()?;
    slept.context("the system does not suspend to idle")
}

/// Starts a child that maps through this node, and then uses the mapping and calls the driver
/// without an error. Whenever the parent tells it to go on, it reports that it is ready.
fn user(node: &Path) -> Result<Child> {
    child(|parent| {
        let device = Device::open(node)?;
        let map = device.map(RAW, 16 * PAGE)?;
        parent.send_ready()?;
        loop {
            // Leaves the first page alone, because the parent writes there.
            map.write(8 * PAGE, 1);
            map.read(15 * PAGE);
            device.info()?;
            device.ring(Region::Main.facts().slot, SPARE_VECTOR)?;
            if parent.may_continue()? {
                parent.wait()?;
                parent.send_ready()?;
            }
        }
    })
}

/// Starts a child that sleeps in `read` again and again, and reports each time before it does.
fn sleeper(node: &Path) -> Result<Child> {
    child(|parent| {
        let device = Device::open(node)?;
        device.claim(DOWN)?;
        loop {
            parent.send_ready()?;
            // `DOWN_VECTOR` is never rung. After a suspend the driver reports all vectors, because
            // interrupts may have been lost meanwhile.
            ensure!(device.interrupts()?.contains(&DOWN_VECTOR));
        }
    })
}

/// Processes that use the device through two nodes during a suspend. This process is one of them.
struct Users {
    users: Vec<Child>,
    sleeper: Child,
    device: Device,
    map: Mapping,
    /// Holder word of the end that this process has claimed: the claim's number and the process ID.
    holder: (u32, u32),
    /// Number of suspends so far.
    times: u64,
}

impl Users {
    fn new() -> Result<Self> {
        let first = node(Region::Main)?;
        let second = Path::new("/tmp/barlink-asleep");
        make_second_node(&first, second)?;
        let users = vec![user(&first)?, user(second)?];
        users.iter().try_for_each(Child::wait_ready)?;
        let sleeper = sleeper(second)?;
        let device = open(Region::Main)?;
        device.claim(UP)?;
        let map = device.map(RAW, PAGE)?;
        Ok(Self {
            users,
            sleeper,
            holder: host::holder(Region::Main, UP)?,
            device,
            map,
            times: 0,
        })
    }

    /// Suspends the system, and asserts that everything works after the resume. Returns the epochs
    /// before and after.
    fn sleep(&mut self, suspend: fn() -> Result<()>) -> Result<[u64; 2]> {
        // Waits until the sleeper sleeps, again if it was woken by an earlier suspend.
        self.sleeper.wait_asleep()?;
        self.times += 1;
        let Self {
            device, map, times, ..
        } = self;
        map.write(0, *times);
        let before = device.info()?.epoch;
        suspend()?;
        self.users.iter().try_for_each(Child::go_on)?;
        self.users.iter().try_for_each(Child::wait_ready)?;
        // The memory is still mapped, and still shared with the host.
        assert_eq!(map.read(0), *times);
        host::set_word(Region::Main, RAW, !*times)?;
        assert_eq!(map.read(0), !*times);
        map.write(8, *times);
        assert_eq!(host::word(Region::Main, RAW + 8)?, *times);
        // The claim still holds, in the same epoch or in a new one.
        let now = device.info()?.epoch;
        assert_eq!(host::epoch(Region::Main)?, now);
        ensure!(now % 2 == 1 && now >= before, "epoch {now} after {before}");
        assert_eq!(host::holder(Region::Main, UP)?, self.holder);
        fails(open(Region::Main)?.claim(UP), Errno::BUSY);
        // Doorbells and interrupts arrive.
        let host_peer = Region::Main.host();
        host::rings(Region::Main, host_peer, SPARE_VECTOR)?;
        device.ring(host_peer, SPARE_VECTOR)?;
        host::wait_for_rings(Region::Main, host_peer, SPARE_VECTOR)?;
        while device.is_readable()? {
            device.interrupts()?;
        }
        host::ring(Region::Main, UP_VECTOR)?;
        ensure!(device.becomes_readable()?, "no interrupt comes any more");
        assert_eq!(device.next_interrupts(1)?, [UP_VECTOR]);
        Ok([before, now])
    }
}

/// Suspends for the rounds of this tier, and judges the epochs before and after each suspend.
fn suspend_many_times(
    about: &str,
    suspend: fn() -> Result<()>,
    judge: impl Fn(u64, u64) -> Result<()>,
) -> Result<()> {
    let mut living = None;
    many_times(about, 1, |round| {
        let mut users = match living.take() {
            Some(users) => users,
            None => Users::new()?,
        };
        let [before, now] = users.sleep(suspend)?;
        living = Some(users).filter(|_| !is_counted_after(round));
        judge(before, now)
    })
}

pub(super) fn system_suspends_to_idle_while_used() -> Result<()> {
    // The machine stays on. Only virtio devices are reset, by their driver.
    let is_reset = is_virtio(Region::Main)?;
    suspend_many_times("suspend to idle", idle, |before, now| {
        ensure!(is_reset == (now > before), "epoch {now} after {before}");
        Ok(())
    })
}

pub(super) fn system_suspends_to_memory_while_used() -> Result<()> {
    suspend_many_times("suspend to memory", suspend, |_, _| Ok(()))
}

pub(super) fn suspend_preserves_files_and_mappings() -> Result<()> {
    let mut users = Users::new()?;
    let [epoch, now] = users.sleep(suspend)?;
    users.sleeper.wait_asleep()?;
    host::show(format!("suspended: epoch {epoch}, then {now}"))
}

/// Suspends with a virtio device that was reset by its PCI function. The driver has released such a
/// device but is still bound to it, and has nothing to restore on resume.
pub(super) fn reset_device_stays_gone_after_suspend() -> Result<()> {
    if !is_virtio(Region::Main)? {
        return Ok(());
    }
    fs::write(attribute(Region::Main, "reset"), "1")?;
    ensure!(!is_bound(Region::Main)?, "the driver has not let go of it");
    idle()?;
    ensure!(!is_bound(Region::Main)?, "it is back");
    unbind(Region::Main)?;
    module::check_log()?;
    bind(Region::Main)?;
    assert_eq!(open(Region::Main)?.info()?.epoch % 2, 1);
    module::check_log()
}
