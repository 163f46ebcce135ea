// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An eventfd that neither ringing nor draining blocks on, whatever others do to it.
//!
//! It is made non-blocking, but that is a property of the open file, which all copies share: QEMU makes every
//! descriptor that it receives blocking (`tcp_chr_recv` in `chardev/char-socket.c`).
#![expect(
    unsafe_code,
    reason = "lends and gives the descriptor of an `EventFd`, which has no safe way to do so"
)]

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags};
use rustix::io::ReadWriteFlags;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A doorbell: one vector of one peer.
#[derive(Debug)]
pub struct Bell(EventFd);

impl Bell {
    /// Makes one that was not rung.
    pub fn new() -> std::io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Bell)
    }

    /// A second descriptor of the same doorbell.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        self.0.try_clone().map(Bell)
    }

    /// Rings. One that is full has rings enough to wake up to.
    pub fn ring(&self) -> std::io::Result<()> {
        let mut ready = [PollFd::new(self, PollFlags::OUT)];
        let now = rustix::time::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        if rustix::event::poll(&mut ready, Some(&now))? == 1 {
            self.0.write(1)?;
        }
        Ok(())
    }

    /// Forgets all rings so far.
    pub fn drain(&self) {
        let mut count = [0; 8];
        // Without a ring it is EAGAIN, which is as good.
        let _ = rustix::io::preadv2(
            self,
            &mut [IoSliceMut::new(&mut count)],
            u64::MAX,
            ReadWriteFlags::NOWAIT,
        );
    }
}

impl From<OwnedFd> for Bell {
    /// Takes over an eventfd that another broker made.
    fn from(descriptor: OwnedFd) -> Self {
        // SAFETY: the descriptor is ours, and is given up here.
        Bell(unsafe { EventFd::from_raw_fd(descriptor.into_raw_fd()) })
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd owns the descriptor, and is borrowed as long as it is lent.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(bell: &Bell) -> Option<u64> {
        let mut bytes = [0; 8];
        let read = rustix::io::preadv2(
            bell,
            &mut [IoSliceMut::new(&mut bytes)],
            u64::MAX,
            ReadWriteFlags::NOWAIT,
        );
        read.ok().map(|_| u64::from_ne_bytes(bytes))
    }

    /// What QEMU does to it.
    fn make_blocking(bell: &Bell) {
        let flags = rustix::fs::fcntl_getfl(bell).unwrap() - rustix::fs::OFlags::NONBLOCK;
        rustix::fs::fcntl_setfl(bell, flags).unwrap();
    }

    #[test]
    fn draining_does_not_block_on_a_doorbell_that_was_not_rung() {
        let bell = Bell::new().unwrap();
        make_blocking(&bell);
        bell.drain();
        bell.ring().unwrap();
        bell.ring().unwrap();
        assert_eq!(count(&bell), Some(2));
        bell.ring().unwrap();
        bell.drain();
        assert_eq!(count(&bell), None);
    }

    #[test]
    fn ringing_does_not_block_on_a_doorbell_that_is_full() {
        let bell = Bell::new().unwrap();
        make_blocking(&bell);
        bell.0.write(u64::MAX - 1).unwrap();
        bell.ring().unwrap();
        assert_eq!(count(&bell), Some(u64::MAX - 1));
    }
}
