// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The producer of a channel that overwrites: sends records without end and skips numbers now and
//! then, from where its predecessor stopped.

use std::ops::Deref;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use barlink_protocol::cursor::Kind;
use barlink_protocol::{AtomicU64, Events, Sender, Sent};

use crate::produce::commit;
use crate::{Note, Notes, Random, Trap, record};

/// On average one record in this many is followed by a pause, so that taps keep up at times.
const PAUSES: u64 = 4;
/// Longest pause in microseconds.
const REST: u64 = 8_000;
/// On average one record in this many is followed by skipped numbers.
const SKIPS: u64 = 16;
/// Fewest and most numbers that are skipped at once. One number more than those in the notes is a
/// record whose producer died before its note, and several are numbers that it skipped.
const SKIPPED: [u64; 2] = [2, 5];

/// Sends until [`Note::Stop`] is set, and then a record of [`Kind::END`].
pub fn overwrite<M, E>(
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
    let [mut sent, mut skipped] = [Note::Sent, Note::Skipped].map(|note| notes.read(note));
    let number = sender.sequence();
    match number.checked_sub(sent + skipped) {
        Some(0) => (),
        Some(1) => sent += 1,
        Some(count) if (SKIPPED[0]..=SKIPPED[1]).contains(&count) => skipped += count,
        _ => bail!("{sent} records were sent, {skipped} numbers skipped, and the next is {number}"),
    }
    notes.write(Note::Sent, sent);
    notes.write(Note::Skipped, skipped);
    let max = sender.max_record() as usize;
    let mut random = Random::new(std::process::id().into());
    while notes.read(Note::Stop) == 0 {
        if random.below(PAUSES) == 0 {
            std::thread::sleep(Duration::from_micros(random.below(REST)));
        }
        let payload = record::payload(seed, generation, sent + skipped, max);
        let Some(reservation) = sender.reserve(payload.len(), None)? else {
            continue;
        };
        sent += 1;
        commit(reservation, &payload, trap, sent)?;
        if random.below(SKIPS) == 0 {
            let count = SKIPPED[0] + random.below(SKIPPED[1] - SKIPPED[0] + 1);
            sender.skip(count)?;
            skipped += count;
            notes.write(Note::Skipped, skipped);
        }
    }
    let ended = sender.send(Kind::END, &[], None)?;
    ensure!(ended == Sent::Committed, "the end was not sent: {ended:?}");
    notes.write(Note::Sent, sent + 1);
    Ok(())
}
