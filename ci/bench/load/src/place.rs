// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Records that are built one by one in the channel itself, and read there. Peers with borrowed
//! samples work the same way.

use std::ops::Deref;

use anyhow::{Context, Result};
use barlink_protocol::cursor::Kind;
use barlink_protocol::{AtomicU64, Events, Receiver, Sender, Strategy, Wakeup};
use clap::Args;

use crate::answer::Answer;
use crate::rest::Sleeps;
use crate::stream::sum_of;
use crate::trip::{Ask, Trips, Wait};
use crate::{Flow, Measured, Pace, STRIDE};

/// A buffer in the nearest cache, in which words are computed before they are copied into the
/// channel.
pub(crate) type Block = [[u8; 8]; BLOCK];
pub(crate) const BLANK: Block = [[0; 8]; BLOCK];
/// Number of words in a block.
const BLOCK: usize = 512;

/// Returns the word at an index of a record.
#[inline]
pub const fn word(place: usize) -> u64 {
    (place as u64).wrapping_mul(0x9E37_79B9)
}

/// Returns the wrapping sum of a record's words from the second on.
fn sum_of_others(words: usize) -> u64 {
    (1..words).fold(0, |sum: u64, place| sum.wrapping_add(word(place)))
}

/// Sends records that are built in place.
#[derive(Args, Debug)]
pub struct Build {
    /// Bytes of payload in a record, a multiple of 8
    #[arg(long)]
    record_size: usize,
    /// Length of the timed part of the stream, in milliseconds
    #[arg(long)]
    time: u64,
    /// Records a second, instead of as many as there is room for
    #[arg(long)]
    pace: Option<u32>,
}

impl Build {
    /// Reserves, fills and commits records, again and again.
    pub fn run<M, E>(&self, mut sender: Sender<M, E>) -> Result<Measured>
    where
        M: Deref<Target = [AtomicU64]> + Clone,
        E: Events<Error: std::error::Error + Send + Sync + 'static>,
    {
        sender.set_strategy(Strategy::STREAM);
        let words = self.record_size / 8;
        let sum = sum_of_others(words).wrapping_add(word(0));
        let mut block = BLANK;
        let mut flow = Flow::begin();
        let batch = match self.pace {
            Some(_) => 1,
            None => STRIDE.div_ceil(self.record_size as u64),
        };
        let mut pace = self.pace.map(Pace::new);
        while flow.lasts(self.time) {
            for _ in 0..batch {
                build(&mut sender, words, &mut block, make)?;
                flow.add(1, self.record_size as u64, sum);
            }
            if let Some(pace) = &mut pace {
                pace.wait();
            }
        }
        let measured = flow.end();
        let _ = sender.send(Kind::END, &[], None)?;
        Ok(measured)
    }
}

/// Builds one record in blocks. `fill` receives the index of a block's first word, and the block.
pub(crate) fn build<M, E>(
    sender: &mut Sender<M, E>,
    words: usize,
    block: &mut Block,
    mut fill: impl FnMut(usize, &mut [[u8; 8]]),
) -> Result<()>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events<Error: std::error::Error + Send + Sync + 'static>,
{
    let reservation = sender.reserve(8 * words, None)?;
    // Without a time limit the call waits until there is room.
    let mut reservation = reservation.context("there is no room")?;
    for first in (0..words).step_by(block.len()) {
        let count = block.len().min(words - first);
        let block = &mut block[..count];
        fill(first, block);
        reservation.write(8 * first as u32, block.as_flattened());
    }
    let length = reservation.length();
    Ok(reservation.commit(Kind::USER, length)?)
}

/// The words of the first block. A constant would be copied for each record.
static WORDS: [u64; BLOCK] = {
    let mut words = [0; BLOCK];
    let mut place = 0;
    while place < BLOCK {
        words[place] = word(place);
        place += 1;
    }
    words
};

/// Computes the words of a block from their indices.
fn make(first: usize, block: &mut [[u8; 8]]) {
    // The sum of two indices' words is the word of their sum, and an addition takes less time than
    // the multiplication of 64-bit words.
    let base = word(first);
    for (bytes, word) in block.iter_mut().zip(&WORDS) {
        *bytes = base.wrapping_add(*word).to_le_bytes();
    }
}

impl Ask {
    /// Asks through a pair of channels. Questions are built in place, and every byte of the answers
    /// is read in place.
    pub fn in_place<M, E>(
        &self,
        sender: Sender<M, E>,
        receiver: Receiver<M, E>,
        wait: Wait,
    ) -> Result<Trips>
    where
        M: Deref<Target = [AtomicU64]> + Clone,
        E: Events<Error: std::error::Error + Send + Sync + 'static>,
    {
        let words = self.record_size() / 8;
        let others = sum_of_others(words);
        let mut block = BLANK;
        self.over(sender, receiver, wait, |sender, receiver, bytes| {
            let (number, _) = bytes
                .split_first_chunk_mut()
                .context("a record has at least a word")?;
            build(sender, words, &mut block, |first, block| {
                make(first, block);
                if first == 0 {
                    block[0] = *number;
                }
            })?;
            while receiver.wait(None)? != Wakeup::Ready {}
            if let Some(record) = receiver.record() {
                let sum = sum_of(record.words());
                // The remainder is the number, if every other word is unchanged.
                *number = sum.wrapping_sub(others).to_le_bytes();
            }
            Ok(receiver.release()?)
        })
    }
}

impl Answer {
    /// Answers through a pair of channels until the end of the stream. Each question is copied in
    /// blocks into its answer.
    pub fn in_place<M, E>(
        &self,
        sender: Sender<M, E>,
        receiver: Receiver<M, E>,
        wait: Wait,
    ) -> Result<Sleeps>
    where
        M: Deref<Target = [AtomicU64]> + Clone,
        E: Events<Error: std::error::Error + Send + Sync + 'static>,
    {
        let mut block = BLANK;
        self.over(sender, receiver, wait, |sender, receiver| {
            if let Some(record) = receiver.record() {
                let words = record.words().len();
                build(sender, words, &mut block, |first, block| {
                    record.copy_to(8 * first, block.as_flattened_mut());
                })?;
            }
            Ok(receiver.release()?)
        })
    }
}
