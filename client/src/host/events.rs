// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Doorbells on the host: eventfds that the broker created and shares.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::event_error::EventError;
use crate::host::claim::Claim;
use crate::notifier::Notifier;
use crate::vectors::Vectors;

/// The eventfds of one end of a channel.
#[derive(Debug)]
pub struct Eventfds {
    vectors: Vectors,
    /// These stay open, because the end sleeps on them.
    _own: [OwnedFd; 2],
    other: Notifier,
    _claim: Claim,
}

impl Eventfds {
    /// Waits on the control vector and the channel's, and rings the other end.
    pub(crate) fn new(
        control: OwnedFd,
        own: OwnedFd,
        other: OwnedFd,
        claim: Claim,
    ) -> Result<Self, EventError> {
        Ok(Eventfds {
            vectors: Vectors::new(own.as_fd(), &[control.as_fd()])?,
            _own: [control, own],
            other: Notifier::from(other),
            _claim: claim,
        })
    }

    /// Rings the other end.
    pub(crate) fn ring(&self) -> Result<(), EventError> {
        self.other.ring().map_err(EventError::of("ring a doorbell"))
    }

    /// Sleeps until this end is rung or the timeout is over. Returns whether the channel's own
    /// vector was rung.
    pub(crate) fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, EventError> {
        self.vectors.sleep(timeout)
    }
}

impl AsFd for Eventfds {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.vectors.as_fd()
    }
}
