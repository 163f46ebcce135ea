// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A region, for programs. A method that is called with a wrong offset, or with a mapping for
//! reading, returns an error: the ends of channels use the ring's own region instead, which panics.

use barlink_protocol::AtomicU64;
use barlink_protocol::region::OutOfRegion;

use crate::error_kind::ErrorKind;
use crate::memory;

/// A region in this process. Clones share one mapping.
///
/// Offsets are in bytes. [`peek`](Region::peek) and [`poke`](Region::poke) take any offset; the
/// other methods take multiples of 8. Other programs can change every byte at any time.
///
/// In a guest, the memory is gone once the device was unplugged or its driver unbound. An access by
/// any of these methods is then SIGBUS, which ends a process that does not handle that signal.
/// [`Device::wait_until_gone`](crate::guest::Device::wait_until_gone) returns when it happens.
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
    ring: memory::RingRegion,
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
///     Err(RegionError::Outside(range)) => println!("only {} bytes are mapped", range.size()),
///     poked => poked?,
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
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
    /// Returns the class of the error, which is [`ErrorKind::InvalidInput`] for all.
    ///
    /// ```no_run
    /// use barlink::{ErrorKind, host};
    ///
    /// let region = host::connect("default")?.region();
    /// if let Err(error) = region.poke(region.size(), b"behind the end") {
    ///     assert_eq!(error.kind(), ErrorKind::InvalidInput);
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidInput
    }
}

impl Region {
    /// Shows a mapping to programs. `writable` is its first byte that can be written.
    pub(crate) fn new(ring: memory::RingRegion, writable: Option<u64>) -> Self {
        Region { ring, writable }
    }

    /// Returns the region of the ring, for programs of the workspace. Its methods panic at an
    /// offset outside, and a store to a mapping for reading ends the process by SIGSEGV.
    #[doc(hidden)]
    pub fn ring(&self) -> &memory::RingRegion {
        &self.ring
    }

    /// Returns the size of the mapping, in bytes.
    pub fn size(&self) -> u64 {
        self.ring.size()
    }

    /// Copies bytes out of any place in the mapping.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let region = host::connect("default")?.region();
    /// let mut magic = [0; 8];
    /// region.peek(0, &mut magic)?;
    /// assert_eq!(&magic, b"barlink\0");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    /// ```no_run
    /// use barlink::host;
    ///
    /// let broker = host::connect("default")?;
    /// let window = broker.layout().raw_offset;
    /// broker.region().poke(window + 3, b"any offset")?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    /// ```no_run
    /// use barlink::guest;
    ///
    /// let device = guest::open("/dev/barlink0")?;
    /// let mut picture = vec![0; 1 << 20];
    /// device.region().copy_out(device.layout().raw_offset, &mut picture)?;
    /// std::fs::write("picture.raw", picture)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    /// ```no_run
    /// use barlink::guest;
    ///
    /// let device = guest::open("/dev/barlink0")?;
    /// let picture = std::fs::read("picture.raw")?;
    /// device.region().copy_in(device.layout().raw_offset, &picture)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    /// ```no_run
    /// use barlink::host;
    ///
    /// let broker = host::connect("default")?;
    /// let temperature = broker.region().load(broker.layout().raw_offset)?;
    /// println!("{} °C", f64::from_bits(temperature));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    /// ```no_run
    /// use barlink::guest;
    ///
    /// let device = guest::open("/dev/barlink0")?;
    /// let window = device.layout().raw_offset;
    /// device.region().store(window, 21.5_f64.to_bits())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    /// ```no_run
    /// use std::sync::atomic::Ordering;
    ///
    /// use barlink::host;
    ///
    /// let broker = host::connect("default")?;
    /// let region = broker.region();
    /// // One program puts data behind the word, and sets the word when the data is there.
    /// let is_ready = region.word(broker.layout().raw_offset)?;
    /// while is_ready.load(Ordering::Acquire) == 0 {
    ///     std::thread::sleep(std::time::Duration::from_millis(1));
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
