// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Scenes with the bare guest, whose processor uses barlink's device as a driver would, under TCG
//! and under KVM.
//!
//! Under KVM the kernel itself takes the guest's doorbells and injects its interrupts, so a scene
//! under TCG proves nothing about KVM. Where a probe shows that the bare guest does not run under
//! KVM, those scenes count as skipped, and `cargo xtask test` prints the reason.

#[path = "../vhost_user/driver.rs"]
#[expect(dead_code, reason = "the qtest tests use more of it")]
mod driver;
#[path = "../executors.rs"]
#[expect(dead_code, reason = "the scenes have a harness of their own")]
mod executors;
mod library;
mod queues;
mod registers;
mod stage;
mod unplug;

use std::process::ExitCode;

use anyhow::Result;
use barlink_sandbox::tools::Accel;
use barlink_vm::broker::Transport;
use libtest_mimic::{Arguments, Trial};

use self::executors::leaves_kvm_out;
use self::stage::Setting;

/// A scene: its name, the transports over which it is played, and the function.
type Scene = (
    &'static str,
    &'static [Transport],
    fn(Setting) -> Result<()>,
);

const IVSHMEM: &[Transport] = &[Transport::Ivshmem];
const VHOST_USER: &[Transport] = &[Transport::VhostUser];
/// The transports whose device has a doorbell register and an MSI-X table.
const REGISTERS: &[Transport] = &[Transport::Ivshmem, Transport::VfioUser];

/// Makes a scene whose name is that of its function.
macro_rules! scene {
    ($transports:expr, $module:ident::$name:ident) => {
        (stringify!($name), $transports, $module::$name)
    };
}

const SCENES: &[Scene] = &[
    scene!(REGISTERS, registers::doorbells_are_counted_exactly),
    scene!(REGISTERS, registers::interrupts_are_counted_exactly),
    scene!(REGISTERS, registers::masked_vectors_keep_their_rings),
    scene!(REGISTERS, registers::disabled_interrupts_come_back),
    scene!(REGISTERS, registers::moved_vectors_interrupt_at_new_place),
    scene!(REGISTERS, registers::lock_step_loses_nothing),
    scene!(REGISTERS, registers::storms_both_ways_lose_nothing),
    scene!(REGISTERS, registers::paused_vm_gets_its_rings_later),
    scene!(REGISTERS, registers::resets_amid_rings_do_no_harm),
    scene!(REGISTERS, registers::killed_qemu_leaves_nothing_behind),
    scene!(REGISTERS, registers::replaced_broker_loses_no_ring),
    scene!(REGISTERS, registers::killed_broker_comes_back_unnoticed),
    scene!(REGISTERS, registers::vms_ring_each_other),
    scene!(REGISTERS, registers::sixteen_slots_of_256_vectors_work),
    scene!(IVSHMEM, registers::rings_outlive_their_broker),
    scene!(VHOST_USER, queues::queues_count_exactly),
    scene!(VHOST_USER, queues::storm_fills_all_buffers),
    scene!(VHOST_USER, queues::queues_work_after_resets_amid_rings),
    scene!(VHOST_USER, queues::killed_qemu_leaves_queues_usable),
    scene!(VHOST_USER, queues::vm_rings_vm_over_ivshmem),
    scene!(VHOST_USER, queues::queues_work_after_unplugging),
    scene!(VHOST_USER, queues::masked_vector_keeps_its_interrupt),
    scene!(VHOST_USER, queues::moved_vector_interrupts_at_new_place),
    scene!(VHOST_USER, queues::queues_carry_256_vectors_of_16_slots),
    scene!(VHOST_USER, queues::removal_from_hung_guest_ends_qemu),
    scene!(VHOST_USER, queues::broker_leaves_region_and_takes_rings),
    scene!(&Transport::ALL, library::sent_record_wakes_sleeping_guest),
    scene!(
        &Transport::ALL,
        library::record_of_guest_wakes_sleeping_program
    ),
    scene!(IVSHMEM, unplug::device_that_left_in_order_comes_back),
    scene!(IVSHMEM, unplug::device_of_hung_guest_keeps_its_slot),
];

/// Scenes that are played under TCG alone.
const TCG_SCENES: &[Scene] = &[scene!(IVSHMEM, unplug::replug_after_hung_guest_ends_qemu)];

/// Scenes that are played under KVM alone.
const KVM_SCENES: &[Scene] = &[scene!(IVSHMEM, unplug::device_without_driver_comes_back)];

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let no_kvm = leaves_kvm_out(&arguments);
    let mut trials = Vec::new();
    for accel in [Accel::Tcg, Accel::Kvm] {
        let more = match accel {
            Accel::Tcg => TCG_SCENES,
            Accel::Kvm => KVM_SCENES,
        };
        for (scene, transports, play) in SCENES.iter().chain(more) {
            for transport in *transports {
                let setting = Setting {
                    transport: *transport,
                    accel,
                };
                let title = format!("{}::{scene}", setting.module());
                let trial = Trial::test(title, move || {
                    play(setting).map_err(|error| format!("{error:#}").into())
                });
                trials.push(trial.with_ignored_flag(accel == Accel::Kvm && no_kvm));
            }
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}
