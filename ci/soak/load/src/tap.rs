// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Two taps of a channel that overwrites: one copies what it can, and one the newest record. Each
//! record is checked, and the counts are noted.

use std::ops::Deref;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use barlink_protocol::cursor::{Capacity, Header, Kind};
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::Channel;
use barlink_protocol::{AtomicU64, Sight, Tap};

use crate::{KIND, Note, Notes, Random, record};

/// On average one look in this many that finds no record is followed by a long pause.
const LONG: u64 = 64;
/// A pause after a look that finds no record, and the longest long one.
const PAUSE: Duration = Duration::from_micros(200);
const LONGEST: u64 = 100_000;

/// One tap, and what it has copied.
struct Reader<M> {
    tap: Tap<M>,
    received: u64,
    /// Sequence number of the last record.
    last: Option<u64>,
    has_ended: bool,
}

impl<M: Deref<Target = [AtomicU64]>> Reader<M> {
    fn new(region: Region<M>, channel: &Channel) -> Self {
        Self {
            tap: Tap::attach(region, channel),
            received: 0,
            last: None,
            has_ended: false,
        }
    }

    /// Copies the next or the newest record. `None` if there is none, or if it was written over or
    /// copied before.
    fn look(&mut self, is_newest: bool) -> Result<Option<(Header, Vec<u8>)>> {
        let sight = match is_newest {
            true => self.tap.look_at_newest(),
            false => self.tap.look(),
        };
        let header = match sight {
            Sight::Record(header) => header,
            Sight::Nothing => return Ok(None),
            Sight::Reset => bail!("the channel was reset"),
        };
        let mut bytes = vec![0; header.length as usize];
        if !self.tap.copy(&mut bytes) || is_newest && self.last == Some(header.sequence) {
            return Ok(None);
        }
        ensure!(
            self.last < Some(header.sequence),
            "record {} comes after {:?}",
            header.sequence,
            self.last
        );
        self.last = Some(header.sequence);
        self.received += 1;
        self.has_ended = header.kind == Kind::END;
        Ok(Some((header, bytes)))
    }

    /// Returns how many records were committed up to the last one that was copied, and how many
    /// numbers were skipped.
    fn counts(&self) -> (u64, u64) {
        (self.received + self.tap.missed(), self.tap.dropped())
    }
}

/// Copies records until both taps have one of [`Kind::END`], or `is_over` returns true. The channel
/// must have no record yet. The notes have the counts of the first tap, and those of the second one
/// must be the same at the end.
///
/// # Errors
///
/// The channel was reset, an older record came again, or the counts differ.
pub fn tap<M>(
    region: &Region<M>,
    channel: &Channel,
    notes: &Notes<M>,
    seed: u64,
    is_over: impl Fn() -> bool,
) -> Result<()>
where
    M: Deref<Target = [AtomicU64]> + Clone,
{
    let mut all = Reader::new(region.clone(), channel);
    let mut newest = Reader::new(region.clone(), channel);
    let max = Capacity::of(channel).max_record() as usize;
    let is_whole = |header: Header, bytes: &[u8]| match header.kind {
        Kind::END => bytes.is_empty(),
        KIND => record::check(bytes, seed, header.sequence, max) == Ok(()),
        _ => false,
    };
    let mut random = Random::new(seed);
    while !(all.has_ended && newest.has_ended) {
        if is_over() {
            return Ok(());
        }
        let found = all.look(false)?;
        let is_behind = found.is_some();
        let others = newest.look(true)?;
        for (header, bytes) in found.into_iter().chain(others) {
            if !is_whole(header, &bytes) {
                notes.add(Note::Torn, 1);
            }
        }
        let (committed, skipped) = all.counts();
        notes.write(Note::Received, all.received);
        notes.write(Note::Dropped, skipped);
        notes.write(Note::Delivered, committed);
        if !is_behind {
            let pause = match random.below(LONG) {
                0 => Duration::from_micros(random.below(LONGEST)),
                _ => PAUSE,
            };
            std::thread::sleep(pause);
        }
    }
    ensure!(
        all.counts() == newest.counts(),
        "two taps count differently: {:?} and {:?}",
        all.counts(),
        newest.counts()
    );
    Ok(())
}
