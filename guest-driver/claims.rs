// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Who holds which end of which channel: the book, in the driver's own memory.
//!
//! The region has a copy, in the holder words of the driver's page, for the host to read. It is written from
//! here and never read back: what stands in the region, the other side can have written.

#![forbid(unsafe_code)]

use crate::wire::layout::{
    End,
    MAX_CHANNELS, //
};
use kernel::prelude::*;

/// An open file, by a number that is never used again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileId(pub(crate) u64);

/// The holders of all channel ends: for each channel its producer, then its consumer.
pub(crate) struct Claims {
    holders: [[Option<FileId>; 2]; MAX_CHANNELS],
    /// Number of the last claim.
    last: u32,
}

impl Claims {
    /// A book in which nobody holds anything.
    pub(crate) const fn new() -> Self {
        Claims {
            holders: [[None; 2]; MAX_CHANNELS],
            last: 0,
        }
    }

    /// Claims one end of a channel for a file.
    ///
    /// `Some` number, nonzero and new to each claim, if the file did not hold the end yet; `None` if it did.
    /// `EBUSY` if another file holds it, `EINVAL` if there is no such channel.
    pub(crate) fn claim(&mut self, channel: usize, end: End, file: FileId) -> Result<Option<u32>> {
        let [producer, consumer] = self.holders.get_mut(channel).ok_or(EINVAL)?;
        let holder = match end {
            End::Producer => producer,
            End::Consumer => consumer,
        };
        match holder {
            Some(other) if *other == file => Ok(None),
            Some(_) => Err(EBUSY),
            None => {
                *holder = Some(file);
                self.last = self.last.checked_add(1).unwrap_or(1);
                Ok(Some(self.last))
            }
        }
    }

    /// Ends all claims of a file, and tells `ended` the channel and end of each.
    pub(crate) fn release(&mut self, file: FileId, mut ended: impl FnMut(usize, End)) {
        for (channel, ends) in self.holders.iter_mut().enumerate() {
            for (holder, end) in ends.iter_mut().zip([End::Producer, End::Consumer]) {
                if *holder == Some(file) {
                    *holder = None;
                    ended(channel, end);
                }
            }
        }
    }
}
