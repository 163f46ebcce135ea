// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Doorbells by the register and interrupts by MSI-X, over the transports that have them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlink_driver_checks::tier::rounds;
use barlink_sandbox::tools::Accel;
use barlink_vm::Bare;
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::tap::Tap;
use barlink_vm_tests::wait_until;
use serde_json::json;

use crate::stage::{
    ALL, Device, FIRST, HOST, LIMIT, OTHER, Setting, Stage, VECTORS, VM, wait_for_rings,
};

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
    stage.check_quiet(&machine)
}

pub fn interrupts_are_counted_exactly(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let (mut machine, device) = stage.machine()?;
    device.enable(&mut machine)?;
    let times = rounds(20, 2_000);
    stage.interrupts_come(&mut machine, times)?;
    let all = machine.taken(FIRST, ALL)?;
    ensure!(all == times * u64::from(VECTORS), "{all} interrupts");
    stage.check_quiet(&machine)
}

/// Rings for vectors that cannot interrupt are kept, and become one interrupt each later.
pub fn masked_vectors_keep_their_rings(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let (mut machine, device) = stage.machine()?;
    device.enable(&mut machine)?;
    stage.interrupts_come(&mut machine, 1)?;
    let vector = FIRST + 2;
    for round in 1..=rounds(5, 100) {
        let before = machine.taken(vector, 1)?;
        machine.write(device.vector_control(2), 1)?;
        for _ in 0..3 {
            stage.tap.ring(VM, 2, 1)?;
        }
        // An interrupt by another vector shows that the rings have been handled.
        stage.interrupts_come_by(&mut machine, 1, 2)?;
        ensure!(machine.taken(vector, 1)? == before, "masked, round {round}");
        machine.write(device.vector_control(2), 0)?;
        let taken = machine.sleep_until(vector, before + 1, LIMIT)?;
        ensure!(taken == before + 1, "unmasked, round {round}: {taken}");

        // The same with all vectors masked.
        device.set_msix(&mut machine, true, true)?;
        for _ in 0..3 {
            stage.tap.ring(VM, 2, 1)?;
        }
        wait_for_rings(&mut machine, device.pci.bars[0].0)?;
        let taken = machine.sleep_until(vector, before + 2, MOMENT)?;
        ensure!(taken == before + 1, "all masked, round {round}");
        device.set_msix(&mut machine, true, false)?;
        let taken = machine.sleep_until(vector, before + 2, LIMIT)?;
        ensure!(taken == before + 2, "all unmasked, round {round}: {taken}");
    }
    stage.interrupts_come(&mut machine, 2)?;
    stage.check_quiet(&machine)
}

/// Rings while MSI-X is off become one interrupt when it is on again, except over ivshmem under
/// TCG, where QEMU drops them. Later rings come always.
pub fn disabled_interrupts_come_back(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let (mut machine, device) = stage.machine()?;
    device.enable(&mut machine)?;
    let drops = setting.transport == Transport::Ivshmem && setting.accel == Accel::Tcg;
    let vector = FIRST + 3;
    for round in 1..=rounds(5, 30) {
        let before = machine.taken(vector, 1)?;
        device.set_msix(&mut machine, false, false)?;
        stage.tap.ring(VM, 3, 2)?;
        wait_for_rings(&mut machine, device.pci.bars[0].0)?;
        let taken = machine.sleep_until(vector, before + 1, MOMENT)?;
        ensure!(taken == before, "{taken} interrupts while they are off");
        // Linux masks all vectors while it sets them up.
        device.set_msix(&mut machine, true, true)?;
        machine.set_vectors(device.pci.bars[1].0, VECTORS, FIRST, VECTORS as u8)?;
        device.set_msix(&mut machine, true, false)?;
        let expected = before + u64::from(!drops);
        machine.sleep_until(vector, expected, LIMIT)?;
        let taken = machine.sleep_until(vector, expected + 1, MOMENT)?;
        ensure!(taken == expected, "round {round}: {taken}, not {expected}");
        stage.interrupts_come(&mut machine, 2)?;
    }
    stage.check_quiet(&machine)
}

/// The guest gives a vector of the device another vector of the processor.
pub fn moved_vectors_interrupt_at_new_place(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let (mut machine, device) = stage.machine()?;
    device.enable(&mut machine)?;
    let control = device.vector_control(1);
    let data = control - 4;
    stage.tap.ring(VM, 1, 1)?;
    ensure!(machine.sleep_until(FIRST + 1, 1, LIMIT)? == 1);
    for round in 0..rounds(8, 100) {
        let to = 0x80 + (round % 64) as u8;
        let before = machine.taken(to, 1)?;
        let total = machine.taken(FIRST, ALL)?;
        machine.write(control, 1)?;
        // A ring amid the move goes to the new place, because the vector is masked.
        stage.tap.ring(VM, 1, 1)?;
        machine.write(data, u32::from(to))?;
        machine.write(control, 0)?;
        let taken = machine.sleep_until(to, before + 1, LIMIT)?;
        ensure!(taken == before + 1, "round {round}: {taken}");
        stage.tap.ring(VM, 1, 1)?;
        let taken = machine.sleep_until(to, before + 2, LIMIT)?;
        ensure!(taken == before + 2, "round {round}: {taken}");
        let all = machine.taken(FIRST, ALL)?;
        ensure!(all == total + 2, "round {round}: {all} in all");
    }
    stage.check_quiet(&machine)
}

/// Each interrupt is answered by a doorbell, and each doorbell by a ring.
pub fn lock_step_loses_nothing(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let (mut machine, device) = stage.machine()?;
    device.enable(&mut machine)?;
    stage.tap.all_rings()?;
    machine.echo(FIRST + 1, device.doorbell(), HOST << 16 | 3)?;
    let times = rounds(500, 100_000);
    for round in 0..times {
        stage.tap.ring(VM, 1, 1)?;
        let rings = stage.tap.wait(HOST, 3, LIMIT)?;
        ensure!(rings == 1, "{rings} rings in round {round}");
    }
    machine.echo(0, 0, 0)?;
    ensure!(machine.taken(FIRST + 1, 1)? == times);
    // No program reads the VM's eventfds over vfio-user.
    let mut rings = stage.tap.all_rings()?;
    rings.retain(|(peer, ..)| *peer != VM);
    ensure!(rings.is_empty(), "{rings:?}");
    stage.check_quiet(&machine)
}

/// A thread of the host that rings a vector of the VM, until this is dropped.
pub struct Storm<'a> {
    stop: &'a Stop,
}

/// The order to stop, and the count of rings so far.
#[derive(Default)]
pub struct Stop {
    stop: AtomicBool,
    rung: AtomicU64,
}

impl<'a> Storm<'a> {
    /// Starts the thread, which rings vector 1, and pauses for a moment after each ring.
    pub fn start<'scope>(
        scope: &'scope thread::Scope<'scope, 'a>,
        tap: &'a Tap,
        stop: &'a Stop,
    ) -> Self {
        scope.spawn(move || {
            while !stop.stop.load(Ordering::Relaxed) && tap.ring(VM, 1, 1).is_ok() {
                stop.rung.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_micros(20));
            }
        });
        Storm { stop }
    }
}

impl Drop for Storm<'_> {
    fn drop(&mut self) {
        self.stop.stop.store(true, Ordering::Relaxed);
    }
}

/// Both sides ring, the guest without a pause, and the host with a pause of 20 µs after each ring.
/// No doorbell is lost or repeated. Interrupts can merge, but the last one comes.
pub fn storms_both_ways_lose_nothing(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let (mut machine, device) = stage.machine()?;
    device.enable(&mut machine)?;
    stage.tap.all_rings()?;
    let times = rounds(3_000, 300_000);
    let stop = Stop::default();
    thread::scope(|scope| {
        let _storm = Storm::start(scope, &stage.tap, &stop);
        machine.repeat(device.doorbell(), HOST << 16 | 2, times / 3)?;
        // The guest masks and unmasks the vector that is rung.
        machine.toggle(device.vector_control(1), rounds(100, 10_000))?;
        machine.repeat(device.doorbell(), HOST << 16 | 2, times - times / 3)
    })?;
    let rings = stage.tap.rings(HOST, 2)?;
    ensure!(rings == times, "{rings} of {times} doorbells");
    settle(&stage, &mut machine)?;
    let rung = stop.rung.load(Ordering::Relaxed);
    let taken = machine.taken(FIRST + 1, 1)?;
    println!("{rung} rings, {taken} interrupts");
    ensure!(taken > 0 && taken <= rung, "{taken} of {rung} rings");
    stage.interrupts_come(&mut machine, 2)?;
    stage.check_quiet(&machine)
}

/// Time in which an interrupt comes that is not held back.
pub const MOMENT: Duration = Duration::from_millis(50);

/// Resets the machine after its boot `boot`, in odd ones by the operator and in even ones by the
/// guest, and waits until it has booted again.
pub fn reset(machine: &mut Bare, boot: usize) -> Result<()> {
    if boot.is_multiple_of(2) {
        return machine.reset_by_port(boot + 1);
    }
    machine.qmp("system_reset", &json!({}))?;
    machine.wait_for_firmware(boot + 1)
}

/// Waits until the rings of a [`Storm`] have been handled: by an interrupt of vector 2, and until
/// no more come.
pub fn settle(stage: &Stage, machine: &mut Bare) -> Result<()> {
    stage.interrupts_come_by(machine, 2, 1)?;
    let mut last = machine.taken(FIRST, VECTORS)?;
    loop {
        machine.sleep_until(0xfe, 1, Duration::from_millis(30))?;
        let now = machine.taken(FIRST, VECTORS)?;
        if now == last {
            return Ok(());
        }
        last = now;
    }
}

/// Checks that a storm's rings became interrupts, no more than there were rings. `before` counts
/// those of earlier rings.
fn check_storm(stage: &Stage, machine: &mut Bare, stop: &Stop, before: u64) -> Result<()> {
    settle(stage, machine)?;
    let rung = stop.rung.load(Ordering::Relaxed);
    let taken = machine.taken(FIRST + 1, 1)? - before;
    ensure!(taken > 0 && taken <= rung, "{taken} of {rung} rings");
    Ok(())
}

/// A stopped VM gets the rings of that time when it continues.
pub fn paused_vm_gets_its_rings_later(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let (mut machine, device) = stage.machine()?;
    device.enable(&mut machine)?;
    stage.interrupts_come(&mut machine, 1)?;
    for round in 1..=rounds(3, 20) {
        let before = machine.taken(FIRST, VECTORS)?;
        machine.qmp("stop", &json!({}))?;
        for vector in 0..VECTORS {
            stage.tap.ring(VM, vector, 1)?;
        }
        machine.qmp("cont", &json!({}))?;
        let expected = before + u64::from(VECTORS);
        wait_until("all interrupts come", || {
            Ok(machine.taken(FIRST, VECTORS)? >= expected)
        })?;
        settle(&stage, &mut machine)?;
        let taken = machine.taken(FIRST, VECTORS)? - 1;
        ensure!(taken == expected, "round {round}: {taken}, not {expected}");
    }
    stage.check_quiet(&machine)
}

/// The operator resets the machine while host and guest ring, and the guest while the host rings.
pub fn resets_amid_rings_do_no_harm(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let (mut machine, mut device) = stage.machine()?;
    for round in 1..=rounds(3, 15) {
        device.enable(&mut machine)?;
        let stop = Stop::default();
        thread::scope(|scope| {
            let _storm = Storm::start(scope, &stage.tap, &stop);
            if round % 2 == 1 {
                machine.begin_repeat(device.doorbell(), HOST << 16 | 4, 10_000_000)?;
                // The broker rings vector 0 alone.
                wait_until("the guest rings", || Ok(stage.tap.rings(HOST, 4)? > 0))?;
            }
            reset(&mut machine, round)
        })?;
        device = Device::find(&mut machine, "barlink0")?;
        device.enable(&mut machine)?;
        settle(&stage, &mut machine)?;
        stage.interrupts_come(&mut machine, 3)?;
        stage.tap.all_rings()?;
        machine.repeat(device.doorbell(), HOST << 16 | 4, 50)?;
        let rings = stage.tap.all_rings()?;
        ensure!(rings == [(HOST, 4, 50)], "round {round}: {rings:?}");
    }
    stage.check_quiet(&machine)
}

/// QEMU is killed while both sides ring. The next QEMU in the slot gets exactly its own interrupts.
pub fn killed_qemu_leaves_nothing_behind(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    for round in 1..=rounds(3, 20) {
        let (mut machine, device) = stage.machine()?;
        device.enable(&mut machine)?;
        stage.interrupts_come(&mut machine, 3)?;
        let all = machine.taken(FIRST, ALL)?;
        ensure!(all == 3 * u64::from(VECTORS), "round {round}: {all}");
        stage.tap.all_rings()?;
        machine.repeat(device.doorbell(), HOST << 16 | 4, 50)?;
        let rings = stage.tap.all_rings()?;
        ensure!(rings == [(HOST, 4, 50)], "round {round}: {rings:?}");
        stage.hold_from_second_round(round)?;
        let stop = Stop::default();
        thread::scope(|scope| {
            let _storm = Storm::start(scope, &stage.tap, &stop);
            machine.begin_repeat(device.doorbell(), HOST << 16 | 4, 10_000_000)?;
            // The broker rings vector 0 alone.
            wait_until("the guest rings", || Ok(stage.tap.rings(HOST, 4)? > 0))?;
            drop(machine);
            Ok::<_, anyhow::Error>(())
        })?;
        stage.wait_until_free()?;
    }
    Ok(())
}

/// The side that rings while its broker changes.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Amid {
    Both,
    /// The host alone. The guest rings afterwards.
    Host,
}

/// Changes the broker while a side rings, and checks that no ring is lost.
fn ring_amid(
    stage: &mut Stage,
    machine: &mut Bare,
    device: &Device,
    amid: Amid,
    change: impl FnOnce(&mut Broker) -> Result<()>,
) -> Result<()> {
    let times = rounds(1_500, 20_000);
    stage.interrupts_come(machine, 2)?;
    stage.tap.rings(HOST, 3)?;
    let before = machine.taken(FIRST + 1, 1)?;
    let stop = Stop::default();
    let (tap, broker) = (&stage.tap, &mut stage.broker);
    thread::scope(|scope| {
        let _storm = Storm::start(scope, tap, &stop);
        if amid == Amid::Host {
            change(broker)?;
            return machine.repeat(device.doorbell(), HOST << 16 | 3, times);
        }
        machine.begin_repeat(device.doorbell(), HOST << 16 | 3, times)?;
        change(broker)?;
        machine.finish().map(drop)
    })?;
    check_storm(stage, machine, &stop, before)?;
    // A broker that starts rings vector 0 of all peers, and no other one.
    let rings = stage.tap.rings(HOST, 3)?;
    ensure!(rings == times, "{rings} of {times}");
    Ok(())
}

/// The broker is replaced while both sides ring.
pub fn replaced_broker_loses_no_ring(setting: Setting) -> Result<()> {
    let mut stage = setting.stage()?;
    let (mut machine, device) = stage.machine()?;
    device.enable(&mut machine)?;
    for _ in 0..rounds(2, 5) {
        ring_amid(&mut stage, &mut machine, &device, Amid::Both, |broker| {
            broker.replace()
        })?;
    }
    stage.interrupts_come(&mut machine, 2)?;
    stage.check_quiet(&machine)
}

/// The broker is killed, and its service manager starts it again. Over vfio-user a message that is
/// under way then costs five seconds (`ci/tests/vfio_user/under_way.rs`), so the guest rings only
/// before and after. The host rings meanwhile.
pub fn killed_broker_comes_back_unnoticed(setting: Setting) -> Result<()> {
    let mut stage = setting.managed_stage()?;
    let (mut machine, device) = stage.machine()?;
    device.enable(&mut machine)?;
    let amid = match setting.transport {
        Transport::Ivshmem => Amid::Both,
        _ => Amid::Host,
    };
    for _ in 0..rounds(2, 10) {
        ring_amid(&mut stage, &mut machine, &device, amid, |broker| {
            broker.kill()?;
            broker.start_again()
        })?;
    }
    stage.interrupts_come(&mut machine, 2)?;
    stage.check_quiet(&machine)
}

/// The broker has ended, and no broker replaces it: over ivshmem rings go on.
pub fn rings_outlive_their_broker(setting: Setting) -> Result<()> {
    let mut stage = setting.stage()?;
    let (mut machine, device) = stage.machine()?;
    device.enable(&mut machine)?;
    stage.broker.kill()?;
    stage.interrupts_come(&mut machine, 3)?;
    stage.tap.rings(HOST, 3)?;
    machine.repeat(device.doorbell(), HOST << 16 | 3, 100)?;
    ensure!(stage.tap.rings(HOST, 3)? == 100);
    stage.check_quiet(&machine)
}

/// Two VMs ring each other.
pub fn vms_ring_each_other(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let (mut first, one) = stage.machine()?;
    let mut second = setting.machine(&stage.config(OTHER as usize)?)?;
    let other = Device::find(&mut second, "barlink1")?;
    one.enable(&mut first)?;
    other.enable(&mut second)?;
    for round in 1..=rounds(10, 500) {
        first.write(one.doorbell(), OTHER << 16 | 2)?;
        ensure!(second.sleep_until(FIRST + 2, round, LIMIT)? == round);
        second.write(other.doorbell(), VM << 16 | 3)?;
        ensure!(first.sleep_until(FIRST + 3, round, LIMIT)? == round);
    }
    // Each answers the other's ring, so that one ring goes to and fro.
    first.echo(FIRST + 1, one.doorbell(), OTHER << 16 | 1)?;
    second.echo(FIRST + 1, other.doorbell(), VM << 16 | 1)?;
    first.write(one.doorbell(), OTHER << 16 | 1)?;
    let times = rounds(100, 10_000);
    wait_until("the ring goes to and fro", || {
        Ok(first.taken(FIRST + 1, 1)? >= times)
    })?;
    first.echo(0, 0, 0)?;
    // The first ring was an order, and the last one of the second VM was not answered.
    let mut counts = [0; 2];
    let equal = wait_until("both VMs have taken as many interrupts", || {
        let count = first.sleep_until(FIRST + 1, u64::MAX, MOMENT)?;
        counts = [count, second.taken(FIRST + 1, 1)?];
        Ok(counts[0] == counts[1])
    });
    equal.with_context(|| format!("{} one way, {} the other way", counts[0], counts[1]))?;
    // The broker has rung vector 0 of the host, because the VMs have come.
    let mut rings = stage.tap.all_rings()?;
    rings.retain(|(peer, vector, _)| *peer == HOST && *vector != 0);
    ensure!(rings.is_empty(), "{rings:?}");
    stage.check_quiet(&first)?;
    stage.check_quiet(&second)
}

/// A broker of 16 slots with 256 vectors each. The guest rings all of them, and gets all of its
/// own.
pub fn sixteen_slots_of_256_vectors_work(setting: Setting) -> Result<()> {
    const SLOTS: u32 = 16;
    const MANY: u32 = 256;
    let mut slots = vec![setting.transport; SLOTS as usize - 1];
    slots.push(Transport::Ivshmem);
    let stage = setting.stage_of(&slots, &["--size", "1M", "--vectors", "256"], MANY)?;
    let (mut machine, device) = stage.machine()?;
    stage.tap.all_rings()?;
    let host = SLOTS;
    let mut expected = Vec::new();
    for peer in (1..=host).step_by(rounds(5, 1)) {
        for vector in [0, 1, 128, MANY - 1] {
            machine.write(device.doorbell(), peer << 16 | vector)?;
            expected.push((peer, vector, 1));
        }
    }
    ensure!(stage.tap.all_rings()? == expected);
    // The processor has fewer vectors than the device, so several of the device's share one.
    const SPAN: u8 = 64;
    machine.write(device.pci.config + 4, 6)?;
    machine.set_vectors(device.pci.bars[1].0, MANY, FIRST, SPAN)?;
    device.set_msix(&mut machine, true, false)?;
    for batch in 0..MANY / u32::from(SPAN) {
        for vector in 0..u32::from(SPAN) {
            stage.tap.ring(VM, batch * u32::from(SPAN) + vector, 1)?;
        }
        let each = u64::from(batch) + 1;
        let all = each * u64::from(SPAN);
        wait_until("all interrupts of the batch come", || {
            Ok(machine.taken(FIRST, SPAN.into())? >= all)
        })?;
        for vector in [FIRST, FIRST + 31, FIRST + SPAN - 1] {
            let taken = machine.taken(vector, 1)?;
            ensure!(taken == each, "{taken} interrupts, not {each}");
        }
    }
    let taken = machine.taken(FIRST, SPAN.into())?;
    ensure!(taken == u64::from(MANY), "{taken} interrupts");
    stage.check_quiet(&machine)
}
