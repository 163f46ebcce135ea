// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Who holds which end of a channel, of host apps, and channels that are emptied.

use barlink_protocol::wire::layout::End;
use barlink_protocol::{PresenceWords, state};

use super::{ClientId, Shared};
use barlink::control::message::Refusal;

impl Shared {
    /// Gives one end of a channel to a host app.
    pub fn claim(
        &self,
        client: ClientId,
        pid: u32,
        channel: usize,
        end: End,
    ) -> Result<(), Refusal> {
        let entry = self.channel(channel)?;
        let name = || entry.name.to_string();
        if entry.peer(end) != self.layout.host() {
            let peer = format!("slot {}'s VM", entry.peer(end));
            return Err(Refusal::NotHost {
                channel: name(),
                end,
                peer,
            });
        }
        let state = self.lock();
        if let Some((_, word)) = state.ledger.holder(channel, end) {
            return Err(Refusal::Held {
                channel: name(),
                end,
                pid: word as u32,
            });
        }
        let word = state.ledger.next_claim() << 32 | u64::from(pid);
        state.ledger.set_holder(channel, end, client, word);
        self.write_holder(channel, end, word);
        Ok(())
    }

    /// Ends a claim.
    pub fn release(&self, client: ClientId, channel: usize, end: End) -> Result<(), Refusal> {
        self.channel(channel)?;
        let state = self.lock();
        if state.ledger.holder(channel, end).map(|(owner, _)| owner) != Some(client) {
            return Err(Refusal::NotHeld);
        }
        state.ledger.clear_holder(channel, end);
        self.write_holder(channel, end, 0);
        Ok(())
    }

    /// Ends all claims of a host app that is gone, and gives what these were.
    pub fn release_all(&self, client: ClientId) -> Vec<String> {
        let mut held = Vec::new();
        for (channel, entry) in self.layout.channels().iter().enumerate() {
            for end in [End::Producer, End::Consumer] {
                if self.release(client, channel, end).is_ok() {
                    held.push(format!("the {end} of `{}`", entry.name));
                }
            }
        }
        held
    }

    /// Empties a channel that nobody uses.
    pub fn reset(&self, channel: usize) -> Result<u64, Refusal> {
        let entry = self.channel(channel)?;
        let in_use = |holder| Refusal::InUse {
            channel: entry.name.to_string(),
            holder,
        };
        // Held while the channel is written, so that no host app claims it in between.
        let state = self.lock();
        let ends = [End::Producer, End::Consumer];
        let held = ends
            .iter()
            .find_map(|&end| state.ledger.holder(channel, end));
        if let Some((_, word)) = held {
            return Err(in_use(format!("process {} on the host", word as u32)));
        }
        let mut guest = None;
        let generation = state::reset(&self.region, entry, || {
            guest = ends.into_iter().find_map(|end| {
                let words =
                    PresenceWords::find(&self.layout, channel, end, self.layout.region_size);
                let process = words?.read(&self.region).process()?;
                (entry.peer(end) != self.layout.host()).then_some((process, entry.peer(end)))
            });
            guest.is_none()
        });
        generation.ok_or_else(|| {
            let (process, slot) = guest.unwrap_or_default();
            in_use(format!("process {process} in slot {slot}'s VM"))
        })
    }
}
