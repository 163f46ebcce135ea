// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The claims of channel ends, in the driver's own memory.
//!
//! The holder words of the driver's page are a copy for the host. The driver writes them and never
//! reads them back, because the host can write to the region as well.

#![forbid(unsafe_code)]

use crate::wire::layout::{
    End,
    MAX_CHANNELS, //
};
use kernel::prelude::*;

/// Identifies an open file by a number that is never used again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileId(pub(crate) u64);

/// The holders of all channel ends: for each channel its producer, then its consumer.
pub(crate) struct Claims {
    holders: [[Option<FileId>; 2]; MAX_CHANNELS],
    /// Number of the latest claim; 0 before the first.
    last: u32,
}

impl Claims {
    /// Creates a table without holders.
    pub(crate) const fn new() -> Self {
        Claims {
            holders: [[None; 2]; MAX_CHANNELS],
            last: 0,
        }
    }

    /// Claims one end of a channel for a file.
    ///
    /// Returns a new nonzero claim number, or `None` if the file already holds the end. `EBUSY` if
    /// another file holds it, `EINVAL` if there is no such channel.
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

    /// Ends all claims of a file, and calls `ended` with the channel and the end of each.
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
