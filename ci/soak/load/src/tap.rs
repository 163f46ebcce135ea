// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Two taps of a channel in one process: one copies what it can, and one the newest record. Each
//! record is checked, and the counts are noted.

use std::ops::Deref;
use std::time::Duration;

use anyhow::{Result, ensure};
use barlink::{ErrorKind, OwnedRecord, Tap};
use barlink_protocol::AtomicU64;
use barlink_protocol::cursor::Kind;

use crate::{KIND, Note, Notes, Random, record};

/// On average one look in this many that finds no record is followed by a long pause.
const LONG: u64 = 64;
/// Longest wait for a record, and the longest long pause in microseconds.
const WAIT: Duration = Duration::from_millis(20);
const LONGEST: u64 = 100_000;

/// One tap, and what it has copied since the last reset that it noticed.
struct Reader {
    tap: Tap,
    received: u64,
    /// Sequence number of the last record.
    last: Option<u64>,
    /// Generation of the records, once one was copied. After a reset it is a later one.
    generation: Option<u64>,
    was_reset: bool,
    has_ended: bool,
}

/// The result of a look.
enum Found {
    Record(OwnedRecord),
    Nothing,
    Reset,
}

impl Reader {
    fn new(tap: Tap) -> Self {
        Self {
            tap,
            received: 0,
            last: None,
            generation: None,
            was_reset: false,
            has_ended: false,
        }
    }

    /// Copies the next or the newest record. Finds nothing if there is none, or if the newest was
    /// copied before.
    fn look(&mut self, is_newest: bool) -> Result<Found> {
        let found = match is_newest {
            true => self.tap.latest(),
            false => self.tap.recv_timeout(WAIT),
        };
        let record = match found {
            Ok(Some(record)) => record,
            Ok(None) => return Ok(Found::Nothing),
            Err(error) if error.kind() == ErrorKind::Reset => {
                self.received = 0;
                self.last = None;
                self.was_reset = true;
                self.has_ended = false;
                return Ok(Found::Reset);
            }
            Err(error) => return Err(error.into()),
        };
        if is_newest && self.last == Some(record.sequence) {
            return Ok(Found::Nothing);
        }
        ensure!(
            self.last < Some(record.sequence),
            "record {} comes after {:?}",
            record.sequence,
            self.last
        );
        self.last = Some(record.sequence);
        self.received += 1;
        self.has_ended = record.kind == Kind::END;
        Ok(Found::Record(record))
    }

    /// Returns whether a record is whole, and of the generation that is due.
    fn check(&mut self, record: &OwnedRecord, seed: u64, max: usize) -> bool {
        if record.kind == Kind::END {
            return record.bytes.is_empty();
        }
        let Some(generation) = record::generation(&record.bytes) else {
            return false;
        };
        let is_due = match self.generation {
            None => true,
            Some(last) if self.was_reset => last < generation,
            Some(last) => last == generation,
        };
        self.was_reset = false;
        self.generation = Some(generation);
        let checked = record::check(&record.bytes, seed, generation, record.sequence, max);
        record.kind == KIND && is_due && checked == Ok(())
    }

    /// Returns how many records were committed up to the last one that was copied, and how many
    /// numbers were dropped or skipped.
    fn counts(&self) -> (u64, u64) {
        (self.received + self.tap.missed(), self.tap.dropped())
    }
}

/// Copies records until both taps have one of [`Kind::END`]. The notes have the counts of the first
/// tap. If `is_first`, the channel must have no record yet, and the counts of the second tap must
/// be the same at the end.
///
/// # Errors
///
/// An older record came again, or the counts differ.
pub fn tap<M>(taps: [Tap; 2], max: usize, notes: &Notes<M>, seed: u64, is_first: bool) -> Result<()>
where
    M: Deref<Target = [AtomicU64]>,
{
    let [mut all, mut newest] = taps.map(Reader::new);
    let mut random = Random::new(seed);
    notes.write(Note::Begun, 1);
    while !(all.has_ended && newest.has_ended) {
        let mut is_behind = false;
        match all.look(false)? {
            Found::Record(record) => {
                is_behind = true;
                if !all.check(&record, seed, max) {
                    notes.add(Note::Torn, 1);
                }
                let (committed, dropped) = all.counts();
                notes.write(Note::Received, all.received);
                notes.write(Note::Dropped, dropped);
                notes.write(Note::Delivered, committed);
                let generation = all.generation.map_or(0, |generation| generation + 1);
                notes.write(Note::Generation, generation);
            }
            Found::Nothing => (),
            Found::Reset => {
                for note in [
                    Note::Generation,
                    Note::Delivered,
                    Note::Received,
                    Note::Dropped,
                ] {
                    notes.write(note, 0);
                }
            }
        }
        if let Found::Record(record) = newest.look(true)?
            && !newest.check(&record, seed, max)
        {
            notes.add(Note::Torn, 1);
        }
        if !is_behind && random.below(LONG) == 0 {
            std::thread::sleep(Duration::from_micros(random.below(LONGEST)));
        }
    }
    ensure!(
        !is_first || all.counts() == newest.counts(),
        "two taps count differently: {:?} and {:?}",
        all.counts(),
        newest.counts()
    );
    Ok(())
}
