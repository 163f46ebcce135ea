// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Idle ends sleep until the other side rings them.

use std::io::Write;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlink_vm::COMMAND_TIMEOUT;

use super::TRANSPORT;
use crate::support::*;

/// Counts the sleeps of idle ends, which show whether the other side rings. An end wakes up by a
/// timer, at least once a second, until a ring from the other side has reached it. Afterwards it
/// sleeps until it is rung. An idle end that still wakes up was therefore not rung when records
/// came.
#[test]
fn idle_ends_sleep_until_rung() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let host_receiver = receive(&broker, "up")?;
    let guest_sender = vm.spawn(["barlink-guest", "send"])?;
    let guest_receiver = vm.spawn(["barlink-guest", "recv"])?;
    let mut host_sender = App::start(broker.app(["send"]).stdin(Stdio::piped()))?;
    let mut input = host_sender.stdin.take().context("no input")?;
    wait_for_holder(&broker, "down", "consumer", true)?;
    let guest = holder(&broker, "down", "consumer")?.context("no consumer")?;
    let guest_status = format!("/proc/{guest}/status");
    let host_status = format!("/proc/{}/status", host_receiver.app.id());
    let look = || -> Result<[u64; 2]> {
        let host = std::fs::read_to_string(&host_status)?;
        let guest = vm.run(["cat", &guest_status])?.success()?;
        Ok([sleeps(&host)?, sleeps(&guest)?])
    };
    let mut ticks = 0;
    let mut slept = [false; 2];
    // On a busy machine a receiver may be awake when a record comes, and the sender does not ring
    // an awake receiver. A missing ring shows in every round.
    for _ in 0..10 {
        guest_sender.write(b"tick")?;
        input.write_all(b"tick")?;
        ticks += 1;
        wait_until("all has arrived", || {
            let snapshot = broker.inspect()?;
            let channels = snapshot["channels"].as_array().context("no channels")?;
            Ok(channels.iter().all(|channel| channel["fill"] == 0))
        })?;
        // A guest's end asks for the broker once, after a second of sleep.
        thread::sleep(Duration::from_millis(2500));
        let before = look()?;
        thread::sleep(Duration::from_secs(2));
        let after = look()?;
        slept = [0, 1].map(|end| before[end] == after[end]);
        if slept == [true; 2] {
            break;
        }
    }
    guest_sender.close_stdin()?;
    drop(input);
    guest_sender.wait(COMMAND_TIMEOUT)?.require_success()?;
    ensure!(wait_for_end(&mut host_sender, "the sender")?.success());
    let sent = "tick".repeat(ticks);
    assert_eq!(host_receiver.bytes()?, sent.as_bytes());
    assert_eq!(guest_receiver.wait(COMMAND_TIMEOUT)?.success()?, sent);
    // The checks come last, so that no process is left.
    ensure!(slept[0], "the host app was not rung by the guest");
    ensure!(slept[1], "the guest program was not rung by the host");
    Ok(())
}
