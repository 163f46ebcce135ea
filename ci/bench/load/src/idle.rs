// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Processor time of ends that sleep. Another process measures it from outside, so that the
//! measurement costs the ends nothing.

use std::fs;
use std::ops::Deref;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use barlink_protocol::cursor::Kind;
use barlink_protocol::{AtomicU64, Events, Receiver, Sender, Strategy, Wakeup};
use clap::Args;
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::clock::nanoseconds;

/// Number of records that each end receives and answers before it sleeps, and the time before each
/// answer. That time is long enough for the other end to sleep and to learn that doorbells come
/// through. Until then an end also wakes up by a timer.
const TURNS: u32 = 4;
const TURN: Duration = Duration::from_millis(100);

/// Exchanges records with the other end, prints this process's ID, and sleeps for good. One of the
/// two ends is `first` to send.
pub fn idle<M, E>(mut sender: Sender<M, E>, mut receiver: Receiver<M, E>, first: bool) -> Result<()>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events<Error: std::error::Error + Send + Sync + 'static>,
{
    receiver.set_strategy(Strategy::SLEEP);
    if first {
        let _ = sender.send(Kind::USER, &[], None)?;
    }
    let mut turns = 0;
    loop {
        if receiver.wait(None)? != Wakeup::Ready || receiver.record().is_none() {
            continue;
        }
        receiver.release()?;
        turns += 1;
        if turns <= TURNS {
            thread::sleep(TURN);
            let _ = sender.send(Kind::USER, &[], None)?;
        }
        if turns == TURNS {
            println!("{}", std::process::id());
        }
    }
}

/// The processor time that a process used during a measurement.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Used {
    /// Processor time, in nanoseconds.
    pub cpu: u64,
    /// Number of context switches of its threads, voluntary and involuntary.
    pub switches: u64,
}

/// Measures processes from outside.
#[derive(Args, Debug)]
pub struct Watch {
    /// The IDs of the processes
    #[arg(required = true)]
    processes: Vec<i32>,
    /// Duration, in milliseconds
    #[arg(long)]
    time: u64,
}

impl Watch {
    /// Returns the processor time and the switches of each process during that time.
    pub fn run(&self) -> Result<Vec<Used>> {
        let look = || -> Result<Vec<Used>> { self.processes.iter().map(|id| used(*id)).collect() };
        let before = look()?;
        thread::sleep(Duration::from_millis(self.time));
        let after = look()?;
        Ok(before
            .iter()
            .zip(&after)
            .map(|(before, after)| Used {
                cpu: after.cpu - before.cpu,
                switches: after.switches.saturating_sub(before.switches),
            })
            .collect())
    }
}

/// Returns the processor time and the switches of a process since its start.
fn used(process: i32) -> Result<Used> {
    let clock = clock_getcpuclockid(Pid::from_raw(process));
    let clock = clock.with_context(|| format!("process {process} has no clock"))?;
    let mut switches = 0;
    for task in fs::read_dir(format!("/proc/{process}/task"))? {
        // A thread can end meanwhile.
        let status = fs::read_to_string(task?.path().join("status")).unwrap_or_default();
        let counts = status
            .lines()
            .filter_map(|line| line.split_once("ctxt_switches:"))
            .filter_map(|(_, count)| count.trim().parse::<u64>().ok());
        switches += counts.sum::<u64>();
    }
    Ok(Used {
        cpu: nanoseconds(clock.now()?.into()),
        switches,
    })
}
