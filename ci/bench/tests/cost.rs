// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The cost of a record on the host, counted in instructions: no system call, no atomic
//! read-modify-write, and at most a given number of instructions. A tap that does not run adds
//! none. The memory is this process's own; the code is the same as in host apps. Allocations are
//! not counted, because `barlink-protocol` has no allocator.
//!
//! Reading the clock is not counted. It executes code of the kernel (its vDSO), which differs by
//! machine. The vDSO also repeats its work whenever the kernel updates the clock meanwhile, which
//! happens often while single steps are slow.

use std::collections::HashMap;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::ops::Range;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use barlink_sandbox::builds::{Artifacts, BENCH_LOAD};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// Bytes of a page. Each process has the program and its libraries at other pages, and each
/// instruction at the same place of its page.
const PAGE: u64 = 4096;

/// The counts of executed instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Count {
    instructions: u64,
    /// `syscall` instructions.
    calls: u64,
    /// Instructions with a `lock` prefix on memory outside the stack, or `xchg` with memory.
    locked: u64,
    /// Hash of the places of all instructions in their pages, in order. Two runs with the same one
    /// executed the same instructions, so they made the same accesses to memory.
    path: u64,
}

/// The kind of an instruction.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Call,
    Locked,
    Other,
}

impl Kind {
    fn of(code: [u8; 8]) -> Self {
        match code {
            [0x0f, 0x05, ..] => Kind::Call,
            // Some compilers emit a fence as `lock or` on the top of the stack.
            [0xf0, 0x83, 0x0c | 0x4c, 0x24, ..] => Kind::Other,
            [0xf0, ..] => Kind::Locked,
            // `xchg` with memory locks without a prefix.
            [0x86 | 0x87, operands, ..] | [0x40..=0x4f, 0x86 | 0x87, operands, ..]
                if operands < 0xc0 =>
            {
                Kind::Locked
            }
            _ => Kind::Other,
        }
    }
}

/// Counts the instructions of sending and receiving this many records.
fn count(records: u64, options: &[&str]) -> Result<Count> {
    let mut command = Command::new(Artifacts::shared()?.host(BENCH_LOAD)?);
    let records = format!("--records={records}");
    command.args(["cost", &records]).args(options);
    let mut child = command.stdin(Stdio::null()).spawn()?;
    let pid = Pid::from_raw(child.id().try_into()?);
    let mut count = Count::default();
    let mut path = DefaultHasher::new();
    let mut kinds = HashMap::new();
    wait_for(pid, Signal::SIGSTOP)?;
    let clock = kernels_code(pid)?;
    loop {
        ptrace::step(pid, None)?;
        match waitpid(pid, None)? {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => (),
            WaitStatus::Stopped(_, Signal::SIGSTOP) => break,
            other => bail!("{other:?}"),
        }
        let at = ptrace::getregs(pid)?.rip;
        if clock.contains(&at) {
            continue;
        }
        let kind = match kinds.get(&at) {
            Some(kind) => *kind,
            None => {
                let code = ptrace::read(pid, at as ptrace::AddressType)?.to_le_bytes();
                let kind = Kind::of(code);
                kinds.insert(at, kind);
                kind
            }
        };
        path.write_u64(at % PAGE);
        count.instructions += 1;
        count.calls += u64::from(kind == Kind::Call);
        count.locked += u64::from(kind == Kind::Locked);
    }
    count.path = path.finish();
    ptrace::cont(pid, None)?;
    let status = child.wait()?;
    ensure!(status.success(), "{status}");
    Ok(count)
}

fn wait_for(pid: Pid, signal: Signal) -> Result<()> {
    match waitpid(pid, None)? {
        WaitStatus::Stopped(_, stopped) if stopped == signal => Ok(()),
        other => bail!("{other:?}"),
    }
}

/// Returns the address range of the code that the kernel maps into a process: its `[vdso]` in
/// `/proc/PID/maps`.
fn kernels_code(pid: Pid) -> Result<Range<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let line = maps.lines().find(|line| line.ends_with("[vdso]"));
    let line = line.context("no vDSO")?;
    let (start, rest) = line.split_once('-').context("no range")?;
    let (end, _) = rest.split_once(' ').context("no end")?;
    Ok(u64::from_str_radix(start, 16)?..u64::from_str_radix(end, 16)?)
}

/// Returns the instructions of one record, from the difference between many records and few.
fn cost(options: &[&str]) -> Result<u64> {
    const FEW: u64 = 2;
    const MANY: u64 = 10;
    let (few, many) = (count(FEW, options)?, count(MANY, options)?);
    assert_eq!(few.calls, many.calls, "a record makes system calls");
    assert_eq!(few.locked, many.locked, "a record locks the bus");
    Ok((many.instructions - few.instructions) / (MANY - FEW))
}

#[test]
fn record_needs_no_calls_and_few_instructions() -> Result<()> {
    let (single, batch) = (cost(&[])?, cost(&["--batch"])?);
    let in_place = cost(&["--in-place", "--record-size=4096"])?;
    println!(
        "{single} instructions a record of 64 bytes, {batch} in a batch; {in_place} one of 4 KiB that is filled and read in place"
    );
    assert!(single <= 560, "{single} instructions");
    assert!(batch <= 240, "{batch} instructions");
    assert!(in_place <= 2620, "{in_place} instructions");
    Ok(())
}

/// Checks that a tap that does not run costs the ends nothing: a producer alone, both ends, and the
/// producer of a channel that overwrites execute the very instructions that they execute without
/// one. The times of the records are given, because the conversion of a clock takes as many
/// instructions as its digits need.
#[test]
fn stopped_tap_adds_no_instruction() -> Result<()> {
    const RECORDS: u64 = 6;
    const PRODUCER: [&str; 2] = ["--stamped", "--produce"];
    const OVERWRITING: [&str; 2] = ["--stamped", "--overwrite"];
    for (name, producer) in [
        ("with a consumer", PRODUCER),
        ("that overwrites", OVERWRITING),
    ] {
        let alone = cost(&producer)?;
        let beside = cost(&[&producer[..], &["--tap=stopped"]].concat())?;
        println!("{alone} instructions a record for a producer {name}, {beside} beside a tap");
        assert_eq!(beside, alone, "{name}");
    }
    for way in [&["--stamped"][..], &["--batch"], &PRODUCER, &OVERWRITING] {
        let alone = count(RECORDS, way)?;
        for tap in ["--tap=attached", "--tap=stopped"] {
            let beside = count(RECORDS, &[way, &[tap]].concat())?;
            assert_eq!(beside, alone, "{way:?} {tap}");
        }
    }
    Ok(())
}

/// Checks the guest's program for `mfence` and `lfence` in a row, which the ring needs over
/// write-combining memory. No emulator shows that one of them is missing.
#[test]
fn full_fence_orders_write_combining_loads() -> Result<()> {
    const MFENCE: [u8; 3] = [0x0f, 0xae, 0xf0];
    const LFENCE: [u8; 3] = [0x0f, 0xae, 0xe8];
    let program = fs::read(Artifacts::shared()?.guest("barlink-guest")?)?;
    let both = [MFENCE, LFENCE].concat();
    let found = |bytes: &[u8]| {
        program
            .windows(bytes.len())
            .filter(|at| *at == bytes)
            .count()
    };
    assert!(found(&both) > 0, "no `mfence` before an `lfence`");
    assert_eq!(found(&both), found(&MFENCE), "an `mfence` alone");
    Ok(())
}
