// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Doorbells and interrupts by the queues of the device over vhost-user.

use std::thread;

use anyhow::{Context, Result, ensure};
use barlink_driver_checks::tier::rounds;
use barlink_vm::Bare;
use barlink_vm::broker::Transport;
use barlink_vm_tests::wait_until;
use serde_json::json;

use crate::driver::Driver;
use crate::registers::{MOMENT, Stop, Storm, reset};
use crate::stage::{
    ALL, Device, FIRST, HOST, LIMIT, OTHER, Setting, Stage, VECTORS, VM, wait_for_rings,
};
use crate::unplug;

/// The queue of doorbells, and that of interrupts.
const DOORBELLS: u16 = 0;
const INTERRUPTS: u16 = 1;
/// Offsets in the common configuration: the selected queue, and its MSI-X vector.
const QUEUE_SELECT: u64 = 22;
const QUEUE_VECTOR: u64 = 26;

/// A started device, and the number of buffers that it has returned by each queue.
pub struct Queues {
    driver: Driver,
    /// Address of the MSI-X table, which has one vector.
    table: u64,
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
        driver.wait_until_mapped(machine)?;
        stage.tap.all_rings()?;
        Ok(Self {
            driver,
            table: device.pci.bars[1].0,
            returned: [0; 2],
        })
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

    /// Gives the device buffers, lets the host ring as many vectors, and waits until each buffer
    /// has come back with its vector.
    fn buffers_come_back(
        &mut self,
        stage: &Stage,
        machine: &mut Bare,
        vectors: impl ExactSizeIterator<Item = u32> + Clone,
    ) -> Result<()> {
        for _ in 0..vectors.len() {
            self.give_buffer(machine)?;
        }
        for vector in vectors.clone() {
            stage.tap.ring(VM, vector, 1)?;
        }
        self.returned[1] += vectors.len();
        // The device's count has 16 bits.
        let expected = self.returned[1] as u16;
        wait_until("all buffers come back", || {
            Ok(self.driver.count(machine, INTERRUPTS)? == expected)
        })?;
        let all = self.driver.returned(machine, INTERRUPTS)?;
        let mut last: Vec<_> = all[all.len() - vectors.len()..].to_vec();
        last.sort_unstable();
        ensure!(
            last.into_iter().eq(vectors.map(|vector| (4, vector))),
            "other vectors"
        );
        Ok(())
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
            queues.give_buffer(&mut machine)?;
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

/// Lets both sides ring until `end` has ended the machine's work.
fn ring_until<T>(
    stage: &Stage,
    mut machine: Bare,
    mut queues: Queues,
    end: impl FnOnce(Bare) -> Result<T>,
) -> Result<T> {
    let stop = Stop::default();
    thread::scope(|scope| {
        let _storm = Storm::start(scope, &stage.tap, &stop);
        for _ in 0..5 {
            queues.give_buffer(&mut machine)?;
            queues.ring(&mut machine, HOST, 2)?;
        }
        end(machine)
    })
}

/// The operator and the guest reset the machine in turn.
pub fn queues_work_after_resets_amid_rings(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let mut machine = setting.machine(&stage.config(0)?)?;
    for round in 1..=rounds(3, 15) {
        let mut queues = Queues::start(&stage, &mut machine)?;
        queues.work(&stage, &mut machine, 3)?;
        machine = ring_until(&stage, machine, queues, |mut machine| {
            reset(&mut machine, round)?;
            Ok(machine)
        })?;
    }
    let mut queues = Queues::start(&stage, &mut machine)?;
    queues.work(&stage, &mut machine, 5)?;
    stage.check_quiet(&machine)
}

pub fn killed_qemu_leaves_queues_usable(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    for round in 1..=rounds(3, 20) {
        let mut machine = setting.machine(&stage.config(0)?)?;
        let mut queues = Queues::start(&stage, &mut machine)?;
        queues.work(&stage, &mut machine, 3)?;
        stage.hold_from_second_round(round)?;
        ring_until(&stage, machine, queues, |machine| {
            drop(machine);
            Ok(())
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

/// Rings for a vector that cannot interrupt return their buffers, and become one interrupt later.
pub fn masked_vector_keeps_its_interrupt(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let mut machine = setting.machine(&stage.config(0)?)?;
    let mut queues = Queues::start(&stage, &mut machine)?;
    queues.work(&stage, &mut machine, 3)?;
    let device = Device::find(&mut machine, "barlink0")?;
    let control = queues.table + 12;
    for round in 1..=rounds(1, 100) {
        for whole in [false, true] {
            let mask = |machine: &mut Bare, masked: bool| match whole {
                true => device.set_msix(machine, true, masked),
                false => machine.write(control, masked.into()),
            };
            let before = machine.taken(FIRST, 1)?;
            mask(&mut machine, true)?;
            queues.buffers_come_back(&stage, &mut machine, 1..4)?;
            wait_for_rings(&mut machine, queues.driver.config.address)?;
            let taken = machine.sleep_until(FIRST, before + 1, MOMENT)?;
            ensure!(taken == before, "masked, round {round}: {taken}");
            mask(&mut machine, false)?;
            machine.sleep_until(FIRST, before + 1, LIMIT)?;
            let taken = machine.sleep_until(FIRST, before + 2, MOMENT)?;
            ensure!(taken == before + 1, "unmasked, round {round}: {taken}");
            queues.interrupt_comes(&stage, &mut machine, 3)?;
        }
    }
    stage.check_quiet(&machine)
}

/// The guest gives the device's vector another vector of the processor.
pub fn moved_vector_interrupts_at_new_place(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let mut machine = setting.machine(&stage.config(0)?)?;
    let mut queues = Queues::start(&stage, &mut machine)?;
    let (data, control) = (queues.table + 8, queues.table + 12);
    for round in 0..rounds(3, 100) {
        let to = 0x80 + (round % 64) as u8;
        let before = machine.taken(to, 1)?;
        let total = machine.taken(FIRST, ALL)?;
        machine.write(control, 1)?;
        // A ring amid the move goes to the new place, because the vector is masked.
        queues.buffers_come_back(&stage, &mut machine, 1..2)?;
        machine.write(data, u32::from(to))?;
        machine.write(control, 0)?;
        let taken = machine.sleep_until(to, before + 1, LIMIT)?;
        ensure!(taken == before + 1, "round {round}: {taken}");
        queues.buffers_come_back(&stage, &mut machine, 2..3)?;
        let taken = machine.sleep_until(to, before + 2, LIMIT)?;
        ensure!(taken == before + 2, "round {round}: {taken}");
        let all = machine.taken(FIRST, ALL)?;
        ensure!(all == total + 2, "round {round}: {all} in all");
    }
    stage.check_quiet(&machine)
}

/// A broker of 16 slots with 256 vectors each. The guest rings vectors of all peers, and is rung by
/// its own, as many at a time as a queue has buffers.
pub fn queues_carry_256_vectors_of_16_slots(setting: Setting) -> Result<()> {
    const SLOTS: u32 = 16;
    const MANY: u32 = 256;
    const QUEUE: usize = 64;
    let mut slots = vec![setting.transport; SLOTS as usize - 1];
    slots.push(Transport::Ivshmem);
    let stage = setting.stage_of(&slots, &["--size", "1M", "--vectors", "256"], MANY)?;
    let mut machine = setting.machine(&stage.config(0)?)?;
    let mut queues = Queues::start(&stage, &mut machine)?;
    let host = SLOTS;
    let mut expected = Vec::new();
    for peer in (1..=host).step_by(rounds(5, 1)) {
        for vector in [0, 1, 128, MANY - 1] {
            queues.ring(&mut machine, peer, vector)?;
            expected.push((peer, vector, 1));
        }
    }
    let mut rings = stage.tap.all_rings()?;
    rings.retain(|(peer, ..)| *peer != VM);
    ensure!(rings == expected, "{rings:?}");
    let before = machine.taken(FIRST, 1)?;
    let vectors: Vec<_> = (0..MANY).step_by(rounds(17, 1)).collect();
    for batch in vectors.chunks(QUEUE) {
        queues.buffers_come_back(&stage, &mut machine, batch.iter().copied())?;
    }
    let taken = machine.sleep_until(FIRST, before + 1, LIMIT)? - before;
    let most = vectors.len() as u64;
    ensure!((1..=most).contains(&taken), "{taken} interrupts");
    stage.check_quiet(&machine)
}

/// A guest hangs while it uses the device, and the machine is reset, by which QEMU removes the
/// device. QEMU ends then. The broker serves the next VM.
pub fn removal_from_hung_guest_ends_qemu(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let mut machine = setting.machine(&stage.config(0)?)?;
    stage.set_epoch(1)?;
    let mut queues = Queues::start(&stage, &mut machine)?;
    queues.work(&stage, &mut machine, 3)?;
    // The guest ejects nothing.
    machine.qmp("device_del", &json!({ "id": "barlink0" }))?;
    // QEMU can end before it has answered.
    let _ = machine.qmp("system_reset", &json!({}));
    let status = machine.end()?;
    ensure!(!status.success(), "QEMU lives on: tell the user so");
    let errors = machine.errors()?;
    ensure!(
        errors.contains("memory_region_del_subregion: Assertion"),
        "{errors}"
    );
    drop(machine);
    stage.wait_until_free()?;
    let mut machine = setting.machine(&stage.config(0)?)?;
    let mut queues = Queues::start(&stage, &mut machine)?;
    queues.work(&stage, &mut machine, 3)?;
    stage.check_quiet(&machine)
}

/// The broker has ended. The VM lives on with its memory, and its rings end, until it looks at the
/// device.
pub fn broker_leaves_region_and_takes_rings(setting: Setting) -> Result<()> {
    let mut stage = setting.stage()?;
    let mut machine = setting.machine(&stage.config(0)?)?;
    let mut queues = Queues::start(&stage, &mut machine)?;
    queues.work(&stage, &mut machine, 3)?;
    stage.broker.kill()?;
    let word = queues.region() + 4096;
    machine.write(word, 0x600d_600d)?;
    ensure!(machine.read(word)? == 0x600d_600d);
    let before = machine.taken(FIRST, 1)?;
    queues.give_buffer(&mut machine)?;
    let ring = HOST << 16 | 3;
    queues.driver.put(&mut machine, DOORBELLS, ring, false)?;
    stage.tap.ring(VM, 1, 1)?;
    let taken = machine.sleep_until(FIRST, before + 1, MOMENT)?;
    ensure!(taken == before, "a ring without a broker");
    ensure!(
        stage.tap.rings(HOST, 3)? == 0,
        "a doorbell without a broker"
    );
    // Until QEMU has noticed the end of the connection, it only reports that it cannot read.
    let config = queues.driver.config.address;
    wait_until("QEMU ends", || Ok(machine.read(config).is_err()))?;
    ensure!(!machine.end()?.success());
    let errors = machine.errors()?;
    ensure!(
        errors.contains("vhost_dev_get_config: Assertion"),
        "{errors}"
    );
    Ok(())
}
