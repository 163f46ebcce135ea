// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Programs in a guest ask whether the broker is alive, and warn if it does not answer.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use barlink_agent::Status;
use barlink_vm::broker::Transport;
use barlink_vm::{COMMAND_TIMEOUT, Vm};
use rustix::process::Signal;

use super::TRANSPORT;
use crate::support::*;

/// A part of the warning.
const SILENT: &str = "the broker has not answered for 10 s";

/// The time for which the broker is stopped, as by a busy host, so that a question is repeated.
/// Over vfio-user a guest that rings waits for the broker, and QEMU gives the device up after five
/// seconds.
const STOPPED: Duration = Duration::from_secs(3);

#[test]
fn programs_warn_only_of_silent_broker() -> Result<()> {
    let (mut broker, vm) = start(TRANSPORT, &[])?;
    let warns = |stderr: Vec<u8>| String::from_utf8_lossy(&stderr).matches(SILENT).count();
    // A broker that answers costs less time than one that is silent, unless the host is busy.
    wait_until("a program ends soon", || {
        let start = Instant::now();
        let info = vm.run(["barlink-guest", "info"])?;
        info.require_success()?;
        ensure!(
            warns(info.stderr) == 0,
            "a warning of a broker that answers"
        );
        Ok(start.elapsed() < Duration::from_secs(8))
    })?;

    // A busy host is no reason for a warning.
    broker.signal(Signal::STOP)?;
    let info = vm.spawn(["barlink-guest", "info"])?;
    thread::sleep(STOPPED);
    broker.signal(Signal::CONT)?;
    let info = info.wait(COMMAND_TIMEOUT)?;
    info.require_success()?;
    ensure!(warns(info.stderr) == 0, "a warning of a slow broker");

    // Sleeps since before the broker is killed, and so asks for the first time after it.
    let sleeper = vm.spawn(["sh", "-c", "exec barlink-guest recv 2>&1"])?;
    wait_for_holder(&broker, "down", "consumer", true)?;
    // Its first question has been answered by then.
    thread::sleep(Duration::from_millis(200));
    broker.kill()?;
    let start = Instant::now();
    let killed = vm.spawn(["barlink-guest", "info"])?;
    let sender = vm.spawn(["barlink-guest", "send"])?;
    // Both ask before there is another broker.
    thread::sleep(Duration::from_millis(500));
    // The new broker has another region.
    broker.start_again()?;
    let replaced = vm.spawn(["barlink-guest", "info"])?;
    // A program that ends sooner than its watch would warn asks before it ends.
    let short = vm.spawn(["barlink-guest", "poke", "text"])?;
    sender.close_stdin()?;
    for info in [killed, replaced] {
        let info = info.wait(COMMAND_TIMEOUT)?;
        info.require_success()?;
        ensure!(warns(info.stderr) == 1, "no warning");
        ensure!(
            start.elapsed() > Duration::from_secs(10),
            "an early warning"
        );
    }
    // No program has the region that the records are in.
    for unread in [short, sender] {
        let unread = unread.wait(COMMAND_TIMEOUT)?;
        ensure!(unread.status == Status::Code(8), "{:?}", unread.status);
        ensure!(warns(unread.stderr) > 0, "no warning");
    }
    // The stream is not ended by the warning.
    sleeper.wait_for(SILENT, COMMAND_TIMEOUT)?;
    ensure!(!sleeper.has_ended());
    sleeper.kill(Signal::KILL)?;
    ensure!(warns(sleeper.wait(COMMAND_TIMEOUT)?.stdout) == 1);
    match TRANSPORT {
        Transport::Ivshmem => removal_ends_a_question(&vm),
        // The device ends with its broker, so the driver cannot be unbound in good order.
        Transport::VfioUser | Transport::VhostUser => Ok(()),
    }
}

/// Unbinds the device while a program waits for an answer that does not come. The program does not
/// touch the device's memory any more, so no signal ends it.
fn removal_ends_a_question(vm: &Vm) -> Result<()> {
    let info = vm.spawn(["barlink-guest", "info"])?;
    info.wait_for("channel", COMMAND_TIMEOUT)?;
    thread::sleep(Duration::from_millis(200));
    ensure!(!info.has_ended());
    vm.run(["sh", "-c", UNBIND])?.require_success()?;
    let start = Instant::now();
    info.wait(COMMAND_TIMEOUT)?.require_success()?;
    ensure!(start.elapsed() < Duration::from_secs(8), "it asked on");
    Ok(())
}
