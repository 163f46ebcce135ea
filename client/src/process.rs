// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The process that a value belongs to.
//!
//! `fork(2)` copies every value of a process. A copied end would write to the channel beside the
//! original, and a copied claim would release an end that is still in use. So such a value stores
//! the process that made it, and does nothing in another process.

#![expect(unsafe_code, reason = "the kernel marks a forked process in a page")]

use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Number of the next process. It is 1 at first, and in a forked process greater than the number of
/// every value in it.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// A process, for values that it made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Process {
    /// The number of the process that uses the value, if the kernel marks forked processes.
    current: Option<&'static AtomicU64>,
    number: u64,
    id: u32,
}

impl Process {
    /// Returns the calling process.
    pub(crate) fn current() -> Self {
        let current = *page();
        Process {
            current,
            number: number(current),
            id: std::process::id(),
        }
    }

    /// Returns the ID of the process that a value belongs to as an error, if the calling process is
    /// another one.
    #[inline(always)]
    pub(crate) fn check(&self) -> Result<(), u32> {
        let number = match self.current {
            Some(current) => current.load(Ordering::Relaxed),
            None => std::process::id().into(),
        };
        match number == self.number {
            true => Ok(()),
            false => Err(self.id),
        }
    }
}

/// Returns the number of the calling process. A forked process takes a new one.
fn number(current: Option<&AtomicU64>) -> u64 {
    let Some(current) = current else {
        return std::process::id().into();
    };
    match current.load(Ordering::Relaxed) {
        0 => {
            let new = NEXT.fetch_add(1, Ordering::Relaxed);
            let order = Ordering::Relaxed;
            match current.compare_exchange(0, new, order, order) {
                Ok(_) => new,
                Err(number) => number,
            }
        }
        number => number,
    }
}

/// Returns the word with the number of the calling process. The kernel sets it to 0 in a forked
/// process (`MADV_WIPEONFORK`, Linux 4.14). `None` if the kernel does not.
fn page() -> &'static Option<&'static AtomicU64> {
    static PAGE: OnceLock<Option<&'static AtomicU64>> = OnceLock::new();
    PAGE.get_or_init(|| {
        let size = rustix::param::page_size();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE;
        // SAFETY: the kernel chooses the address, so no memory of this process is replaced.
        let page =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), size, protection, flags) }.ok()?;
        // SAFETY: the page was just mapped, and nothing is in it that a forked process misses.
        let wiped = unsafe { rustix::mm::madvise(page, size, Advice::LinuxWipeOnFork) };
        if wiped.is_err() {
            // SAFETY: nothing refers to the page.
            let _ = unsafe { rustix::mm::munmap(page, size) };
            return None;
        }
        let word = NonNull::new(page.cast::<AtomicU64>())?;
        // SAFETY: the page is aligned and zeroed, has room for the word, and stays mapped until the
        // process ends. All accesses are atomic.
        Some(unsafe { word.as_ref() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_share_one_process() {
        let made = Process::current();
        let there = std::thread::spawn(move || (made.check(), Process::current().number));
        let (checked, number) = there.join().unwrap();
        assert_eq!(checked, Ok(()));
        assert_eq!(number, made.number);
    }
}
