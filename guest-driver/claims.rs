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

/// One claim.
#[derive(Clone, Copy)]
struct Holder {
    /// File that the claim ends with.
    file: FileId,
    /// Number of the claim.
    number: u32,
    /// Process that the holder word names: its PID in the initial PID namespace.
    process: u32,
}

/// The holders of all channel ends: for each channel its producer, then its consumer.
pub(crate) struct Claims {
    holders: KVec<[Option<Holder>; 2]>,
    /// Number of the latest claim; 0 before the first.
    last: u32,
}

impl Claims {
    /// Creates a table without holders. `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        let mut holders = KVec::with_capacity(MAX_CHANNELS, GFP_KERNEL)?;
        for _ in 0..MAX_CHANNELS {
            holders.push([None; 2], GFP_KERNEL)?;
        }
        Ok(Claims { holders, last: 0 })
    }

    /// Claims one end of a channel for a file of a process.
    ///
    /// Returns a new nonzero claim number, or `None` if the file already holds the end. `EBUSY` if
    /// another file holds it, `EINVAL` if there is no such channel.
    pub(crate) fn claim(
        &mut self,
        channel: usize,
        end: End,
        file: FileId,
        process: u32,
    ) -> Result<Option<u32>> {
        let [producer, consumer] = self.holders.get_mut(channel).ok_or(EINVAL)?;
        let holder = match end {
            End::Producer => producer,
            End::Consumer => consumer,
        };
        match holder {
            Some(other) if other.file == file => Ok(None),
            Some(_) => Err(EBUSY),
            None => {
                self.last = self.last.checked_add(1).unwrap_or(1);
                *holder = Some(Holder {
                    file,
                    number: self.last,
                    process,
                });
                Ok(Some(self.last))
            }
        }
    }

    /// Returns whether a claim of a file names a process.
    pub(crate) fn name(&self, file: FileId, process: u32) -> bool {
        let mut holders = self.holders.iter().flatten().flatten();
        holders.any(|holder| holder.file == file && holder.process == process)
    }

    /// Makes the claims of a file name the process `to` where they name `from`, and calls `renamed`
    /// with the channel, the end and the number of each.
    pub(crate) fn rename(
        &mut self,
        file: FileId,
        from: u32,
        to: u32,
        mut renamed: impl FnMut(usize, End, u32),
    ) {
        for (channel, ends) in self.holders.iter_mut().enumerate() {
            for (holder, end) in ends.iter_mut().zip([End::Producer, End::Consumer]) {
                match holder {
                    Some(holder) if holder.file == file && holder.process == from => {
                        holder.process = to;
                        renamed(channel, end, holder.number);
                    }
                    _ => (),
                }
            }
        }
    }

    /// Ends all claims of a file, and calls `ended` with the channel and the end of each.
    pub(crate) fn release(&mut self, file: FileId, mut ended: impl FnMut(usize, End)) {
        for (channel, ends) in self.holders.iter_mut().enumerate() {
            for (holder, end) in ends.iter_mut().zip([End::Producer, End::Consumer]) {
                if holder.is_some_and(|holder| holder.file == file) {
                    *holder = None;
                    ended(channel, end);
                }
            }
        }
    }
}
