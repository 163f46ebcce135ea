// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The pages of a guest's memory that a queue makes the broker access. An access to an unused page
//! allocates it, at the broker's cost, so their number is limited. A page is identified by its
//! file, because a VMM can map ever new files at the same addresses.

use std::collections::BTreeSet;

use virtio_queue::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const PAGE: u64 = 4096;
/// Most pages of a queue in a session: 16 MiB. A driver that is loaded uses about ten, mostly the
/// same ones each time.
const MOST: usize = 4096;

/// The numbers of a file system, a file in it, and a page of the file.
type Page = (u64, u64, u64);

/// The pages of one queue.
#[derive(Debug, Default)]
pub struct Footprint(BTreeSet<Page>);

impl Footprint {
    /// Adds the pages of a few bytes before an access. Fails if there would be too many pages.
    /// Addresses without memory have no pages.
    pub fn grow(
        &mut self,
        memory: &GuestMemoryMmap,
        place: GuestAddress,
        length: u64,
    ) -> Result<(), Error> {
        let end = place.0.checked_add(length).ok_or(Error::AddressOverflow)?;
        let mut next = place.0;
        while next < end {
            if let Some(page) = page(memory, GuestAddress(next))? {
                if self.0.len() == MOST && !self.0.contains(&page) {
                    return Err(Error::QueueNotReady);
                }
                self.0.insert(page);
            }
            next = (next | (PAGE - 1))
                .checked_add(1)
                .ok_or(Error::AddressOverflow)?;
        }
        Ok(())
    }
}

/// Returns the page at an address, if there is one.
fn page(memory: &GuestMemoryMmap, place: GuestAddress) -> Result<Option<Page>, Error> {
    let Some((region, offset)) = memory.to_region_addr(place) else {
        return Ok(None);
    };
    let Some(file) = region.file_offset() else {
        return Ok(None);
    };
    // This does not wait, because the guard has checked that the file is a memfd.
    let stat = rustix::fs::fstat(file.file()).map_err(|_| Error::QueueNotReady)?;
    let offset = file.start().checked_add(offset.0);
    let page = offset.ok_or(Error::AddressOverflow)? / PAGE;
    Ok(Some((stat.st_dev, stat.st_ino, page)))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::FileOffset;

    use super::*;

    const SIZE: u64 = 8 * MOST as u64 * PAGE;

    fn file() -> File {
        let file = File::from(memfd_create("ram", MemfdFlags::empty()).unwrap());
        file.set_len(SIZE).unwrap();
        file
    }

    fn memory(file: &File) -> GuestMemoryMmap {
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let range = (GuestAddress(0), SIZE as usize, Some(offset));
        GuestMemoryMmap::from_ranges_with_files([range]).unwrap()
    }

    #[test]
    fn counts_pages_once_up_to_limit() {
        let memory = memory(&file());
        let mut footprint = Footprint::default();
        let mut grow = |place| footprint.grow(&memory, GuestAddress(place), 4);
        grow(PAGE - 2).unwrap();
        for page in 2..MOST as u64 {
            grow(page * PAGE).unwrap();
        }
        // The pages that were counted can be accessed again, and no others can.
        for page in 0..MOST as u64 {
            grow(page * PAGE + 8).unwrap();
        }
        let beyond = MOST as u64 * PAGE;
        grow(beyond).unwrap_err();
        grow(beyond - 2).unwrap_err();
        grow(u64::MAX).unwrap_err();
        // Addresses without memory do not count.
        grow(2 * SIZE).unwrap();
    }

    #[test]
    fn other_files_have_other_pages() {
        let files = [file(), file()];
        let mut footprint = Footprint::default();
        for file in &files {
            let memory = memory(file);
            for page in 0..MOST as u64 / 2 {
                let place = GuestAddress(page * PAGE);
                footprint.grow(&memory, place, 4).unwrap();
            }
        }
        let place = GuestAddress(SIZE / 2);
        footprint.grow(&memory(&files[0]), place, 4).unwrap_err();
        // A known page is known in any mapping.
        footprint
            .grow(&memory(&files[0]), GuestAddress(0), 4)
            .unwrap();
    }
}
