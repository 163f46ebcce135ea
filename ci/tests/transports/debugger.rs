// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A debugger at a program that has mapped the region without the driver.

use anyhow::{Context, Result, ensure};
use barlink_driver_checks::{DEBUG, Seen};
use barlink_protocol::wire::layout::{FIRST_FREE, MAGIC};
use barlink_vm::Vm;
use barlink_vm::broker::Broker;

use crate::support::*;

/// Attaches a debugger to the program that receives `down`, at a word of the superblock and at the
/// first word of the raw window. Writes `word` to both. `file` is the start of the name of the
/// mapped file.
pub fn debug(broker: &Broker, vm: &Vm, file: &str, word: u64) -> Result<[Seen; 2]> {
    let process = holder(broker, "down", "consumer")?.context("no consumer")?;
    let maps = vm
        .run(["cat", &format!("/proc/{process}/maps")])?
        .success()?;
    let region = broker.inspect()?["region"].clone();
    let window = region["raw_offset"].as_u64().context("no window")?;
    ensure!(window > FIRST_FREE, "{region}");
    let areas: Vec<_> = maps
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (start, end) = words.next()?.split_once('-')?;
            let number = |text| u64::from_str_radix(text, 16).ok();
            let (access, name) = (words.next()?, words.nth(3)?);
            let is_wanted = name.rsplit('/').next()?.starts_with(file);
            is_wanted.then_some((number(start)?, number(end)?, access))
        })
        .collect();
    // The program may only read the first pages of its mapping, and writes behind them.
    let start = areas.iter().find_map(|(start, end, access)| {
        let follows = areas.iter().any(|next| (next.0, next.2) == (*end, "rw-s"));
        (follows && *access == "r--s" && end - start == FIRST_FREE).then_some(*start)
    });
    let start = start.with_context(|| format!("{file} is not mapped: {maps}"))?;
    let places = [start, start + window];
    let [superblock, raw] = places.map(|address| -> Result<Seen> {
        let numbers = [process, address, word].map(|number| number.to_string());
        let [process, address, word] = numbers;
        let words = ["barlink-driver-checks", DEBUG, &process, &address, &word];
        Ok(serde_json::from_str(&vm.run(words)?.success()?)?)
    });
    Ok([superblock?, raw?])
}

/// Checks that a debugger reads the region by sysfs, writes where the program may write, and that
/// `process_vm_readv` fails, as with the driver.
pub fn debugger_reads_and_writes(broker: &Broker, vm: &Vm) -> Result<()> {
    let [before, word] = [*b"of host ", *b"debugger"];
    broker.run(["poke", std::str::from_utf8(&before)?])?;
    let receiver = vm.spawn(["barlink-guest", "recv", "--device", "control"])?;
    wait_for_holder(broker, "down", "consumer", true)?;
    let [superblock, raw] = debug(broker, vm, "resource2", u64::from_le_bytes(word))?;
    let failed = |name: &str| name.to_owned();
    let seen = Seen {
        read: Ok(MAGIC),
        written: Err(failed("EIO")),
        read_again: Ok(MAGIC),
        copied: Err(failed("EFAULT")),
    };
    ensure!(superblock == seen, "{superblock:?}");
    let seen = Seen {
        read: Ok(u64::from_le_bytes(before)),
        written: Ok(()),
        read_again: Ok(u64::from_le_bytes(word)),
        copied: Err(failed("EFAULT")),
    };
    ensure!(raw == seen, "{raw:?}");
    ensure!(broker.run(["peek", "--raw", "--length", "8"])? == word);
    goes_on(broker, &receiver)
}

/// Checks that no debugger reaches the region by VFIO.
pub fn debugger_is_refused(broker: &Broker, vm: &Vm) -> Result<()> {
    let receiver = vm.spawn(["barlink-guest", "recv", "--device", "control"])?;
    wait_for_holder(broker, "down", "consumer", true)?;
    for seen in debug(broker, vm, "", 7)? {
        let failed = || Err("EIO".to_owned());
        let refused = Seen {
            read: failed(),
            written: Err("EIO".to_owned()),
            read_again: failed(),
            copied: Err("EFAULT".to_owned()),
        };
        ensure!(seen == refused, "{seen:?}");
    }
    goes_on(broker, &receiver)
}

/// Checks that the program that was debugged receives.
fn goes_on(broker: &Broker, receiver: &barlink_vm::Process) -> Result<()> {
    let path = broker.folder().join("to-send");
    std::fs::write(&path, b"after")?;
    let mut send = broker.app(["send"]);
    let sent = barlink_vm_tests::run(send.arg(&path), "the sender")?;
    ensure!(sent.status.success(), "{sent:?}");
    let received = receiver.wait(barlink_vm::COMMAND_TIMEOUT)?.success()?;
    ensure!(received == "after", "{received}");
    Ok(())
}
