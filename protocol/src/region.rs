// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Shared memory as words. The only file of this crate with `unsafe` in it but for `copy.rs`.
//!
//! Two rules, for memory that another process writes while we look at it:
//!
//! 1. No reference to plain data in it is ever made, only `&[AtomicU64]`: what a word holds can change
//!    between two reads, and the compiler knows so.
//! 2. A value is read once, into a local, checked, and only the local is used.
//!
//! What another process does with accesses of other sizes is outside Rust's model; the hardware's answer
//! is that an aligned 64-bit load gives some mixture of bytes that were stored there, and rule 2 is enough.
#![expect(
    unsafe_code,
    reason = "turns a mapping into words, and lets the kernel copy"
)]

use core::ops::{Deref, Range};

use crate::copy::Copier;
use crate::sync::{AtomicU64, Ordering, fence};
use crate::wire::layout::PAGE_WORDS;

/// The words of a mapping.
///
/// # Safety
///
/// `start` is aligned to 8 bytes; for the whole of `'a` the `length / 8` words from it are mapped, readable
/// (and writable, if anything is stored through the result), and are accessed in this process by no other
/// way than through atomics or the copies of [`Region`].
pub unsafe fn words<'a>(start: *mut u8, length: usize) -> &'a [AtomicU64] {
    // SAFETY: the caller vouches for address, length and lifetime; `AtomicU64` has the size and alignment of
    // `u64`, any bits are valid for it, and shared mutation is what it is for. Writes by other processes are
    // atomic, or tear into some value: see the module's rules.
    unsafe { core::slice::from_raw_parts(start.cast(), length / 8) }
}

/// A range that is not in the mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{length} bytes at {offset:#x} are not in the mapping, which has {size}")]
pub struct OutOfRegion {
    offset: u64,
    length: usize,
    size: u64,
}

/// A region, or the part of it that is mapped, from its first byte on.
///
/// Offsets are in bytes, multiples of 8, and inside the mapping: they come out of a checked
/// [`Layout`](crate::wire::layout::Layout), so one outside is our own error, and panics. One within a word is that word's.
#[derive(Clone, Debug)]
pub struct Region<M> {
    memory: M,
    copier: Copier,
}

impl<M: Deref<Target = [AtomicU64]>> Region<M> {
    /// A region over `memory`, which always derefs to the same words.
    pub fn new(memory: M) -> Self {
        let copier = Copier::detect();
        Region { memory, copier }
    }

    /// The same region, for who has it mapped write-combining, or does not know: there stores overtake each other, and loads
    /// are made early, if nothing is done about it. The ends of channels see to it by what they call here; who loads and stores
    /// words by himself puts a `fence` with `SeqCst` between those that must be in order.
    pub fn over_write_combining(self) -> Self {
        let copier = self.copier.over_combining();
        Region { copier, ..self }
    }

    /// Bytes that are mapped.
    pub fn size(&self) -> u64 {
        self.memory.len() as u64 * 8
    }

    /// The word at an offset.
    pub fn word(&self, offset: u64) -> &AtomicU64 {
        &self.memory[index(offset)]
    }

    /// Reads a word that tells what is in others: what was stored before it is seen after it.
    pub(crate) fn acquire(&self, offset: u64) -> u64 {
        let value = self.word(offset).load(Ordering::Acquire);
        self.copier.fence_loads();
        value
    }

    /// Writes a word that tells what is in others: who sees it sees what was stored, or copied in, before.
    pub(crate) fn release(&self, offset: u64, value: u64) {
        self.copier.fence_stores();
        self.word(offset).store(value, Ordering::Release);
    }

    /// Makes all loads before it come before those behind it.
    pub(crate) fn fence_loads(&self) {
        fence(Ordering::Acquire);
        self.copier.fence_loads();
    }

    /// Makes all accesses before it come before those behind it, and shows what was stored. It needs nothing more where
    /// memory is write-combining: on x86 it is `mfence` or a locked instruction, both of which order accesses of any kind, and
    /// empty the buffers that stores are combined in.
    pub(crate) fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    /// Reads a word that other words do not depend on.
    pub fn load(&self, offset: u64) -> u64 {
        self.word(offset).load(Ordering::Relaxed)
    }

    /// Writes a word that other words do not depend on.
    pub fn store(&self, offset: u64, value: u64) {
        self.word(offset).store(value, Ordering::Relaxed);
    }

    /// A private copy of the page at an offset.
    pub fn page(&self, offset: u64) -> [u64; PAGE_WORDS] {
        core::array::from_fn(|index| self.load(offset + 8 * index as u64))
    }

    /// The words that hold so many bytes from an offset on.
    pub(crate) fn words(&self, offset: u64, bytes: usize) -> &[AtomicU64] {
        let first = index(offset);
        &self.memory[first..first + bytes.div_ceil(8)]
    }

    /// Copies bytes into the region. A last word that they fill in part is padded with zeros.
    #[inline]
    pub fn copy_in(&self, offset: u64, bytes: &[u8]) {
        let target = self.words(offset, bytes.len());
        let (whole, tail) = bytes.split_at(bytes.len() / 8 * 8);
        let (words, last) = target.split_at(whole.len() / 8);
        self.copier.copy_in(words, whole);
        if let [word] = last {
            let mut padded = [0; 8];
            padded[..tail.len()].copy_from_slice(tail);
            word.store(u64::from_le_bytes(padded), Ordering::Relaxed);
        }
    }

    /// Copies bytes out of the region.
    #[inline]
    pub fn copy_out(&self, offset: u64, bytes: &mut [u8]) {
        let source = self.words(offset, bytes.len());
        let (whole, tail) = bytes.split_at_mut(bytes.len() / 8 * 8);
        let (words, last) = source.split_at(whole.len() / 8);
        self.copier.copy_out(whole, words);
        if let [word] = last {
            let padded = word.load(Ordering::Relaxed).to_le_bytes();
            tail.copy_from_slice(&padded[..tail.len()]);
        }
    }

    /// Copies bytes out of any place, for a person who looks; a place that is not mapped is an error.
    pub fn peek(&self, offset: u64, bytes: &mut [u8]) -> Result<(), OutOfRegion> {
        for (word, within, part) in self.cut(offset, bytes.len())? {
            let value = word.load(Ordering::Relaxed).to_le_bytes();
            let length = part.len();
            bytes[part].copy_from_slice(&value[within..within + length]);
        }
        Ok(())
    }

    /// Copies bytes to any place. A word of which they fill a part is read, changed and written back, so the other
    /// part must be nobody else's at that time.
    pub fn poke(&self, offset: u64, bytes: &[u8]) -> Result<(), OutOfRegion> {
        for (word, within, part) in self.cut(offset, bytes.len())? {
            let mut value = word.load(Ordering::Relaxed).to_le_bytes();
            value[within..within + part.len()].copy_from_slice(&bytes[part]);
            word.store(u64::from_le_bytes(value), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Cuts a range into words: each with the first byte in it that is meant, and which bytes of the range those are.
    fn cut(
        &self,
        offset: u64,
        length: usize,
    ) -> Result<impl Iterator<Item = (&AtomicU64, usize, Range<usize>)>, OutOfRegion> {
        let outside = OutOfRegion {
            offset,
            length,
            size: self.size(),
        };
        let end = offset
            .checked_add(length as u64)
            .filter(|&end| end <= self.size())
            .ok_or(outside)?;
        let words = (offset / 8..end.div_ceil(8)).filter(move |_| length > 0);
        Ok(words.map(move |index| {
            let (start, stop) = ((index * 8).max(offset), (index * 8 + 8).min(end));
            let part = (start - offset) as usize..(stop - offset) as usize;
            (
                &self.memory[index as usize],
                (start - index * 8) as usize,
                part,
            )
        }))
    }

    /// Lets the kernel write `length` bytes of the region, from any `offset` on, to a file descriptor: no copy
    /// in user space, and no reference made. Gives what `write(2)` gives: bytes written, or the `errno`.
    #[cfg(not(loom))]
    pub fn write_to(
        &self,
        fd: libc::c_int,
        offset: u64,
        length: usize,
    ) -> Result<usize, libc::c_int> {
        let source = self.bytes(offset, length);
        // SAFETY: the range was bounds-checked and stays mapped while `self` is borrowed; `write` only reads.
        result(unsafe { libc::write(fd, source.cast(), length) })
    }

    /// Lets the kernel fill up to `length` bytes of the region, from `offset` on, from a file descriptor. Gives
    /// what `read(2)` gives: bytes read (0 at the end), or the `errno`.
    #[cfg(not(loom))]
    pub fn read_from(
        &self,
        fd: libc::c_int,
        offset: u64,
        length: usize,
    ) -> Result<usize, libc::c_int> {
        let target = self.bytes(offset, length);
        // SAFETY: the range was bounds-checked and stays mapped while `self` is borrowed; it is shared memory
        // under `AtomicU64`, so a write by someone else, here the kernel, is no surprise to the compiler.
        result(unsafe { libc::read(fd, target.cast(), length) })
    }

    /// The address of a byte at any offset, from which `length` bytes are mapped.
    #[cfg(not(loom))]
    fn bytes(&self, offset: u64, length: usize) -> *mut u8 {
        let within = (offset % 8) as usize;
        let words = self.words(offset - within as u64, within + length);
        words.as_ptr().cast::<u8>().cast_mut().wrapping_add(within)
    }
}

/// The place of a word in the memory.
#[cfg(not(loom))]
fn index(offset: u64) -> usize {
    (offset / 8) as usize
}

/// The place of a word in a model's memory: loom follows every word by itself, so it has only those that are used. The
/// broker's page, the driver's page, and between them one channel, all of one slot.
#[cfg(loom)]
fn index(offset: u64) -> usize {
    use crate::wire::layout::{FIRST_FREE, PAGE_SIZE, channel, presence};
    const HEADER: u64 = FIRST_FREE / PAGE_SIZE;
    const DATA: u64 = HEADER + 1;
    let within = offset % PAGE_SIZE;
    let word = match (offset / PAGE_SIZE, within) {
        (HEADER, channel::GENERATION) => 8,
        (HEADER, channel::READ..) => 9 + (within - channel::READ) / 8,
        (HEADER, _) => 12 + (within - channel::WRITTEN) / 8,
        (DATA, _) => 20 + within / 8,
        (page, _) => {
            let first = if page > DATA { 4 } else { 0 };
            first
                + match within {
                    presence::HOLDERS.. => 2 + (within - presence::HOLDERS) / 8,
                    presence::CONNECTIONS => 1,
                    _ => 0,
                }
        }
    };
    word as usize
}

/// Fills private memory from a file descriptor. Gives what `read(2)` gives.
#[cfg(not(loom))]
pub(crate) fn read(fd: libc::c_int, bytes: &mut [u8]) -> Result<usize, libc::c_int> {
    // SAFETY: the memory is borrowed exclusively, and `read` writes at most its length.
    result(unsafe { libc::read(fd, bytes.as_mut_ptr().cast(), bytes.len()) })
}

#[cfg(not(loom))]
fn result(returned: libc::ssize_t) -> Result<usize, libc::c_int> {
    // SAFETY: the address of errno is this thread's own and always valid.
    usize::try_from(returned).map_err(|_| unsafe { *libc::__errno_location() })
}
