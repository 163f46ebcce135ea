// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The producer of a channel that drops: sends records without end, from where its predecessor
//! stopped, and never waits for room.

use std::ops::Deref;
use std::time::Duration;

use anyhow::{Result, ensure};
use barlink_protocol::cursor::Kind;
use barlink_protocol::{AtomicU64, Events, Sender, Sent};

use crate::produce::commit;
use crate::{KIND, Note, Notes, Random, Trap, record};

/// On average one record in this many is followed by a pause, so that the channel is full at times,
/// and empty at times.
const PAUSES: u64 = 64;
/// Longest pause in microseconds.
const REST: u64 = 64_000;
/// Time between two tries to send the last record.
const RETRY: Duration = Duration::from_millis(1);

/// Sends until [`Note::Stop`] is set, and then a record of [`Kind::END`], which it repeats until
/// there is room for one. [`Note::Sent`] counts committed records, [`Note::Skipped`] dropped ones.
pub fn drop_records<M, E>(
    mut sender: Sender<M, E>,
    generation: u64,
    notes: &Notes<M>,
    trap: &Trap<M>,
    seed: u64,
) -> Result<()>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events<Error: std::error::Error + Send + Sync + 'static>,
{
    let mut dropped = sender.dropped();
    let mut sent = sender.sequence() - dropped;
    let noted = [Note::Sent, Note::Skipped].map(|note| notes.read(note));
    // The last producer may have died between a commit or a drop and its note.
    let is_next = [(0, 0), (1, 0), (0, 1)]
        .map(|(more, gone)| (noted[0] + more, noted[1] + gone))
        .contains(&(sent, dropped));
    ensure!(
        is_next,
        "{noted:?} records were committed and dropped, or one more, and now {sent} and {dropped}"
    );
    let note = |sent, dropped| {
        notes.write(Note::Sent, sent);
        notes.write(Note::Skipped, dropped);
    };
    note(sent, dropped);
    let max = sender.max_record() as usize;
    let mut random = Random::new(std::process::id().into());
    while notes.read(Note::Stop) == 0 {
        if random.below(PAUSES) == 0 {
            std::thread::sleep(Duration::from_micros(random.below(REST)));
        }
        let payload = record::payload(seed, generation, sent + dropped, max);
        // A reservation can end between the record's bytes and its commit, and cannot drop.
        if let Some(reservation) = sender.reserve(payload.len(), Some(Duration::ZERO))? {
            sent += 1;
            commit(reservation, &payload, trap, sent)?;
            continue;
        }
        match sender.send(KIND, &payload, None)? {
            Sent::Dropped => dropped += 1,
            _ => sent += 1,
        }
        note(sent, dropped);
    }
    while sender.send(Kind::END, &[], None)? == Sent::Dropped {
        dropped += 1;
        note(sent, dropped);
        std::thread::sleep(RETRY);
    }
    note(sent + 1, dropped);
    Ok(())
}
