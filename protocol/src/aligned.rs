// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Private buffers for files that cannot use the memory of a region, such as files with `O_DIRECT`
//! in a guest.

extern crate std;

use std::vec::Vec;

use crate::io;

/// Alignment that files with `O_DIRECT` accept for addresses and lengths, in bytes (`open(2)`).
pub const ALIGNMENT: usize = 4096;

/// A buffer at an address that is a multiple of [`ALIGNMENT`].
#[derive(Debug, Default)]
pub struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
}

impl AlignedBuffer {
    /// Allocates a buffer of `length` zero bytes. The error says that the memory is not there,
    /// because `length` can come from a user.
    pub fn new(length: usize) -> io::Result<Self> {
        let mut bytes = Vec::new();
        let size = length.saturating_add(ALIGNMENT);
        let reserved = bytes.try_reserve_exact(size);
        reserved.map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        bytes.resize(size, 0);
        let start = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Ok(AlignedBuffer { bytes, start })
    }

    /// Returns whether nothing is allocated, as by default.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Returns the bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        let length = self.bytes.len().saturating_sub(ALIGNMENT);
        &mut self.bytes[self.start..self.start + length]
    }
}
