// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The producer's end: sends records without end, from where its predecessor stopped.

use std::ops::Deref;

use anyhow::{Result, ensure};
use barlink_protocol::cursor::Kind;
use barlink_protocol::{AtomicU64, Events, Sender, SenderReservation, stream};

use crate::{KIND, Note, Notes, Pace, Point, Trap, record};

/// Sends until [`Note::Stop`] is set, and then a record of [`Kind::END`].
pub fn produce<M, E>(
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
    let mut number = sender.sequence();
    let noted = notes.read(Note::Sent);
    // The last producer may have died between its commit and its note.
    ensure!(
        (noted..=noted + 1).contains(&number),
        "{noted} records were committed, or one more, and the next is to be number {number}"
    );
    notes.write(Note::Sent, number);
    let max = sender.max_record() as usize;
    let mut pace = Pace::new();
    while notes.read(Note::Stop) == 0 {
        pace.rest();
        let payload = record::payload(seed, generation, number, max);
        let Some(reservation) = sender.reserve(payload.len(), None)? else {
            continue;
        };
        number += 1;
        commit(reservation, &payload, trap, number)?;
    }
    let _ = stream::mark(&mut sender, Kind::END)?;
    notes.write(Note::Sent, number + 1);
    Ok(())
}

/// Fills a reservation in two parts, commits it, and notes `count`. The end can die between the
/// record's bytes and its commit.
pub(crate) fn commit<M, E>(
    mut reservation: SenderReservation<'_, M, E>,
    payload: &[u8],
    trap: &Trap<M>,
    count: u64,
) -> Result<()>
where
    M: Deref<Target = [AtomicU64]>,
    E: Events<Error: std::error::Error + Send + Sync + 'static>,
{
    let (first, second) = payload.split_at(payload.len() / 16 * 8);
    reservation.write(0, first);
    reservation.write(first.len() as u32, second);
    trap.pass(Point::BeforeCommit);
    trap.moving(count, || reservation.commit(KIND, payload.len() as u32))?;
    Ok(())
}
