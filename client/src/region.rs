// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A region, for programs. No method faults or panics, whatever offset and mapping it is called
//! with: the ends of channels use the ring's own region instead, which does.

use barlink_protocol::AtomicU64;
use barlink_protocol::region::OutOfRegion;

use crate::error_kind::ErrorKind;
use crate::memory;

/// A region in this process. Clones share one mapping.
///
/// Offsets are in bytes. [`peek`](Region::peek) and [`poke`](Region::poke) take any offset; the
/// other methods take multiples of 8. Other programs can change every byte at any time.
///
/// ```no_run
/// use std::sync::atomic::Ordering;
///
/// use barlink::host;
///
/// let broker = host::connect("default")?;
/// let region = broker.region();
/// // A counter at the start of the raw window, which all programs share.
/// let counter = region.word(broker.layout().raw_offset)?;
/// println!("start {}", counter.fetch_add(1, Ordering::Relaxed));
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Region {
    ring: memory::Region,
    /// First byte that can be written; `None` if none can.
    writable: Option<u64>,
}

/// The reason why bytes of a region cannot be read or written.
///
/// ```no_run
/// use barlink::{RegionError, host};
///
/// let region = host::connect("default")?.region();
/// match region.poke(region.size(), b"behind the end") {
///     Err(RegionError::Outside(error)) => println!("{error}"),
///     poked => poked?,
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// The bytes are not all in the mapping.
    #[error(transparent)]
    Outside(#[from] OutOfRegion),
    /// The offset is not that of a word.
    #[error("offset {offset:#x} is not a multiple of 8: `peek` and `poke` take any offset")]
    Unaligned {
        /// The offset, in bytes.
        offset: u64,
    },
    /// The bytes belong to the start of a region, which guest programs may only read.
    #[error(
        "offset {offset:#x} is in the first {first} bytes, which describe the region and can only be read in a guest"
    )]
    Protected {
        /// The offset, in bytes.
        offset: u64,
        /// Offset of the first byte that can be written.
        first: u64,
    },
    /// The region is mapped for reading.
    #[error("the region is mapped for reading only: attach with `Access::ReadWrite`")]
    ReadOnly,
}

impl RegionError {
    /// Returns the class of the error.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidInput
    }
}

impl Region {
    /// Shows a mapping to programs. `writable` is its first byte that can be written.
    pub(crate) fn new(ring: memory::Region, writable: Option<u64>) -> Self {
        Region { ring, writable }
    }

    /// Returns the region of the ring, for programs of the workspace. Its methods panic at an
    /// offset outside, and a store to a mapping for reading ends the process by SIGSEGV.
    #[doc(hidden)]
    pub fn ring(&self) -> &memory::Region {
        &self.ring
    }

    /// Returns the size of the mapping, in bytes.
    pub fn size(&self) -> u64 {
        self.ring.size()
    }

    /// Copies bytes out of any place in the mapping.
    ///
    /// # Errors
    ///
    /// The bytes are not all in the mapping.
    pub fn peek(&self, offset: u64, bytes: &mut [u8]) -> Result<(), RegionError> {
        Ok(self.ring.peek(offset, bytes)?)
    }

    /// Copies bytes to any place in the mapping. A word that the bytes fill in part is loaded,
    /// changed and stored, so no other program may change the rest of that word meanwhile.
    ///
    /// # Errors
    ///
    /// The bytes are not all in the mapping, or they or all of it are for reading only.
    pub fn poke(&self, offset: u64, bytes: &[u8]) -> Result<(), RegionError> {
        self.check_writable(offset)?;
        Ok(self.ring.poke(offset, bytes)?)
    }

    /// Copies many bytes out of the region, in the way that is fast for its cache mode.
    ///
    /// # Errors
    ///
    /// The bytes are not all in the mapping, or the offset is not a multiple of 8.
    pub fn copy_out(&self, offset: u64, bytes: &mut [u8]) -> Result<(), RegionError> {
        self.check(offset, bytes.len())?;
        self.ring.copy_out(offset, bytes);
        Ok(())
    }

    /// Copies many bytes into the region, in the way that is fast for its cache mode. If the bytes
    /// end within a word, the rest of that word becomes zero.
    ///
    /// # Errors
    ///
    /// The bytes are not all in the mapping, they or all of it are for reading only, or the offset
    /// is not a multiple of 8.
    pub fn copy_in(&self, offset: u64, bytes: &[u8]) -> Result<(), RegionError> {
        self.check_writable(offset)?;
        self.check(offset, bytes.len())?;
        self.ring.copy_in(offset, bytes);
        Ok(())
    }

    /// Loads a word that no other words depend on.
    ///
    /// # Errors
    ///
    /// The word is not in the mapping, or the offset is not a multiple of 8.
    pub fn load(&self, offset: u64) -> Result<u64, RegionError> {
        self.check(offset, 8)?;
        Ok(self.ring.load(offset))
    }

    /// Stores a word that no other words depend on.
    ///
    /// # Errors
    ///
    /// The word is not in the mapping, it or all of it is for reading only, or the offset is not a
    /// multiple of 8.
    pub fn store(&self, offset: u64, value: u64) -> Result<(), RegionError> {
        self.check_writable(offset)?;
        self.check(offset, 8)?;
        self.ring.store(offset, value);
        Ok(())
    }

    /// Returns the word at an offset, for atomic accesses.
    ///
    /// # Errors
    ///
    /// The word is not in the mapping, it or the mapping is for reading only, or the offset is not
    /// a multiple of 8.
    pub fn word(&self, offset: u64) -> Result<&AtomicU64, RegionError> {
        self.check_writable(offset)?;
        self.check(offset, 8)?;
        Ok(self.ring.word(offset))
    }

    fn check_writable(&self, offset: u64) -> Result<(), RegionError> {
        match self.writable {
            Some(first) if offset >= first => Ok(()),
            Some(first) => Err(RegionError::Protected { offset, first }),
            None => Err(RegionError::ReadOnly),
        }
    }

    /// Checks that bytes from the start of a word on are in the mapping.
    fn check(&self, offset: u64, length: usize) -> Result<(), RegionError> {
        if !offset.is_multiple_of(8) {
            return Err(RegionError::Unaligned { offset });
        }
        Ok(self.ring.check(offset, length)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Mapping;

    #[test]
    fn first_pages_of_guest_refuse_writes() {
        const FIRST: u64 = 8192;
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * FIRST).unwrap();
        let mapping = Mapping::map_behind(&file, 4 * FIRST as usize, FIRST as usize).unwrap();
        let region = Region::new(mapping.region(), mapping.writable());
        let offset = FIRST - 8;
        let refused = RegionError::Protected {
            offset,
            first: FIRST,
        };
        assert_eq!(region.poke(offset, &[0; 16]), Err(refused));
        assert_eq!(region.copy_in(offset, &[0; 16]), Err(refused));
        assert_eq!(region.store(offset, 1), Err(refused));
        assert_eq!(region.word(offset).map(drop), Err(refused));
        region.poke(FIRST, &[1]).unwrap();
        assert_eq!((region.load(offset), region.load(FIRST)), (Ok(0), Ok(1)));
    }
}
