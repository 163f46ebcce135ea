// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The state that all threads of a broker share: the region, the slots, and the roster.

mod roster;

use std::sync::Arc;
use std::time::Instant;

use parking_lot::RwLock;

pub use self::roster::{Claim, Emptied, QuiescedRoster, Roster};
use super::policy::Policy;
use crate::persistence::DescriptorStore;
use crate::slot::{QuiescedSlot, ReadError, SharedRegion, Slot};

/// The shared state of a broker. Of the region the broker writes the superblock, once, its own
/// presence page, a channel that it resets, and the epoch of a driver that is gone.
pub struct BrokerState {
    /// The region.
    pub region: Arc<SharedRegion>,
    /// The slots, by ID.
    pub slots: Vec<Arc<Slot>>,
    /// The host's claims.
    pub roster: Roster,
    /// The descriptors that outlive this broker.
    pub descriptors: Arc<DescriptorStore>,
    /// The policy that admits clients.
    pub policy: Policy,
    /// The time at which the broker started.
    pub start: Instant,
    /// Held for reading while a VM is admitted, and for writing during a hand-over.
    pub(crate) hand_over_lock: RwLock<()>,
}

/// A broker that is quiesced: every change of its state waits until this is dropped.
pub(crate) struct Quiesced<'a> {
    _roster: QuiescedRoster<'a>,
    _slots: Vec<QuiescedSlot<'a>>,
}

impl Quiesced<'_> {
    /// Keeps the broker quiesced until this process ends, because the state belongs to the
    /// successor.
    pub fn for_ever(self) {
        std::mem::forget(self);
    }
}

impl BrokerState {
    /// Makes every change of the state wait until the result is dropped.
    pub(crate) fn quiesce(&self) -> Quiesced<'_> {
        Quiesced {
            _roster: self.roster.quiesce(),
            _slots: self.slots.iter().map(|slot| slot.quiesce()).collect(),
        }
    }

    /// Rejects the requests for guest memory that wait for VMs.
    pub(crate) fn reject_requests(&self, why: ReadError) {
        for slot in &self.slots {
            slot.requests().reject_all(why);
        }
    }
}
