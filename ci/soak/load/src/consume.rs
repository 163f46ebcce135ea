// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The consumer's end: checks each record and notes the result.

use std::ops::Deref;

use anyhow::Result;
use barlink_protocol::cursor::{Capacity, Kind};
use barlink_protocol::wire::layout::Channel;
use barlink_protocol::{AtomicU64, Events, Receiver, Record, Wakeup};

use crate::journal::Verdict;
use crate::{Journal, KIND, Note, Notes, Pace, Point, Trap, record};

/// Number of wrong records of a channel that are reported, each in a line.
const MAX_REPORTS: u64 = 20;

/// Receives until a record of [`Kind::END`] comes. It waits without a time limit: once rings come
/// through, only a ring wakes it.
pub fn consume<M, E>(
    mut receiver: Receiver<M, E>,
    channel: &Channel,
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
        note_verdict(notes, number, journal.judge(number));
        if let Err(what) = check(&record, seed, max) {
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
fn check<M>(record: &Record<'_, M>, seed: u64, max: usize) -> Result<(), String>
where
    M: Deref<Target = [AtomicU64]>,
{
    let header = record.header();
    let mut bytes = vec![0; record.length()];
    record.copy_to(0, &mut bytes);
    match header.kind {
        Kind::END if bytes.is_empty() => Ok(()),
        KIND => record::check(&bytes, seed, header.sequence, max)
            .map_err(|fault| format!("{fault:?}, {} bytes", bytes.len())),
        kind => Err(format!("of kind {}", kind.number())),
    }
}
