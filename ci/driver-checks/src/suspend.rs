// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Suspending the machine, any number of times.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

use crate::host;

/// Where the ICH9 says at which I/O ports it has ACPI's registers, and whether it has them: in the configuration space of its
/// bridge to the ISA bus.
const BRIDGE: &str = "/sys/bus/pci/devices/0000:00:1f.0/config";
const BASE: u64 = 0x40;
const ENABLE: u64 = 0x44;

/// Where the kernel has a file for each of ACPI's events, which tells of it, and by which it is enabled and disabled.
const EVENTS: &str = "/sys/firmware/acpi/interrupts";

/// Suspends the system to memory (ACPI's S3), until the host wakes it: the machine is reset, and its firmware goes on where the kernel
/// was. The device with 256 vectors has to be unbound, where each is an interrupt: one CPU cannot take them all, while the other is off.
pub(crate) fn suspend() -> Result<()> {
    fs::write("/sys/power/mem_sleep", "deep")?;
    let registers = Registers::find().context("ACPI's registers are not found")?;
    turn_processors(false).context("a processor stays on")?;
    host::wake()?;
    let slept = fs::write("/sys/power/state", "mem");
    let restored = registers.restore();
    // Until then nobody hears of errors.
    rebind_ports()?;
    turn_processors(true).context("a processor stays off")?;
    restored.context("ACPI's registers cannot be restored")?;
    slept.context("the system does not suspend")
}

/// Where ACPI's registers are, which SeaBIOS 1.17 should restore in S3, and does not: it writes to the configuration space through
/// memory to which a reset maps it no longer, and maps it only then. So the kernel finds no registers. It reads ones everywhere, of
/// which one says that the machine has just woken: a second suspend would be over at once, and nobody would hear that the host wants
/// a device back.
struct Registers {
    base: [u8; 4],
    enable: [u8; 1],
}

impl Registers {
    fn find() -> io::Result<Self> {
        let bridge = File::open(BRIDGE)?;
        let (mut base, mut enable) = ([0; 4], [0]);
        bridge.read_exact_at(&mut base, BASE)?;
        bridge.read_exact_at(&mut enable, ENABLE)?;
        Ok(Self { base, enable })
    }

    fn restore(&self) -> io::Result<()> {
        let bridge = File::options().write(true).open(BRIDGE)?;
        bridge.write_all_at(&self.base, BASE)?;
        bridge.write_all_at(&self.enable, ENABLE)?;
        // That the kernel has enabled them did not reach the registers.
        for event in fs::read_dir(EVENTS)? {
            let event = event?.path();
            if fs::read_to_string(&event)?.contains(" enabled") {
                fs::write(&event, "disable\n")?;
                fs::write(&event, "enable\n")?;
            }
        }
        Ok(())
    }
}

/// Turns all processors but the first off, or on. A suspend would do so by itself, but what does not start within ten seconds it leaves
/// off for good; under TCG on a busy host that happens.
fn turn_processors(on: bool) -> io::Result<()> {
    for number in 1.. {
        let online = format!("/sys/devices/system/cpu/cpu{number}/online");
        if !fs::exists(&online)? {
            break;
        }
        let turn = || fs::write(&online, if on { "1" } else { "0" });
        turn().or_else(|_| turn()).or_else(|_| turn())?;
    }
    Ok(())
}

/// Takes the ports of virtio's consoles from their driver, and gives them back.
pub(crate) fn rebind_ports() -> Result<()> {
    // The kernel takes the host's end of the agent's port for closed ever after, unless it looks at it anew.
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
