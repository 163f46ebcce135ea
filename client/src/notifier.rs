// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An eventfd that neither ringing nor draining blocks on, whatever other processes do to it.
//!
//! The eventfd is created non-blocking, but that is a property of the open file, which all copies
//! share. QEMU makes every descriptor that it receives blocking (`tcp_chr_recv` in
//! `chardev/char-socket.c`). A write could then wait as long as another holder keeps the eventfd
//! full. So the kernel is asked to ring it, which never waits
//! (`docs/decisions/0006-ringing-cannot-block.md`).
#![expect(
    unsafe_code,
    reason = "lends and gives the descriptor of an `EventFd`, which has no safe way to do so"
)]

use std::fs::File;
use std::io::{self, IoSliceMut, PipeWriter, pipe};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use std::sync::LazyLock;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::MemfdFlags;
use rustix::io::ReadWriteFlags;
use vmm_sys_util::aio::{IOCB_CMD_PREAD, IOCB_FLAG_RESFD, IoContext, IoControlBlock, IoEvent};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An eventfd for one vector of one peer.
#[derive(Debug)]
pub struct Notifier(EventFd);

impl Notifier {
    /// Creates an eventfd that was not rung.
    pub fn new() -> std::io::Result<Self> {
        LazyLock::force(&RINGER);
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Notifier)
    }

    /// Duplicates the descriptor.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        self.0.try_clone().map(Notifier)
    }

    /// Rings. A process that waits for an edge gets one even if the eventfd is full.
    pub fn ring(&self) -> io::Result<()> {
        match &*RINGER {
            Some(ringer) if ringer.ring(self).is_ok() => Ok(()),
            _ => self.write(),
        }
    }

    /// Rings by a write. If the eventfd is blocking, and another process fills it between the poll
    /// and the write, this waits.
    fn write(&self) -> io::Result<()> {
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

    /// Returns whether a descriptor that another process sent is an eventfd. A write to another
    /// kind of file could wait, or worse. The check does not ring. Where the kernel does not ring
    /// for this process, the check is not possible and returns `false`.
    pub fn is_eventfd(descriptor: &OwnedFd) -> bool {
        let ringer = RINGER.as_ref();
        ringer.is_some_and(|ringer| ringer.takes(descriptor))
    }

    /// Returns whether [`Notifier::is_eventfd`] and [`Notifier::is_semaphore`] can check.
    pub fn can_check() -> bool {
        RINGER.is_some()
    }

    /// Returns whether an eventfd that another process sent counts down by one for each read
    /// (`EFD_SEMAPHORE`), so that draining it can take for ever. Its rings stay.
    pub fn is_semaphore(descriptor: &OwnedFd) -> io::Result<bool> {
        let notifier = Notifier::from(descriptor.try_clone()?);
        notifier.ring()?;
        notifier.ring()?;
        let count = notifier.drain();
        if count > 2 {
            notifier.ring()?;
        }
        Ok(count < 2)
    }

    /// Removes all rings so far, and returns their number.
    pub fn drain(&self) -> u64 {
        let mut count = [0; 8];
        let read = rustix::io::preadv2(
            self,
            &mut [IoSliceMut::new(&mut count)],
            u64::MAX,
            ReadWriteFlags::NOWAIT,
        );
        // Without a ring the error is EAGAIN.
        read.map_or(0, |_| u64::from_ne_bytes(count))
    }
}

/// This process's context for ringing. It is created before the first ring, because the broker
/// gives up that right later.
static RINGER: LazyLock<Option<Ringer>> = LazyLock::new(|| {
    Ringer::new()
        .inspect_err(|error| {
            log::info!(
                "a process that shares an eventfd can delay ringing it (fs.aio-max-nr): {error}"
            );
        })
        .ok()
});

/// Reads from an empty file by asynchronous input and output (`io_submit(2)`). The kernel signals
/// the completion to an eventfd: at once, because there is nothing to wait for, and in a way that
/// never waits.
struct Ringer {
    context: IoContext,
    empty: File,
    /// A file that cannot be read.
    unreadable: PipeWriter,
}

impl Ringer {
    /// The least number of completions that the kernel stores.
    const COMPLETIONS: u32 = 32;

    fn new() -> io::Result<Self> {
        Ok(Ringer {
            context: IoContext::new(Self::COMPLETIONS)?,
            empty: rustix::fs::memfd_create("barlink-ringer", MemfdFlags::CLOEXEC)?.into(),
            unreadable: pipe()?.1,
        })
    }

    fn ring(&self, notifier: &Notifier) -> io::Result<()> {
        self.read(self.empty.as_raw_fd(), notifier.as_raw_fd())
    }

    /// Returns whether a descriptor can be signalled, as only eventfds can. The kernel checks that
    /// first (EINVAL), and then finds that the file cannot be read (EBADF), so that it signals
    /// nothing.
    fn takes(&self, descriptor: &OwnedFd) -> bool {
        let read = self.read(self.unreadable.as_raw_fd(), descriptor.as_raw_fd());
        read.is_err_and(|error| error.raw_os_error() == Some(libc::EBADF))
    }

    /// Reads from one file, and has the other signalled.
    fn read(&self, from: RawFd, signalled: RawFd) -> io::Result<()> {
        let number = |descriptor: RawFd| descriptor.unsigned_abs();
        let mut block = IoControlBlock {
            aio_lio_opcode: IOCB_CMD_PREAD as u16,
            aio_fildes: number(from),
            aio_flags: IOCB_FLAG_RESFD,
            aio_resfd: number(signalled),
            ..IoControlBlock::default()
        };
        match self.context.submit(&[&mut block]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // The list of completions is full: remove some of them.
                self.context
                    .get_events(0, &mut [IoEvent::default(); 256], None)?;
                self.context.submit(&[&mut block])?;
            }
            submitted => drop(submitted?),
        }
        Ok(())
    }
}

impl From<OwnedFd> for Notifier {
    /// Takes over an eventfd that another process created.
    fn from(descriptor: OwnedFd) -> Self {
        LazyLock::force(&RINGER);
        // SAFETY: the descriptor is ours, and is given up here.
        Notifier(unsafe { EventFd::from_raw_fd(descriptor.into_raw_fd()) })
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd owns the descriptor, and stays borrowed as long as the result lives.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

impl AsRawFd for Notifier {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::{Duration, Instant};

    use rustix::event::epoll;

    use super::*;

    fn count(notifier: &Notifier) -> Option<u64> {
        let mut bytes = [0; 8];
        let read = rustix::io::preadv2(
            notifier,
            &mut [IoSliceMut::new(&mut bytes)],
            u64::MAX,
            ReadWriteFlags::NOWAIT,
        );
        read.ok().map(|_| u64::from_ne_bytes(bytes))
    }

    /// Makes the eventfd blocking, as QEMU does.
    fn make_blocking(notifier: &Notifier) {
        let flags = rustix::fs::fcntl_getfl(notifier).unwrap() - rustix::fs::OFlags::NONBLOCK;
        rustix::fs::fcntl_setfl(notifier, flags).unwrap();
    }

    #[test]
    fn draining_does_not_block_without_a_ring() {
        let notifier = Notifier::new().unwrap();
        make_blocking(&notifier);
        notifier.drain();
        notifier.ring().unwrap();
        notifier.ring().unwrap();
        assert_eq!(count(&notifier), Some(2));
        notifier.ring().unwrap();
        notifier.drain();
        assert_eq!(count(&notifier), None);
    }

    #[test]
    fn ringing_does_not_block_when_full() {
        let notifier = Notifier::new().unwrap();
        make_blocking(&notifier);
        notifier.0.write(FULL).unwrap();
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        epoll::add(&epoll, &notifier, epoll::EventData::new_u64(0), flags).unwrap();
        let wakes = || {
            let mut events = Vec::with_capacity(1);
            let now = rustix::time::Timespec::default();
            epoll::wait(
                &epoll,
                rustix::buffer::spare_capacity(&mut events),
                Some(&now),
            )
            .unwrap()
        };
        assert_eq!((wakes(), wakes()), (1, 0));
        notifier.ring().unwrap();
        assert_eq!(wakes(), 1, "a ring was not heard");
        notifier.drain();
        notifier.ring().unwrap();
        assert_eq!(count(&notifier), Some(1));
    }

    #[test]
    fn check_of_eventfds_rings_none() {
        let notifier = Notifier::new().unwrap();
        fill(&notifier);
        let copy = notifier.as_fd().try_clone_to_owned().unwrap();
        assert!(Notifier::is_eventfd(&copy));
        let full = Notifier::from(copy);
        notifier.drain();
        assert_eq!(count(&full), None, "it was rung");
        full.ring().unwrap();
        assert_eq!(count(&notifier), Some(1));
        let (reader, writer) = pipe().unwrap();
        let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
        let others: [OwnedFd; 8] = [
            reader.into(),
            writer.into(),
            one.into(),
            other.into(),
            File::open("/dev/null").unwrap().into(),
            epoll::create(epoll::CreateFlags::CLOEXEC).unwrap(),
            rustix::fs::memfd_create("file", MemfdFlags::CLOEXEC).unwrap(),
            rustix::time::timerfd_create(
                rustix::time::TimerfdClockId::Monotonic,
                rustix::time::TimerfdFlags::CLOEXEC,
            )
            .unwrap(),
        ];
        for other in others {
            assert!(!Notifier::is_eventfd(&other));
        }
    }

    /// Most that an eventfd counts by writes.
    const FULL: u64 = u64::MAX - 1;

    /// Fills the eventfd, also while other threads ring and drain it, and leaves it blocking.
    fn fill(notifier: &Notifier) {
        let flags = rustix::fs::fcntl_getfl(notifier).unwrap() | rustix::fs::OFlags::NONBLOCK;
        rustix::fs::fcntl_setfl(notifier, flags).unwrap();
        for bit in (0..64).rev() {
            // A count that does not fit any more is EAGAIN.
            let _ = notifier.0.write(1 << bit);
        }
        make_blocking(notifier);
    }

    #[test]
    fn ringing_never_waits_for_a_filling_peer() {
        const LIMIT: Duration = Duration::from_secs(60);
        let notifier = Arc::new(Notifier::new().unwrap());
        let rings = Arc::new(AtomicU64::new(0));
        fill(&notifier);
        let (holder, counted) = (Arc::clone(&notifier), Arc::clone(&rings));
        // The thread returns true if, each time that it had filled the eventfd, two more rings
        // ended.
        let holder = std::thread::spawn(move || {
            let go_on = (0..30).all(|_| {
                // There is room for a ring only for as long as it takes to fill the eventfd again.
                holder.drain();
                for _ in 0..100 {
                    holder.drain();
                    fill(&holder);
                }
                // The eventfd is full until two more rings have ended.
                let (start, before) = (Instant::now(), counted.load(Ordering::Relaxed));
                while counted.load(Ordering::Relaxed) < before + 2 && start.elapsed() < LIMIT {
                    std::thread::yield_now();
                }
                counted.load(Ordering::Relaxed) >= before + 2
            });
            // A ring that waits ends now.
            holder.drain();
            go_on
        });
        while !holder.is_finished() {
            notifier.ring().unwrap();
            rings.fetch_add(1, Ordering::Relaxed);
        }
        assert!(holder.join().unwrap(), "a ring waits for room");
    }

    #[test]
    fn eventfd_counts_all_rings() {
        let notifier = Notifier::new().unwrap();
        for _ in 0..10_000 {
            notifier.ring().unwrap();
        }
        assert_eq!(count(&notifier), Some(10_000));
    }
}
