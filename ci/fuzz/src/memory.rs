// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory that the other side writes between any two looks at it.
//!
//! A ring reads shared memory a word at a time, and borrows the words anew for each read
//! ([`Deref`]). So each read can come after writes of the other side, at exactly the instruction
//! that the input chooses. A race of nanoseconds becomes a step that can be repeated.
#![expect(unsafe_code, reason = "maps memory with nothing around it")]

use std::cell::{Cell, RefCell};
use std::ops::Deref;
use std::rc::Rc;
use std::sync::OnceLock;

use barlink_protocol::region::words;
use barlink_protocol::{AtomicU64, Ordering};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};

/// Most bytes of a [`Memory`].
pub const MAX_SIZE: usize = 64 << 10;
/// Bytes on either side that fault.
const GUARD: usize = 64 << 10;

/// The other side: a function that is called before each look.
pub type Other = Box<dyn FnMut(Words)>;

/// Memory whose other side is the fuzzer. Clones share the memory. At most one memory exists at a
/// time.
#[derive(Clone)]
pub struct Memory(Rc<Inner>);

struct Inner {
    words: Words,
    other: RefCell<Other>,
    quiet: Cell<bool>,
    looks: Cell<u64>,
    limit: Cell<u64>,
}

/// The words themselves. An access through them does not count as a look.
#[derive(Clone, Copy)]
pub struct Words(&'static [AtomicU64]);

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        self.0
    }
}

impl Words {
    /// Returns the size in bytes.
    pub fn size(self) -> u64 {
        self.0.len() as u64 * 8
    }

    /// Returns the word at a byte offset.
    pub fn load(self, offset: u64) -> u64 {
        self.0[offset as usize / 8].load(Ordering::Relaxed)
    }

    /// Writes the word at a byte offset.
    pub fn store(self, offset: u64, value: u64) {
        self.0[offset as usize / 8].store(value, Ordering::Relaxed);
    }
}

impl Memory {
    /// Creates `size` zero bytes that end at the unmapped guard, and sets the other side.
    pub fn new(size: usize, other: Other) -> Self {
        let words = &guarded()[(MAX_SIZE - size.min(MAX_SIZE)).div_ceil(8)..];
        for word in words {
            word.store(0, Ordering::Relaxed);
        }
        Memory(Rc::new(Inner {
            words: Words(words),
            other: RefCell::new(other),
            quiet: Cell::new(false),
            looks: Cell::new(0),
            limit: Cell::new(u64::MAX),
        }))
    }

    /// Returns the words, without a look.
    pub fn words(&self) -> Words {
        self.0.words
    }

    /// Runs `work`, and fails if it takes more than this number of looks.
    pub fn within<T>(&self, looks: u64, work: impl FnOnce() -> T) -> T {
        self.0.limit.set(self.0.looks.get() + looks);
        let result = work();
        self.0.limit.set(u64::MAX);
        result
    }

    /// Runs `work` without writes of the other side.
    pub fn quietly<T>(&self, work: impl FnOnce() -> T) -> T {
        self.0.quiet.set(true);
        let result = work();
        self.0.quiet.set(false);
        result
    }
}

impl Deref for Memory {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        let inner = &*self.0;
        inner.looks.set(inner.looks.get() + 1);
        assert!(
            inner.looks.get() <= inner.limit.get(),
            "one call looks at the memory without end"
        );
        if !inner.quiet.get() {
            (inner.other.borrow_mut())(inner.words);
        }
        inner.words.0
    }
}

/// Maps memory between pages that fault, so that each access outside is noticed, even by copies in
/// assembler.
fn guarded() -> &'static [AtomicU64] {
    static WORDS: OnceLock<&[AtomicU64]> = OnceLock::new();
    WORDS.get_or_init(|| {
        // SAFETY: the kernel chooses the address, so no mapping is replaced.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                GUARD + MAX_SIZE + GUARD,
                ProtFlags::empty(),
                MapFlags::PRIVATE,
            )
        };
        let start = start.expect("memory").wrapping_byte_add(GUARD);
        let access = MprotectFlags::READ | MprotectFlags::WRITE;
        // SAFETY: the pages were mapped above, and are not in use yet.
        unsafe { rustix::mm::mprotect(start, MAX_SIZE, access) }.expect("memory");
        // SAFETY: these pages can be read and written, are never unmapped, and no other reference
        // or pointer reaches them.
        unsafe { words(start.cast(), MAX_SIZE) }
    })
}
