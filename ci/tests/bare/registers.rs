// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Doorbells by the register and interrupts by MSI-X, over the transports that have them.

use std::time::Duration;

use anyhow::{Result, ensure};
use barlink_driver_checks::tier::rounds;
use barlink_vm_tests::wait_until;

use crate::stage::{FIRST, HOST, OTHER, Setting, VECTORS, VM};

/// Timeout of one interrupt.
const LIMIT: Duration = Duration::from_secs(20);

pub fn doorbells_are_counted_exactly(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let (mut machine, device) = stage.machine()?;
    let times = rounds(300, 20_000);
    stage.tap.all_rings()?;
    let mut expected = Vec::new();
    for (peer, vector) in [(OTHER, 1), (HOST, 0), (HOST, 4)] {
        machine.repeat(device.doorbell(), peer << 16 | vector, times)?;
        expected.push((peer, vector, times));
    }
    // Doorbells of unknown peers and vectors ring no eventfd.
    for (peer, vector) in [(HOST + 1, 0), (HOST, VECTORS), (0xffff, 0xffff)] {
        machine.write(device.doorbell(), peer << 16 | vector)?;
    }
    ensure!(stage.tap.all_rings()? == expected);
    ensure!(machine.errors()?.is_empty(), "{}", machine.errors()?);
    Ok(())
}

pub fn interrupts_are_counted_exactly(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let (mut machine, device) = stage.machine()?;
    device.enable(&mut machine)?;
    for round in 1..=rounds(20, 2_000) {
        for vector in 0..VECTORS {
            stage.tap.ring(VM, vector, 1)?;
            let cpu_vector = FIRST + vector as u8;
            let taken = machine.sleep_until(cpu_vector, round, LIMIT)?;
            ensure!(
                taken == round,
                "vector {vector}: {taken} of {round} interrupts"
            );
        }
    }
    let all = machine.taken(FIRST, 0xef - u32::from(FIRST))?;
    ensure!(
        all == rounds(20, 2_000) * u64::from(VECTORS),
        "{all} interrupts"
    );
    wait_until("QEMU is content", || Ok(machine.errors()?.is_empty()))
}
