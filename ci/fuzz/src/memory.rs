// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory that somebody else writes between any two of our looks at it.
//!
//! A ring reads shared memory a word at a time, and each time it asks for the words anew ([`Deref`]). So every read can be
//! preceded by writes of the other side, at exactly the instruction that the input chooses: what would be a race of
//! nanoseconds is here a step that can be repeated.
#![expect(unsafe_code, reason = "maps memory with nothing around it")]

use std::cell::{Cell, RefCell};
use std::ops::Deref;
use std::rc::Rc;
use std::sync::OnceLock;

use barlink::protocol::region::words;
use barlink::protocol::{AtomicU64, Ordering};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};

/// Most bytes of a [`Memory`].
pub const MAX_SIZE: usize = 64 << 10;
/// On either side, bytes that fault.
const GUARD: usize = 64 << 10;

/// The other side: called before each of our looks.
pub type Other = Box<dyn FnMut(Words)>;

/// Memory with the fuzzer at its other side. Clones share it; there is one at a time.
#[derive(Clone)]
pub struct Memory(Rc<Inner>);

struct Inner {
    words: Words,
    other: RefCell<Other>,
    quiet: Cell<bool>,
    looks: Cell<u64>,
    limit: Cell<u64>,
}

/// The words themselves, which can be had without a look.
#[derive(Clone, Copy)]
pub struct Words(&'static [AtomicU64]);

impl Words {
    /// Bytes of them.
    pub fn size(self) -> u64 {
        self.0.len() as u64 * 8
    }

    /// The word at an offset.
    pub fn load(self, offset: u64) -> u64 {
        self.0[offset as usize / 8].load(Ordering::Relaxed)
    }

    /// Changes it.
    pub fn store(self, offset: u64, value: u64) {
        self.0[offset as usize / 8].store(value, Ordering::Relaxed);
    }
}

impl Memory {
    /// So many bytes of zeros, which end where nothing is mapped any more, and their other side.
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

    /// The words, without a look.
    pub fn words(&self) -> Words {
        self.0.words
    }

    /// Does something that must be done after so many looks.
    pub fn within<T>(&self, looks: u64, work: impl FnOnce() -> T) -> T {
        self.0.limit.set(self.0.looks.get() + looks);
        let result = work();
        self.0.limit.set(u64::MAX);
        result
    }

    /// Does something while the other side is quiet.
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

/// Memory between pages that fault, so that nothing outside is touched unseen, by copies in assembler neither.
fn guarded() -> &'static [AtomicU64] {
    static WORDS: OnceLock<&[AtomicU64]> = OnceLock::new();
    WORDS.get_or_init(|| {
        // SAFETY: the kernel chooses the address, so nothing is replaced.
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
        // SAFETY: the pages were mapped above, and nobody uses them yet.
        unsafe { rustix::mm::mprotect(start, MAX_SIZE, access) }.expect("memory");
        // SAFETY: these pages can be read and written, are never unmapped, and are reached by nothing else.
        unsafe { words(start.cast(), MAX_SIZE) }
    })
}
