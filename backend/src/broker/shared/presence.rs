// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a broker says of who is there in its own page of the region, and whom it rings for it (`docs/protocol.md`, section 3).

use std::sync::atomic::fence;

use barlink_protocol::Ordering;
use barlink_protocol::wire::layout::{BROKER_PAGE, End, presence};
use log::warn;

use super::Shared;

impl Shared {
    /// Writes the whole of the broker's page as the ledger has it, and wakes everybody.
    pub(super) fn tell_all(&self) {
        let state = self.lock();
        for slot in 0..self.layout.slots {
            self.write_connection(slot, state.ledger.connection(slot));
        }
        for channel in 0..self.layout.channels().len() {
            for end in [End::Producer, End::Consumer] {
                let holder = state.ledger.holder(channel, end);
                self.write_holder(channel, end, holder.map_or(0, |(_, word)| word));
            }
        }
        self.write_epoch(state.ledger.epoch());
    }

    /// Says in the region that the host is gone.
    pub fn leave(&self) {
        let state = self.lock();
        state.ledger.set_epoch(state.ledger.epoch().wrapping_add(1));
        self.write_epoch(state.ledger.epoch());
    }

    /// Makes the epoch of a slot's driver even: its guest is gone, and could not say so. Its holder words mean nothing then, and
    /// the next driver goes on from this epoch. A guest that writes there all the same tells a lie about itself alone.
    pub(super) fn end_driver(&self, slot: u32) {
        let page = self.layout.presence_page(slot);
        let epoch = self.region.word(page + presence::EPOCH);
        // SYNC: present; as the driver itself does it. `write_connection` rings the host for it.
        let old = epoch.load(Ordering::Acquire);
        if old % 2 == 1 {
            epoch.store(old.wrapping_add(1), Ordering::Release);
        }
    }

    fn write_epoch(&self, epoch: u64) {
        self.write(presence::EPOCH, epoch);
        for slot in 0..self.layout.slots {
            self.ring_control(slot);
        }
    }

    pub(super) fn write_connection(&self, slot: u32, connection: u64) {
        self.write(presence::CONNECTIONS + 8 * u64::from(slot), connection);
        self.ring_control(self.layout.host());
    }

    pub(super) fn write_holder(&self, channel: usize, end: End, word: u64) {
        self.write(presence::holder(channel, end), word);
        if let Ok(entry) = self.channel(channel) {
            self.ring_control(entry.peer(end.other()));
        }
    }

    fn write(&self, offset: u64, word: u64) {
        // SYNC: present; pairs with the Acquire load in `PresenceWords::read`.
        self.region
            .word(BROKER_PAGE + offset)
            .store(word, Ordering::Release);
    }

    /// Rings vector 0 of a peer. A VM without its driver is not rung: there is nobody to hear it, and a QEMU without
    /// KVM dies of a ring for a device that was unplugged.
    fn ring_control(&self, peer: u32) {
        // SYNC: told-then-epoch; a driver stores its epoch before it lets anybody read what we have told.
        fence(Ordering::SeqCst);
        if peer < self.layout.slots && !self.has_driver(peer) {
            return;
        }
        if let Some(Err(error)) = self.bells(peer).first().map(|bell| bell.ring()) {
            warn!("peer {peer} is not rung: {error}");
        }
    }

    /// Whether the VM that is connected to a slot has its driver loaded, by what that driver tells.
    fn has_driver(&self, slot: u32) -> bool {
        let load = |offset| self.region.word(offset).load(Ordering::Acquire);
        let connection = BROKER_PAGE + presence::CONNECTIONS + 8 * u64::from(slot);
        let epoch = self.layout.presence_page(slot) + presence::EPOCH;
        load(connection) != 0 && load(epoch) % 2 == 1
    }
}
