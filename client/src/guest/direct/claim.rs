// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Claims of ends of channels, which a session grants.

use std::sync::Arc;

use barlink_protocol::wire::layout::End;
use rustix::rand::GetRandomFlags;

use crate::guest::direct::session::Session;
use crate::guest::error::DeviceError;

/// The reason why a claim fails.
#[derive(Debug)]
pub(crate) enum ClaimFault {
    /// Another holder has the end.
    Held,
    /// The end belongs to another peer.
    NotHere,
    /// The device cannot be used.
    Device(DeviceError),
}

impl<E: Into<DeviceError>> From<E> for ClaimFault {
    fn from(error: E) -> Self {
        ClaimFault::Device(error.into())
    }
}

/// A claim of an end, which ends with this value.
#[derive(Debug)]
pub(crate) struct Claim {
    session: Arc<Session>,
    channel: usize,
    end: End,
}

impl Claim {
    pub(super) fn new(session: Arc<Session>, channel: usize, end: End) -> Self {
        Claim {
            session,
            channel,
            end,
        }
    }

    /// Returns the session that has the claim.
    pub(crate) fn session(&self) -> &Session {
        &self.session
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.session.release(self.channel, self.end);
    }
}

/// Returns the number of a claim, which is not 0, and another one each time.
pub(super) fn number() -> u32 {
    let mut bytes = [0; 4];
    match rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty()) {
        Ok(4) => u32::from_le_bytes(bytes).max(1),
        // The kernel always has so few bytes.
        _ => std::process::id().max(1),
    }
}
