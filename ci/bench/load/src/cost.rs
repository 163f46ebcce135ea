// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The hot path alone, for a process that counts its instructions: sends and receives records
//! between two marks.
//!
//! A tap that does not run is a stopped one, whatever process holds it. So the taps here are of
//! this process, which would count their instructions if they ran.

use std::hint::black_box;
use std::ops::Deref;

use anyhow::{Context, Result, ensure};
use barlink_protocol::cursor::Kind;
use barlink_protocol::wire::layout::Policy;
use barlink_protocol::{AtomicU64, Events, Sender, Sight, Tap, Wakeup};
use clap::{Args, ValueEnum};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};

use crate::ring::{Alone, Ends};
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
    /// Count the producer alone
    #[arg(long, requires = "stamped")]
    produce: bool,
    /// Send over a channel that overwrites, which has a producer alone
    #[arg(long, requires = "stamped", conflicts_with = "produce")]
    overwrite: bool,
    /// Have a tap beside the two ends
    #[arg(long, value_enum)]
    tap: Option<Beside>,
}

impl Cost {
    /// Stops with SIGSTOP, sends and receives, and stops again.
    pub fn run(&self) -> Result<()> {
        if self.overwrite {
            return self.run_alone();
        }
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
        self.stop(&mut tap)?;
        let rings = ends.rings();
        ptrace::traceme()?;
        raise(Signal::SIGSTOP)?;
        self.move_records(&mut ends, &record)?;
        raise(Signal::SIGSTOP)?;
        ensure!(ends.rings() == rings, "an end rang");
        black_box(&tap);
        Ok(())
    }

    /// Does the same with the producer of a channel that overwrites.
    fn run_alone(&self) -> Result<()> {
        let mut alone = Alone::new(Policy::Overwrite)?;
        let mut tap = self.tap.map(|_| alone.tap());
        let record = vec![1; self.record_size];
        let _ = alone.sender.send(Kind::DATA, &record, None)?;
        self.stop(&mut tap)?;
        ptrace::traceme()?;
        raise(Signal::SIGSTOP)?;
        stage_records(&mut alone.sender, &record, self.records, self.stamped)?;
        raise(Signal::SIGSTOP)?;
        black_box(&tap);
        Ok(())
    }

    /// Lets a tap copy the first record, if it is to stop behind one.
    fn stop<M>(&self, tap: &mut Option<Tap<M>>) -> Result<()>
    where
        M: Deref<Target = [AtomicU64]>,
    {
        if let (Some(Beside::Stopped), Some(tap)) = (self.tap, tap) {
            let mut copy = vec![0; self.record_size];
            let is_found = matches!(tap.look(), Sight::Record(_));
            ensure!(is_found && tap.copy(&mut copy), "the tap copies no record");
        }
        Ok(())
    }

    fn move_records(&self, ends: &mut Ends, record: &[u8]) -> Result<()> {
        let Ends {
            sender, receiver, ..
        } = ends;
        if self.batch || self.stamped {
            stage_records(sender, record, self.records, self.stamped)?;
            sender.publish()?;
            if self.produce {
                return Ok(());
            }
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

/// Stages so many copies of a record, and commits each one by itself if asked to.
// The one call of `stage` in this program, so that the compiler inlines it.
pub(crate) fn stage_records<M, E>(
    sender: &mut Sender<M, E>,
    record: &[u8],
    records: u64,
    one_by_one: bool,
) -> Result<()>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events<Error: std::error::Error + Send + Sync + 'static>,
{
    for _ in 0..records {
        let _ = sender.stage(Kind::DATA, record, None, 0)?;
        if one_by_one {
            sender.publish()?;
        }
    }
    Ok(())
}
