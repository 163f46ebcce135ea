// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The hot path alone, for a process that counts its instructions: sends and receives records
//! between two marks.

use std::hint::black_box;

use anyhow::{Context, Result};
use barlink_protocol::Wakeup;
use barlink_protocol::cursor::Kind;
use clap::Args;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};

use crate::ring::ends;
use crate::stream::sum_of;

/// The options of a run that another process traces.
#[derive(Args, Debug)]
pub struct Cost {
    /// Number of records
    #[arg(long)]
    records: u64,
    /// Bytes of payload in a record, a multiple of 8
    #[arg(long, default_value_t = 64)]
    record_size: usize,
    /// Commit and release all records at once
    #[arg(long)]
    batch: bool,
    /// Fill and read each record in place
    #[arg(long, conflicts_with = "batch")]
    in_place: bool,
}

impl Cost {
    /// Stops with SIGSTOP, sends and receives, and stops again.
    pub fn run(&self) -> Result<()> {
        let (mut sender, mut receiver) = ends()?;
        let record = vec![1; self.record_size];
        // The first record does all work that happens only once.
        let _ = sender.send(Kind::DATA, &record, None)?;
        receiver.wait(None)?;
        receiver.release()?;
        ptrace::traceme()?;
        raise(Signal::SIGSTOP)?;
        if self.batch {
            for _ in 0..self.records {
                let _ = sender.stage(Kind::DATA, &record, None, 0)?;
            }
            sender.publish()?;
            for _ in 0..self.records {
                if receiver.wait(None)? == Wakeup::Ready {
                    receiver.advance();
                }
            }
            receiver.release()?;
        } else if self.in_place {
            for _ in 0..self.records {
                let mut reservation = sender.reserve(record.len(), None)?.context("no room")?;
                reservation.write(0, &record);
                let length = reservation.length();
                reservation.commit(Kind::DATA, length)?;
            }
            for _ in 0..self.records {
                receiver.wait(None)?;
                let record = receiver.record().context("no record")?;
                black_box(sum_of(record.words()));
                receiver.release()?;
            }
        } else {
            for _ in 0..self.records {
                let _ = sender.send(Kind::DATA, &record, None)?;
            }
            for _ in 0..self.records {
                if receiver.wait(None)? == Wakeup::Ready {
                    receiver.release()?;
                }
            }
        }
        raise(Signal::SIGSTOP)?;
        Ok(())
    }
}
