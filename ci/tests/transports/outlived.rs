// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Senders in a guest that live while the PCI function of their device is reset, or while their VM
//! is stopped. The host receives no record again, and the error of a sender that ends names the
//! cause. `channels.rs` shows the same for a suspend, and `unplugged.rs` for a device that is
//! unplugged.

use std::fs;

use anyhow::{Context, Result, ensure};
use barlink_vm::broker::Transport;
use rustix::process::{Pid, Signal, kill_process};

use super::TRANSPORT;
use crate::support::*;

/// A shell command that resets the PCI function of the first device. It prints a command that binds
/// the device to the driver anew.
const RESET_FUNCTION: &str = "\
cd -P /sys/class/misc/barlink0/device && name=${PWD##*/} && \
echo \"cd $(readlink -f driver) && echo $name >unbind && echo $name >bind\" && \
if [ ! -e reset ]; then cd ..; fi && \
echo 1 >reset";

#[test]
fn function_reset_repeats_no_record() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let sender = LivingSender::start(&broker, &vm)?;
    let rebind = vm.run(["sh", "-c", RESET_FUNCTION])?.success()?;
    if TRANSPORT == Transport::VhostUser {
        // Region and queues go with the reset. The driver has taken the mappings away before, so
        // that no force is needed.
        sender.ends_with("the device is gone")?;
        broker.run(["reset-channel", "up"])?;
    } else {
        sender.keeps_its_end()?;
        sender.sends_on()?;
        sender.ends_by_force()?;
    }
    vm.run(["sh", "-c", rebind.trim_end()])?.require_success()?;
    sends_anew(&broker, &vm)?;
    let log = vm.run(["dmesg"])?.success()?;
    ensure!(!log.contains("Call Trace"), "{log}");
    Ok(())
}

/// A debugger, a frozen cgroup or swap stops QEMU within any instruction of a sender.
#[test]
fn stopped_vm_repeats_no_record() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let sender = LivingSender::start(&broker, &vm)?;
    let pid = broker.inspect()?["broker"]["slots"][0]["vm"]["pid"].as_i64();
    let pid = pid.and_then(|pid| Pid::from_raw(pid as i32));
    let qemu = pid.context("no VM")?;
    kill_process(qemu, Signal::STOP)?;
    wait_until("QEMU stands still", || stands_still(qemu))?;
    sender.keeps_its_end()?;
    broker.run(["reset-channel", "up", "--force"])?;
    kill_process(qemu, Signal::CONT)?;
    sender.ends_with("the channel was reset")?;
    sends_anew(&broker, &vm)
}

/// Returns whether all threads of a process are stopped.
fn stands_still(process: Pid) -> Result<bool> {
    for thread in fs::read_dir(format!("/proc/{process}/task"))? {
        // A thread may end meanwhile.
        let status = fs::read_to_string(thread?.path().join("status"));
        if status.is_ok_and(|status| !status.contains("State:\tT")) {
            return Ok(false);
        }
    }
    Ok(true)
}
