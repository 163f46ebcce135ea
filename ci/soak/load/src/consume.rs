// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The consumer's end: checks each record and notes the result.

use std::ops::Deref;

use anyhow::Result;
use barlink_protocol::cursor::{Capacity, Kind};
use barlink_protocol::wire::layout::{Channel, Policy};
use barlink_protocol::{AtomicU64, Events, Receiver, Record, Wakeup};

use crate::journal::Verdict;
use crate::{Journal, KIND, Note, Notes, Pace, Point, Trap, record};

/// Number of wrong records of a channel that are reported, each in a line.
const MAX_REPORTS: u64 = 20;

/// Receives until a record of [`Kind::END`] comes. It waits without a time limit: once rings come
/// through, only a ring wakes it. In a channel that drops, numbers that do not come were dropped,
/// and [`Note::Gaps`] counts them.
pub fn consume<M, E>(
    mut receiver: Receiver<M, E>,
    channel: &Channel,
    generation: u64,
    notes: &Notes<M>,
    trap: &Trap<M>,
    seed: u64,
) -> Result<()>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events<Error: std::error::Error + Send + Sync + 'static>,
{
    let mut journal = Journal::new(notes.read(Note::Released), notes.read(Note::Delivered));
    let max = Capacity::of(channel).max_record() as usize;
    let mut pace = Pace::new();
    loop {
        pace.rest();
        if receiver.wait(None)? != Wakeup::Ready {
            continue;
        }
        let Some(record) = receiver.record() else {
            continue;
        };
        trap.pass(Point::BeforeDelivery);
        let kind = record.header().kind;
        let number = record.header().sequence;
        let mut verdict = journal.judge(number);
        if channel.policy == Policy::Drop {
            note_gap(notes, number, std::mem::take(&mut verdict.lost));
        }
        note_verdict(notes, number, verdict);
        if let Err(what) = check(&record, seed, generation, max) {
            // The harness reads standard error only after the process has ended. The limit keeps
            // the pipe from filling up.
            if notes.read(Note::Torn) < MAX_REPORTS {
                eprintln!("record {number}: {what}");
            }
            notes.add(Note::Torn, 1);
        }
        notes.write(Note::Delivered, number + 1);
        trap.pass(Point::BeforeRelease);
        trap.moving(number + 1, || receiver.release())?;
        if kind == Kind::END {
            return Ok(());
        }
    }
}

/// Counts the dropped records before a record, unless a consumer that was killed has counted them.
fn note_gap<M>(notes: &Notes<M>, number: u64, dropped: u64)
where
    M: Deref<Target = [AtomicU64]>,
{
    let gaps = Gaps::of(notes.read(Note::Gaps));
    if gaps.next != number + 1 {
        let next = Gaps {
            next: number + 1,
            count: gaps.count + dropped,
        };
        notes.write(Note::Gaps, next.word());
    }
}

/// The content of [`Note::Gaps`], one word, so that a consumer that is killed stores all or
/// nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gaps {
    /// Number after that of the last record before which gaps were counted, of 32 bits.
    pub next: u64,
    /// Number of records that never came, of 32 bits.
    pub count: u64,
}

impl Gaps {
    /// Returns the content of the note.
    pub const fn of(word: u64) -> Self {
        Self {
            next: word >> 32,
            count: word & 0xffff_ffff,
        }
    }

    const fn word(self) -> u64 {
        self.next << 32 | self.count
    }
}

fn note_verdict<M>(notes: &Notes<M>, number: u64, verdict: Verdict)
where
    M: Deref<Target = [AtomicU64]>,
{
    let Verdict { lost, twice, again } = verdict;
    let wrong = lost > 0 || twice > 0;
    if wrong && notes.read(Note::Lost) + notes.read(Note::Twice) < MAX_REPORTS {
        eprintln!("record {number}: {lost} before it are lost, {twice} from it on come twice");
    }
    for (note, count) in [
        (Note::Lost, lost),
        (Note::Twice, twice),
        (Note::Again, again.into()),
    ] {
        if count > 0 {
            notes.add(note, count);
        }
    }
}

/// Checks the kind and the payload of a record by its number. The error describes the difference.
fn check<M>(record: &Record<'_, M>, seed: u64, generation: u64, max: usize) -> Result<(), String>
where
    M: Deref<Target = [AtomicU64]>,
{
    let header = record.header();
    let mut bytes = vec![0; record.length()];
    record.copy_to(0, &mut bytes);
    match header.kind {
        Kind::END if bytes.is_empty() => Ok(()),
        KIND => record::check(&bytes, seed, generation, header.sequence, max)
            .map_err(|fault| format!("{fault:?}, {} bytes", bytes.len())),
        kind => Err(format!("of kind {}", kind.number())),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use barlink_protocol::region::Region;
    use barlink_protocol::wire::layout::{FIRST_FREE, Layout, MAX_CHANNELS};

    use super::*;
    use crate::Set;

    /// A consumer that was killed behind its note finds the same record and the same gap again.
    #[test]
    fn gap_before_record_counts_once() {
        let raw = 256 * MAX_CHANNELS as u64;
        let layout = Layout::new(1 << 16, 1, 1, FIRST_FREE, raw.next_multiple_of(4096), &[]);
        let words = (0..1 << 13).map(|_| AtomicU64::new(0));
        let region = Region::new(words.collect::<Arc<[_]>>());
        let notes = Notes::new(region, &layout.unwrap(), 0, Set::Ends);
        let count = |number, dropped| {
            note_gap(&notes, number, dropped);
            Gaps::of(notes.read(Note::Gaps))
        };
        let gaps = |next, count| Gaps { next, count };
        assert_eq!(count(0, 0), gaps(1, 0));
        assert_eq!(count(5, 4), gaps(6, 4));
        assert_eq!(count(5, 4), gaps(6, 4));
        assert_eq!(count(8, 2), gaps(9, 6));
    }
}
