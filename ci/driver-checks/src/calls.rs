// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The calls that no safe function makes: the driver's ioctls, mappings that can lose their memory, forks. All of the
//! `unsafe` code of this crate is here.
#![expect(
    unsafe_code,
    reason = "a check does what programs should not do, too, to see what comes of it"
)]

use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::{mem, ptr};

use barlink_protocol::wire::layout::PAGE_SIZE;
use barlink_protocol::wire::uapi::{self, Buffer, Claim, Doorbell, Eventfd, Info, Map};
use rustix::io::{Errno, Result};
use rustix::ioctl::{Getter, Setter, Updater, ioctl};
use rustix::mm::{Advice, MapFlags, MprotectFlags, MremapFlags, MsyncFlags, ProtFlags};
use rustix::process::{Pid, Signal};

/// [`uapi::INFO`].
pub(crate) fn info(file: BorrowedFd<'_>) -> Result<Info> {
    // SAFETY: The ioctl writes an `Info`.
    unsafe { ioctl(file, Getter::<{ uapi::INFO }, Info>::new()) }
}

/// [`uapi::CLAIM`].
pub(crate) fn claim(file: BorrowedFd<'_>, claim: Claim) -> Result<()> {
    // SAFETY: The ioctl reads a `Claim`.
    unsafe { ioctl(file, Setter::<{ uapi::CLAIM }, _>::new(claim)) }
}

/// [`uapi::DOORBELL`].
pub(crate) fn ring(file: BorrowedFd<'_>, bell: Doorbell) -> Result<()> {
    // SAFETY: The ioctl reads a `Doorbell`.
    unsafe { ioctl(file, Setter::<{ uapi::DOORBELL }, _>::new(bell)) }
}

/// [`uapi::MAP`].
pub(crate) fn map_as(file: BorrowedFd<'_>, map: Map) -> Result<()> {
    // SAFETY: The ioctl reads a `Map`.
    unsafe { ioctl(file, Setter::<{ uapi::MAP }, _>::new(map)) }
}

/// [`uapi::EVENTFD`].
pub(crate) fn signal(file: BorrowedFd<'_>, eventfd: Eventfd) -> Result<()> {
    // SAFETY: The ioctl reads an `Eventfd`.
    unsafe { ioctl(file, Setter::<{ uapi::EVENTFD }, _>::new(eventfd)) }
}

/// [`uapi::BUFFER`], with the buffer's file.
pub(crate) fn buffer(file: BorrowedFd<'_>, size: u64) -> Result<(OwnedFd, Buffer)> {
    let mut buffer = Buffer {
        size,
        ..Buffer::default()
    };
    // SAFETY: The ioctl reads and writes a `Buffer`, and gives a descriptor that is nobody's yet.
    unsafe {
        ioctl(file, Updater::<{ uapi::BUFFER }, _>::new(&mut buffer))?;
        Ok((OwnedFd::from_raw_fd(buffer.descriptor), buffer))
    }
}

/// The ioctl with this number, with a null pointer for its argument.
pub(crate) fn ioctl_on_null(file: BorrowedFd<'_>, number: u32) -> Result<()> {
    let null = ptr::null_mut::<c_void>();
    // SAFETY: Nothing of the program's is at address 0.
    succeeded(unsafe { libc::ioctl(file.as_raw_fd(), number.into(), null) } >= 0)
}

/// Reads from a file to an address where there is no memory.
pub(crate) fn read_to_nowhere(file: BorrowedFd<'_>, length: usize) -> Result<()> {
    let nowhere = ptr::without_provenance_mut(8);
    // SAFETY: Nothing of the program's is in the first page.
    succeeded(unsafe { libc::read(file.as_raw_fd(), nowhere, length) } >= 0)
}

/// Forks: the child's number in the parent, `None` in the child.
pub(crate) fn fork() -> Result<Option<Pid>> {
    // SAFETY: The program has one thread whenever it forks, so that the child finds no lock taken.
    let number = unsafe { libc::fork() };
    succeeded(number >= 0)?;
    Ok(Pid::from_raw(number))
}

/// Has a signal interrupt whatever this process waits for, and do nothing else.
pub(crate) fn let_interrupt(signal: Signal) -> Result<()> {
    extern "C" fn nothing(_: c_int) {}
    let handler = nothing as extern "C" fn(c_int);
    // SAFETY: All zeros are a valid `sigaction`, one without SA_RESTART. The handler does nothing.
    succeeded(unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        libc::sigaction(signal.as_raw(), &raw const action, ptr::null_mut()) == 0
    })
}

/// What the C library says of a call that it has just made.
fn succeeded(well: bool) -> Result<()> {
    if well {
        Ok(())
    } else {
        let error = std::io::Error::last_os_error();
        Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

/// A piece of the address space, until dropped. To touch it where it may not be touched ends the process.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: *mut c_void,
    /// Bytes.
    length: usize,
}

impl Mapping {
    /// Maps a file.
    pub(crate) fn new(
        file: BorrowedFd<'_>,
        offset: u64,
        length: u64,
        protection: ProtFlags,
        flags: MapFlags,
    ) -> Result<Self> {
        let length = length as usize;
        // SAFETY: The kernel chooses a place where there is nothing.
        let start =
            unsafe { rustix::mm::mmap(ptr::null_mut(), length, protection, flags, file, offset)? };
        Ok(Mapping { start, length })
    }

    /// Maps a file shared, at an address that is a multiple of `alignment`.
    pub(crate) fn aligned(
        file: BorrowedFd<'_>,
        offset: u64,
        length: u64,
        alignment: u64,
    ) -> Result<Self> {
        let room = Self::reserve(length + alignment)?;
        let start = room
            .start
            .map_addr(|address| address.next_multiple_of(alignment as usize));
        let before = (start.addr() - room.start.addr()) as u64;
        let (_before, room) = room.split(before);
        let (place, _after) = room.split(length);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: The place is this program's, which gives it up for the mapping.
        unsafe { rustix::mm::mmap(start, place.length, protection, flags, file, offset)? };
        Ok(place)
    }

    /// So many bytes with nothing there.
    pub(crate) fn reserve(length: u64) -> Result<Self> {
        let length = length as usize;
        let (protection, flags) = (ProtFlags::empty(), MapFlags::PRIVATE);
        // SAFETY: The kernel chooses a place where there is nothing.
        let start =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), length, protection, flags)? };
        Ok(Mapping { start, length })
    }

    fn word(&self, offset: u64) -> *mut u64 {
        let offset = offset as usize;
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.length);
        self.start.wrapping_byte_add(offset).cast()
    }

    /// Reads a word.
    pub(crate) fn read(&self, offset: u64) -> u64 {
        // SAFETY: The word is in the mapping, to which no reference is ever made. Where the kernel has no memory for it,
        // it sends a signal.
        unsafe { self.word(offset).read_volatile() }
    }

    /// Writes a word.
    pub(crate) fn write(&self, offset: u64, value: u64) {
        // SAFETY: As for reading: the word is the mapping's, and a signal comes where there is no memory.
        unsafe { self.word(offset).write_volatile(value) }
    }

    /// Changes how it may be touched.
    pub(crate) fn protect(&self, protection: MprotectFlags) -> Result<()> {
        // SAFETY: The pages are the mapping's alone.
        unsafe { rustix::mm::mprotect(self.start, self.length, protection) }
    }

    /// Cuts it in two. Nothing changes for the kernel until one of them is dropped or moved.
    pub(crate) fn split(self, at: u64) -> (Self, Self) {
        let at = at as usize;
        assert!(at <= self.length);
        let first = Mapping {
            start: self.start,
            length: at,
        };
        let second = Mapping {
            start: self.start.wrapping_byte_add(at),
            length: self.length - at,
        };
        mem::forget(self);
        (first, second)
    }

    /// Moves its first bytes to the place of `target`, which goes, as the rest of it does.
    pub(crate) fn move_to(self, target: Self) -> Result<Self> {
        let (from, to) = (self.start, target.start);
        // SAFETY: The program has given up both places; no reference leads there.
        unsafe {
            rustix::mm::mremap_fixed(from, self.length, target.length, MremapFlags::MAYMOVE, to)?
        };
        mem::forget(self);
        Ok(target)
    }

    /// Makes it larger.
    pub(crate) fn grow(&mut self, length: u64) -> Result<()> {
        let length = length as usize;
        // SAFETY: No reference leads to where it was.
        self.start =
            unsafe { rustix::mm::mremap(self.start, self.length, length, MremapFlags::MAYMOVE)? };
        self.length = length;
        Ok(())
    }

    /// Asks of the kernel whatever can be asked about memory. What it answers is its own affair.
    pub(crate) fn treat_as_memory(&self) {
        let (start, length) = (self.start, self.length);
        for advice in [
            Advice::LinuxRemove,
            Advice::WillNeed,
            Advice::LinuxDontNeed,
            Advice::LinuxCold,
            Advice::LinuxPopulateWrite,
            Advice::LinuxDoFork,
            Advice::LinuxDoDump,
            Advice::LinuxHugepage,
        ] {
            // SAFETY: The pages are the mapping's alone, and the program relies on nothing that is in them.
            let _ = unsafe { rustix::mm::madvise(start, length, advice) };
        }
        let mut resident = vec![0_u8; length.div_ceil(PAGE_SIZE as usize)];
        // SAFETY: These calls change nothing of the mapping; `resident` has a byte for each page.
        unsafe {
            let _ = rustix::mm::msync(start, length, MsyncFlags::SYNC);
            let _ = rustix::mm::mlock(start, length);
            libc::mincore(start, length, resident.as_mut_ptr());
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: The pages are the mapping's alone, and nobody's any more.
            let unmapped = unsafe { rustix::mm::munmap(self.start, self.length) };
            assert_eq!(unmapped, Ok(()));
        }
    }
}
