// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The broker's page of the region, which shows the peers the broker's epoch, the connected VMs and
//! the host's claims (`docs/protocol.md`, section 3). Each change rings the peers that it concerns.

use std::sync::atomic::fence;

use barlink_protocol::Ordering;
use barlink_protocol::wire::layout::{BROKER_PAGE, End, presence};
use log::warn;

use super::region::SharedRegion;

impl SharedRegion {
    /// Publishes the broker's epoch to all peers. An even epoch means that the broker has ended,
    /// and not that the ends of host apps have.
    pub(crate) fn publish_epoch(&self, epoch: u64) {
        self.publish(presence::EPOCH, epoch);
        for peer in 0..=self.layout().host() {
            self.ring_control(peer);
        }
    }

    /// Publishes the number of a slot's connection, 0 for none, to the host.
    pub(super) fn publish_connection(&self, slot: u32, connection: u64) {
        self.publish(presence::CONNECTIONS + 8 * u64::from(slot), connection);
        self.ring_control(self.layout().host());
    }

    /// Publishes the holder of an end, 0 for none, to the peer of the other end, if there is one.
    pub(crate) fn publish_holder(&self, channel: usize, end: End, word: u64) {
        self.publish(presence::holder(channel, end), word);
        if let Some(entry) = self.channel(channel).filter(|entry| entry.has_consumer()) {
            self.ring_control(entry.peer(end.other()));
        }
    }

    /// Makes the epoch of a slot's driver even, because its guest is gone and did not do so. The
    /// driver's holder words mean nothing then, and the next driver continues from this epoch. A
    /// guest that still writes there harms only itself.
    ///
    /// Before that, `keep` gets the even epoch.
    pub(super) fn end_driver(&self, slot: u32, keep: impl FnOnce(u64)) {
        let page = self.layout().presence_page(slot);
        let epoch = self.words().word(page + presence::EPOCH);
        // SYNC: present; the driver changes its epoch in the same way. `publish_connection` rings
        // the host after this store.
        let old = epoch.load(Ordering::Acquire);
        if old % 2 == 1 {
            let ended = old.wrapping_add(1);
            keep(ended);
            epoch.store(ended, Ordering::Release);
        }
    }

    /// Returns the epoch of a slot's driver.
    pub(super) fn driver_epoch(&self, slot: u32) -> u64 {
        let page = self.layout().presence_page(slot);
        self.words()
            .word(page + presence::EPOCH)
            .load(Ordering::Acquire)
    }

    /// Answers the questions of all drivers whether the broker is alive. `answered` has the answers
    /// so far, by slot; it is empty at first.
    pub(crate) fn answer_drivers(&self, answered: &mut Vec<u64>) {
        let is_first = answered.is_empty();
        answered.resize(self.layout().slots as usize, 0);
        for (slot, answered) in (0..).zip(answered) {
            let asked = self.layout().presence_page(slot) + presence::ASKED;
            let count = self.words().load(asked);
            if is_first || count != *answered {
                *answered = count;
                self.publish(presence::ANSWERS + 8 * u64::from(slot), count);
            }
        }
    }

    fn publish(&self, offset: u64, word: u64) {
        // SYNC: present; pairs with the Acquire load in `PresenceWords::read`.
        self.words()
            .word(BROKER_PAGE + offset)
            .store(word, Ordering::Release);
    }

    /// Rings vector 0 of a peer. A VM without its driver is not rung: the ring has no receiver, and
    /// a QEMU without KVM dies of a ring for a device that was unplugged.
    pub(crate) fn ring_control(&self, peer: u32) {
        // SYNC: publish-then-epoch; a driver stores its epoch before its guest reads what is
        // published.
        fence(Ordering::SeqCst);
        if peer < self.layout().slots && !self.has_driver(peer) {
            return;
        }
        if let Some(Err(error)) = self.eventfds(peer).first().map(|eventfd| eventfd.ring()) {
            warn!("peer {peer} is not rung: {error}");
        }
    }

    /// Returns whether the VM of a slot has its driver loaded, by the driver's own word.
    fn has_driver(&self, slot: u32) -> bool {
        let load = |offset| self.words().word(offset).load(Ordering::Acquire);
        let connection = BROKER_PAGE + presence::CONNECTIONS + 8 * u64::from(slot);
        let epoch = self.layout().presence_page(slot) + presence::EPOCH;
        load(connection) != 0 && load(epoch) % 2 == 1
    }
}
