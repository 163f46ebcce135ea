// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The hot path alone, for a process that counts its instructions: sends and receives records
//! between two marks.
//!
//! A tap that does not run is a stopped one, whatever process holds it. So the taps here are of
//! this process, which would count their instructions if they ran.

use std::hint::black_box;

use anyhow::{Context, Result, ensure};
use barlink_protocol::cursor::Kind;
use barlink_protocol::{Sight, Wakeup};
use clap::{Args, ValueEnum};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};

use crate::ring::Ends;
use crate::stream::sum_of;

/// A tap of the channel, which does not run while instructions are counted.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Beside {
    /// A tap that never reads.
    Attached,
    /// A tap that has copied a record.
    Stopped,
}

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
    /// Give each record its time, so that the clock is not read
    #[arg(long, conflicts_with_all = ["batch", "in_place"])]
    stamped: bool,
    /// Have a tap beside the two ends
    #[arg(long, value_enum)]
    tap: Option<Beside>,
}

impl Cost {
    /// Stops with SIGSTOP, sends and receives, and stops again.
    pub fn run(&self) -> Result<()> {
        let mut ends = Ends::new()?;
        let mut tap = self.tap.map(|_| ends.tap());
        let Ends {
            sender, receiver, ..
        } = &mut ends;
        let record = vec![1; self.record_size];
        // The first record does all work that happens only once.
        let _ = sender.send(Kind::DATA, &record, None)?;
        receiver.wait(None)?;
        receiver.release()?;
        if let (Some(Beside::Stopped), Some(tap)) = (self.tap, &mut tap) {
            let mut copy = vec![0; self.record_size];
            let is_found = matches!(tap.look(), Sight::Record(_));
            ensure!(is_found && tap.copy(&mut copy), "the tap copies no record");
        }
        let rings = ends.rings();
        ptrace::traceme()?;
        raise(Signal::SIGSTOP)?;
        self.move_records(&mut ends, &record)?;
        raise(Signal::SIGSTOP)?;
        ensure!(ends.rings() == rings, "an end rang");
        black_box(&tap);
        Ok(())
    }

    fn move_records(&self, ends: &mut Ends, record: &[u8]) -> Result<()> {
        let Ends {
            sender, receiver, ..
        } = ends;
        if self.batch || self.stamped {
            // One call of `stage` for both, so that it is inlined.
            for _ in 0..self.records {
                let _ = sender.stage(Kind::DATA, record, None, 0)?;
                if self.stamped {
                    sender.publish()?;
                }
            }
            sender.publish()?;
            for _ in 0..self.records {
                if receiver.wait(None)? == Wakeup::Ready {
                    receiver.advance();
                }
                if self.stamped {
                    receiver.release()?;
                }
            }
            receiver.release()?;
        } else if self.in_place {
            for _ in 0..self.records {
                let mut reservation = sender.reserve(record.len(), None)?.context("no room")?;
                reservation.write(0, record);
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
                let _ = sender.send(Kind::DATA, record, None)?;
            }
            for _ in 0..self.records {
                if receiver.wait(None)? == Wakeup::Ready {
                    receiver.release()?;
                }
            }
        }
        Ok(())
    }
}
