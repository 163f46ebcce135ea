// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which pages of a guest's memory a queue has had the broker touch. A page that nobody has used before comes into being by
//! that, at the broker's cost; so there are only so many.

use std::collections::BTreeSet;

use virtio_queue::Error;
use vm_memory::GuestAddress;

const PAGE: u64 = 4096;
/// Most pages of a queue in a session: 16 MiB. A driver's queue has some ten each time that it is loaded, mostly the same.
const MOST: usize = 4096;

/// See the module.
#[derive(Debug, Default)]
pub struct Footprint(BTreeSet<u64>);

impl Footprint {
    /// Notes that so many bytes are about to be touched, which are few. Fails if there would be too many pages.
    pub fn grow(&mut self, place: GuestAddress, length: u64) -> Result<(), Error> {
        let last = place.0.checked_add(length.saturating_sub(1));
        let last = last.ok_or(Error::AddressOverflow)? / PAGE;
        for page in place.0 / PAGE..=last {
            if self.0.len() == MOST && !self.0.contains(&page) {
                return Err(Error::QueueNotReady);
            }
            self.0.insert(page);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_counted_once_and_there_is_an_end_to_them() {
        let mut footprint = Footprint::default();
        footprint.grow(GuestAddress(PAGE - 2), 4).unwrap();
        for page in 2..MOST as u64 {
            footprint.grow(GuestAddress(page * PAGE), 4).unwrap();
        }
        // All of them again, and none besides.
        for page in 0..MOST as u64 {
            footprint.grow(GuestAddress(page * PAGE + 8), 4).unwrap();
        }
        let beyond = GuestAddress(MOST as u64 * PAGE);
        footprint.grow(beyond, 4).unwrap_err();
        footprint.grow(GuestAddress(beyond.0 - 2), 4).unwrap_err();
        footprint.grow(GuestAddress(u64::MAX), 4).unwrap_err();
    }
}
