// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Resets of guests with a device over each transport, once or a hundred times, while processes
//! have the devices open and mapped.

use std::time::{Duration, Instant};
use std::{fs, iter, thread};

use anyhow::{Context, Result, anyhow, ensure};
use barlink_driver_checks::complaint;
use barlink_driver_checks::tier::rounds;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::Vm;
use barlink_vm::broker::{Broker, Transport};

use crate::support::*;

/// A channel each way for each slot.
const CHANNELS: [&str; 6] = [
    "--channel=up0=0-host,64K",
    "--channel=down0=host-0,64K",
    "--channel=up1=1-host,64K",
    "--channel=down1=host-1,64K",
    "--channel=up2=2-host,64K",
    "--channel=down2=host-2,64K",
];

/// A shell script that uses each device. It sends a text through each device. Then one process
/// sleeps until records come, one sleeps until there is room, and one maps the device, writes to it
/// and makes calls, again and again. Two of these use a second device node.
const USE: &str = "\
for node in /dev/barlink*; do
    again=/tmp/${node##*/}
    mknod $again c $(tr : ' ' </sys/class/misc/${node##*/}/dev)
    id=$(barlink-guest --device $node info --json | sed -n 's/^  \"slot\": \\(.*\\),/\\1/p')
    echo \"$0 over $id\" | barlink-guest --device $node send --channel up$id || exit
    barlink-guest --device $node recv --channel down$id -o /dev/null &
    barlink-guest --device $again send --channel up$id /dev/zero &
    while barlink-guest --device $again poke $0; do :; done &
done
wait";

/// Returns the number of descriptors that the broker and QEMU have open.
fn descriptors(broker: &Broker) -> Result<[usize; 2]> {
    let slots = &broker.inspect()?["broker"]["slots"];
    let qemu = slots[0]["vm"]["pid"].as_u64().context("no VM")?;
    let broker = broker.process().into();
    // The broker sleeps once it has closed the connections of the apps that have ended.
    wait_until("the broker sleeps", || is_asleep(broker))?;
    let count = |process: u64| -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{process}/fd"))?.count())
    };
    Ok([count(broker)?, count(qemu)?])
}

/// Returns whether all threads of a process sleep.
fn is_asleep(process: u64) -> Result<bool> {
    for thread in fs::read_dir(format!("/proc/{process}/task"))? {
        // A thread may end meanwhile.
        let status = fs::read_to_string(thread?.path().join("status"));
        if !status.is_ok_and(|status| status.contains("State:\tS")) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Returns whether the guest holds its end of each channel, and each channel to the host is more
/// than half full.
fn all_are_used(broker: &Broker) -> Result<bool> {
    let snapshot = broker.inspect()?;
    let channels = snapshot["channels"].as_array().context("no channels")?;
    Ok(channels.iter().all(|channel| {
        let goes_up = channel["name"]
            .as_str()
            .is_some_and(|name| name.starts_with("up"));
        match goes_up {
            true => channel["producer"].is_u64() && channel["fill"].as_u64() > Some(32 << 10),
            false => channel["consumer"].is_u64(),
        }
    }))
}

/// Runs one round, from the loading of the driver to the reset.
fn round(number: u32, broker: &Broker, vm: &Vm) -> Result<()> {
    load(vm)?;
    let channels = ["up0", "up1", "up2"];
    for channel in channels {
        broker.run(["reset-channel", channel])?;
    }
    let receivers = channels.map(|channel| receive(broker, channel));
    let text = format!("round-{number}");
    let _users = vm.spawn(["sh", "-c", USE, &text])?;
    for (receiver, slot) in iter::zip(receivers, 0..) {
        let bytes = receiver?.bytes()?;
        ensure!(bytes == format!("{text} over {slot}\n").as_bytes());
    }
    wait_until("all are used", || all_are_used(broker))?;
    // The reset comes at another moment of the processes' work in each of ten rounds.
    thread::sleep(Duration::from_millis(u64::from(number % 10) * 5));
    vm.reset()?;
    let complaint = complaint(&vm.console_log());
    ensure!(complaint.is_empty(), "the kernel complains:\n{complaint}");
    Ok(())
}

/// Resets a guest this many times.
fn reset(rounds: u32) -> Result<()> {
    let broker = Broker::start_over(Artifacts::shared()?, &Transport::ALL, &CHANNELS)?;
    let vm = Vm::restore(&broker.vm()?)?;
    let mut fewest = [usize::MAX; 2];
    for number in 0..rounds {
        round(number, &broker, &vm).with_context(|| format!("round {number}"))?;
        // QEMU may still have to close some descriptors.
        wait_until("no more descriptors than after the round before", || {
            let now = descriptors(&broker)?;
            let is_settled = iter::zip(now, fewest).all(|(now, before)| now <= before);
            if is_settled {
                fewest = now;
            }
            Ok(is_settled)
        })?;
    }
    Ok(())
}

#[test]
fn guests_survive_resets_with_devices_in_use() -> Result<()> {
    let start = Instant::now();
    // Two guests run side by side, because most of a boot keeps one processor busy.
    let guests = rounds(&[1][..], &[50, 50]);
    thread::scope(|scope| {
        let resets: Vec<_> = guests
            .iter()
            .map(|rounds| scope.spawn(move || reset(*rounds)))
            .collect();
        for reset in resets {
            reset.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        println!(
            "{} resets in {} s",
            guests.iter().sum::<u32>(),
            start.elapsed().as_secs()
        );
        Ok(())
    })
}
