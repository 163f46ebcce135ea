// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Doorbells and interrupts by the queues of the device over vhost-user.

use std::thread;

use anyhow::{Context, Result, ensure};
use barlink_driver_checks::tier::rounds;
use barlink_vm::Bare;
use barlink_vm_tests::wait_until;
use serde_json::json;

use crate::driver::Driver;
use crate::registers::{Stop, Storm};
use crate::stage::{Device, FIRST, HOST, LIMIT, OTHER, Setting, Stage, VECTORS, VM};
use crate::unplug;

/// The queue of doorbells, and that of interrupts.
const DOORBELLS: u16 = 0;
const INTERRUPTS: u16 = 1;
/// Offsets in the common configuration: the selected queue, and its MSI-X vector.
const QUEUE_SELECT: u64 = 22;
const QUEUE_VECTOR: u64 = 26;
/// The region's first word.
const MAGIC: u32 = u32::from_le_bytes(*b"barl");

/// A started device, and the number of buffers that it has returned by each queue.
pub struct Queues {
    driver: Driver,
    returned: [usize; 2],
}

impl Queues {
    /// Starts the device, with the interrupts of its second queue by MSI-X, and waits for the
    /// region.
    pub fn start(stage: &Stage, machine: &mut Bare) -> Result<Self> {
        let device = Device::find(machine, "barlink0")?;
        let driver = Driver::find(machine, device.pci.clone())?;
        Self::start_again(stage, machine, driver, &device)
    }

    fn start_again(
        stage: &Stage,
        machine: &mut Bare,
        mut driver: Driver,
        device: &Device,
    ) -> Result<Self> {
        driver.prepare(machine)?;
        machine.set_vectors(device.pci.bars[1].0, 1, FIRST, 1)?;
        device.set_msix(machine, true, false)?;
        machine.write_short(driver.common.address + QUEUE_SELECT, INTERRUPTS)?;
        machine.write_short(driver.common.address + QUEUE_VECTOR, 0)?;
        let vector = machine.read_short(driver.common.address + QUEUE_VECTOR)?;
        ensure!(vector == 0, "the queue has no vector");
        driver.start(machine)?;
        wait_until("the region is mapped", || {
            Ok(machine.read(driver.region.address)? == MAGIC)
        })?;
        stage.tap.all_rings()?;
        let returned = [0; 2];
        Ok(Self { driver, returned })
    }

    /// Returns the address of the region.
    pub fn region(&self) -> u64 {
        self.driver.region.address
    }

    /// Gives the device a buffer for an interrupt.
    pub fn give_buffer(&mut self, machine: &mut Bare) -> Result<()> {
        self.driver.put(machine, INTERRUPTS, u32::MAX, true)
    }

    /// Rings a peer's vector.
    pub fn ring(&mut self, machine: &mut Bare, peer: u32, vector: u32) -> Result<()> {
        let word = peer << 16 | vector;
        self.driver.put(machine, DOORBELLS, word, false)?;
        self.returned[0] += 1;
        let expected = self.returned[0] as u16;
        wait_until("the doorbell is returned", || {
            Ok(self.driver.count(machine, DOORBELLS)? == expected)
        })
    }

    /// Gives the device a buffer for an interrupt, lets the host ring a vector, and checks that one
    /// interrupt comes and names the vector.
    fn interrupt_comes(&mut self, stage: &Stage, machine: &mut Bare, vector: u32) -> Result<()> {
        self.give_buffer(machine)?;
        let before = machine.taken(FIRST, 1)?;
        stage.tap.ring(VM, vector, 1)?;
        let taken = machine.sleep_until(FIRST, before + 1, LIMIT)? - before;
        ensure!(taken == 1, "vector {vector}: {taken} interrupts");
        self.returned[1] += 1;
        let count = usize::from(self.driver.count(machine, INTERRUPTS)?);
        ensure!(count == self.returned[1], "{count} buffers came back");
        let last = self.driver.returned(machine, INTERRUPTS)?.pop();
        ensure!(last == Some((4, vector)), "{last:?}");
        Ok(())
    }

    /// Checks that rings come both ways, each of them once.
    fn work(&mut self, stage: &Stage, machine: &mut Bare, times: u32) -> Result<()> {
        for vector in (0..VECTORS).cycle().take(times as usize) {
            self.interrupt_comes(stage, machine, vector)?;
        }
        stage.tap.all_rings()?;
        for _ in 0..times {
            self.ring(machine, HOST, 3)?;
        }
        let mut rings = stage.tap.all_rings()?;
        // No program reads the VM's eventfds over vhost-user.
        rings.retain(|(peer, ..)| *peer != VM);
        ensure!(rings == [(HOST, 3, times.into())], "{rings:?}");
        Ok(())
    }
}

pub fn queues_count_exactly(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let mut machine = setting.machine(&stage.config(0)?)?;
    let mut queues = Queues::start(&stage, &mut machine)?;
    queues.work(&stage, &mut machine, rounds(20, 500))?;
    stage.check_quiet(&machine)
}

/// Rings come merged while the host rings without a pause, and the last one comes.
pub fn storm_fills_all_buffers(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let mut machine = setting.machine(&stage.config(0)?)?;
    let mut queues = Queues::start(&stage, &mut machine)?;
    let buffers = rounds(30, 600);
    let stop = Stop::default();
    thread::scope(|scope| {
        let _storm = Storm::start(scope, &stage.tap, &stop);
        for count in 1..=buffers {
            queues
                .driver
                .put(&mut machine, INTERRUPTS, u32::MAX, true)?;
            queues.ring(&mut machine, HOST, 2)?;
            wait_until("a buffer comes back", || {
                Ok(queues.driver.count(&mut machine, INTERRUPTS)? == count)
            })?;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    let rings = stage.tap.rings(HOST, 2)?;
    ensure!(
        rings == u64::from(buffers),
        "{rings} of {buffers} doorbells"
    );
    stage.check_quiet(&machine)
}

pub fn queues_work_after_resets_amid_rings(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let mut machine = setting.machine(&stage.config(0)?)?;
    for round in 1..=rounds(3, 15) {
        let mut queues = Queues::start(&stage, &mut machine)?;
        queues.work(&stage, &mut machine, 3)?;
        let stop = Stop::default();
        thread::scope(|scope| {
            let _storm = Storm::start(scope, &stage.tap, &stop);
            for _ in 0..5 {
                queues
                    .driver
                    .put(&mut machine, INTERRUPTS, u32::MAX, true)?;
                queues.ring(&mut machine, HOST, 2)?;
            }
            machine.qmp("system_reset", &json!({}))?;
            machine.wait_for_firmware(round + 1)
        })?;
    }
    let mut queues = Queues::start(&stage, &mut machine)?;
    queues.work(&stage, &mut machine, 5)?;
    stage.check_quiet(&machine)
}

pub fn killed_qemu_leaves_queues_usable(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    for _ in 0..rounds(3, 20) {
        let mut machine = setting.machine(&stage.config(0)?)?;
        let mut queues = Queues::start(&stage, &mut machine)?;
        queues.work(&stage, &mut machine, 3)?;
        let stop = Stop::default();
        thread::scope(|scope| {
            let _storm = Storm::start(scope, &stage.tap, &stop);
            for _ in 0..5 {
                queues
                    .driver
                    .put(&mut machine, INTERRUPTS, u32::MAX, true)?;
            }
            queues.ring(&mut machine, HOST, 2)?;
            drop(machine);
            Ok::<_, anyhow::Error>(())
        })?;
        stage.wait_until_free()?;
    }
    Ok(())
}

/// A VM over vhost-user and one over ivshmem ring each other.
pub fn vm_rings_vm_over_ivshmem(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let mut first = setting.machine(&stage.config(0)?)?;
    let mut queues = Queues::start(&stage, &mut first)?;
    let mut second = setting.machine(&stage.config(OTHER as usize)?)?;
    let other = Device::find(&mut second, "barlink1")?;
    other.enable(&mut second)?;
    for round in 1..=rounds(10, 300) {
        queues.ring(&mut first, OTHER, 2)?;
        let taken = second.sleep_until(FIRST + 2, round, LIMIT)?;
        ensure!(taken == round, "{taken} of {round}");
        queues.give_buffer(&mut first)?;
        second.write(other.doorbell(), VM << 16 | 3)?;
        let taken = first.sleep_until(FIRST, round, LIMIT)?;
        ensure!(taken == round, "{taken} of {round}");
        let last = queues.driver.returned(&mut first, INTERRUPTS)?.pop();
        ensure!(last == Some((4, 3)), "{last:?}");
    }
    stage.check_quiet(&first)?;
    stage.check_quiet(&second)
}

pub fn queues_work_after_unplugging(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let mut machine = setting.machine(&stage.config(0)?)?;
    let device = Device::find(&mut machine, "barlink0")?;
    for round in 0..rounds(2, 10) {
        let mut queues = Queues::start(&stage, &mut machine)?;
        queues.work(&stage, &mut machine, 3)?;
        queues.driver.reset(&mut machine)?;
        unplug::eject(&mut machine)?;
        unplug::removed(&stage, &machine, &unplug::chardev(round))?;
        unplug::plug(&stage, &machine, &unplug::chardev(round + 1))?;
        unplug::place(&mut machine, &device)?;
    }
    let driver = Driver::find(&mut machine, device.pci.clone())?;
    let queues = Queues::start_again(&stage, &mut machine, driver, &device);
    let mut queues = queues.context("after the last round")?;
    queues.work(&stage, &mut machine, 5)?;
    stage.check_quiet(&machine)
}
