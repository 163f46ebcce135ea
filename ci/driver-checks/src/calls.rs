// SPDX-License-Identifier: Apache-2.0 OR MIT

//! System calls that need `unsafe`: the driver's ioctls, mappings that can lose their memory,
//! forks. All `unsafe` code of this crate is here.
#![expect(
    unsafe_code,
    reason = "a check does what programs should not do, too, to see what comes of it"
)]

use std::ffi::{CStr, CString, c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::{mem, ptr};

use barlink_protocol::wire::layout::PAGE_SIZE;
use barlink_protocol::wire::uapi::{
    self, Asked, Buffer, Claim, Doorbell, Eventfd, Info, Map, Superblock,
};
use rustix::io::{Errno, Result};
use rustix::ioctl::{Getter, NoArg, Setter, Updater, ioctl};
use rustix::mm::{Advice, MapFlags, MprotectFlags, MremapFlags, MsyncFlags, ProtFlags};
use rustix::process::{Pid, Signal};

/// Calls the ioctl [`uapi::INFO`].
pub(crate) fn info(file: BorrowedFd<'_>) -> Result<Info> {
    // SAFETY: The ioctl writes an `Info`.
    unsafe { ioctl(file, Getter::<{ uapi::INFO }, Info>::new()) }
}

/// Calls the ioctl [`uapi::SUPERBLOCK`].
pub(crate) fn superblock(file: BorrowedFd<'_>) -> Result<Superblock> {
    // SAFETY: The ioctl writes a `Superblock`.
    unsafe { ioctl(file, Getter::<{ uapi::SUPERBLOCK }, Superblock>::new()) }
}

/// Calls the ioctl [`uapi::REFRESH`].
pub(crate) fn refresh(file: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: The ioctl has no argument.
    unsafe { ioctl(file, NoArg::<{ uapi::REFRESH }>::new()) }
}

/// Calls the ioctl [`uapi::ASK`]. Returns the number of the question.
pub(crate) fn ask(file: BorrowedFd<'_>) -> Result<u64> {
    // SAFETY: The ioctl writes an `Asked`.
    unsafe { ioctl(file, Getter::<{ uapi::ASK }, Asked>::new()) }.map(|asked| asked.count)
}

/// Calls the ioctl [`uapi::CLAIM`].
pub(crate) fn claim(file: BorrowedFd<'_>, claim: Claim) -> Result<()> {
    // SAFETY: The ioctl reads a `Claim`.
    unsafe { ioctl(file, Setter::<{ uapi::CLAIM }, _>::new(claim)) }
}

/// Calls the ioctl [`uapi::DOORBELL`].
pub(crate) fn ring(file: BorrowedFd<'_>, doorbell: Doorbell) -> Result<()> {
    // SAFETY: The ioctl reads a `Doorbell`.
    unsafe { ioctl(file, Setter::<{ uapi::DOORBELL }, _>::new(doorbell)) }
}

/// Calls the ioctl [`uapi::MAP`].
pub(crate) fn map_as(file: BorrowedFd<'_>, map: Map) -> Result<()> {
    // SAFETY: The ioctl reads a `Map`.
    unsafe { ioctl(file, Setter::<{ uapi::MAP }, _>::new(map)) }
}

/// Calls the ioctl [`uapi::EVENTFD`].
pub(crate) fn signal(file: BorrowedFd<'_>, eventfd: Eventfd) -> Result<()> {
    // SAFETY: The ioctl reads an `Eventfd`.
    unsafe { ioctl(file, Setter::<{ uapi::EVENTFD }, _>::new(eventfd)) }
}

/// Calls the ioctl [`uapi::BUFFER`] for `size` bytes, and returns the buffer's file and
/// description.
pub(crate) fn buffer(file: BorrowedFd<'_>, size: u64) -> Result<(OwnedFd, Buffer)> {
    let mut buffer = Buffer {
        size,
        ..Buffer::default()
    };
    // SAFETY: The ioctl reads and writes a `Buffer`, and returns a new descriptor that has no owner
    // yet.
    unsafe {
        ioctl(file, Updater::<{ uapi::BUFFER }, _>::new(&mut buffer))?;
        Ok((OwnedFd::from_raw_fd(buffer.descriptor), buffer))
    }
}

/// Calls the ioctl with this number, with a null pointer as its argument.
pub(crate) fn ioctl_on_null(file: BorrowedFd<'_>, number: u32) -> Result<()> {
    let null = ptr::null_mut::<c_void>();
    // SAFETY: The program has no memory at address 0.
    succeeded(unsafe { libc::ioctl(file.as_raw_fd(), number.into(), null) } >= 0)
}

/// Reads `length` bytes from a file to an address without memory.
pub(crate) fn read_to_nowhere(file: BorrowedFd<'_>, length: usize) -> Result<()> {
    let nowhere = ptr::without_provenance_mut(8);
    // SAFETY: The program has no memory in the first page.
    succeeded(unsafe { libc::read(file.as_raw_fd(), nowhere, length) } >= 0)
}

/// Moves bytes of a file into a pipe without a copy (`splice`).
pub(crate) fn splice(file: BorrowedFd<'_>, pipe: BorrowedFd<'_>) -> Result<()> {
    let (file, pipe, start) = (file.as_raw_fd(), pipe.as_raw_fd(), ptr::null_mut());
    // SAFETY: The kernel uses the positions of both files.
    succeeded(unsafe { libc::splice(file, start, pipe, start, PAGE_SIZE as usize, 0) } > 0)
}

/// Sends bytes of a file over a socket (`sendfile`).
pub(crate) fn send_file(file: BorrowedFd<'_>, socket: BorrowedFd<'_>) -> Result<()> {
    let (file, socket, start) = (file.as_raw_fd(), socket.as_raw_fd(), ptr::null_mut());
    // SAFETY: The kernel uses the position of the file.
    succeeded(unsafe { libc::sendfile(socket, file, start, PAGE_SIZE as usize) } > 0)
}

/// Mounts a FUSE file system whose root is a file, over a file. `server` is an open `/dev/fuse`.
pub(crate) fn mount_fuse_file(server: BorrowedFd<'_>, place: &CStr) -> Result<()> {
    let options = format!(
        "fd={},rootmode=100000,user_id=0,group_id=0",
        server.as_raw_fd()
    );
    let options = CString::new(options).map_err(|_| Errno::INVAL)?;
    let kind = c"fuse".as_ptr();
    let flags = libc::MS_NOSUID | libc::MS_NODEV;
    // SAFETY: All strings end with a zero byte, and the kernel only reads them.
    succeeded(
        unsafe { libc::mount(kind, place.as_ptr(), kind, flags, options.as_ptr().cast()) } == 0,
    )
}

/// Unmounts the file system that is mounted over a file.
pub(crate) fn unmount(place: &CStr) -> Result<()> {
    // SAFETY: The string ends with a zero byte, and the kernel only reads it.
    succeeded(unsafe { libc::umount2(place.as_ptr(), libc::MNT_DETACH) } == 0)
}

/// Forks the process. Returns the child's process ID in the parent, and `None` in the child.
pub(crate) fn fork() -> Result<Option<Pid>> {
    // SAFETY: The program has one thread whenever it forks, so no lock is held in the child.
    let number = unsafe { libc::fork() };
    succeeded(number >= 0)?;
    Ok(Pid::from_raw(number))
}

/// Makes a signal interrupt the blocking call of this process, and do nothing else.
pub(crate) fn let_interrupt(signal: Signal) -> Result<()> {
    extern "C" fn nothing(_: c_int) {}
    let handler = nothing as extern "C" fn(c_int);
    // SAFETY: A `sigaction` of zeros is valid, and has no SA_RESTART. The handler does nothing.
    succeeded(unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        libc::sigaction(signal.as_raw(), &raw const action, ptr::null_mut()) == 0
    })
}

/// Returns `Ok` if the last call of the C library went `well`, else its `errno`.
fn succeeded(well: bool) -> Result<()> {
    if well {
        Ok(())
    } else {
        let error = std::io::Error::last_os_error();
        Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

/// A range of this process's address space, unmapped on drop. An access that the mapping does not
/// allow ends the process by a signal.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: *mut c_void,
    /// Length in bytes.
    length: usize,
}

impl Mapping {
    /// Maps `length` bytes of a file from `offset`.
    pub(crate) fn new(
        file: BorrowedFd<'_>,
        offset: u64,
        length: u64,
        protection: ProtFlags,
        flags: MapFlags,
    ) -> Result<Self> {
        let length = length as usize;
        // SAFETY: The kernel chooses a range that is free.
        let start =
            unsafe { rustix::mm::mmap(ptr::null_mut(), length, protection, flags, file, offset)? };
        Ok(Mapping { start, length })
    }

    /// Maps a file shared, for reading and writing, at an address that is a multiple of `alignment`
    /// bytes.
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
        // SAFETY: The range belongs to this program, which gives it up for the mapping.
        unsafe { rustix::mm::mmap(start, place.length, protection, flags, file, offset)? };
        Ok(place)
    }

    /// Reserves `length` bytes of the address space, without memory behind them.
    pub(crate) fn reserve(length: u64) -> Result<Self> {
        let length = length as usize;
        let (protection, flags) = (ProtFlags::empty(), MapFlags::PRIVATE);
        // SAFETY: The kernel chooses a range that is free.
        let start =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), length, protection, flags)? };
        Ok(Mapping { start, length })
    }

    /// Returns the address of the first byte.
    pub(crate) fn address(&self) -> u64 {
        self.start.addr() as u64
    }

    fn word(&self, offset: u64) -> *mut u64 {
        let offset = offset as usize;
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.length);
        self.start.wrapping_byte_add(offset).cast()
    }

    /// Reads the word at a byte offset.
    pub(crate) fn read(&self, offset: u64) -> u64 {
        // SAFETY: The word is in the mapping, to which no reference is ever made. Where the word
        // has no memory, the kernel sends a signal.
        unsafe { self.word(offset).read_volatile() }
    }

    /// Writes the word at a byte offset.
    pub(crate) fn write(&self, offset: u64, value: u64) {
        // SAFETY: The word is in the mapping, to which no reference is ever made. Where the word
        // has no memory, the kernel sends a signal.
        unsafe { self.word(offset).write_volatile(value) }
    }

    /// Changes the protection of the mapping.
    pub(crate) fn protect(&self, protection: MprotectFlags) -> Result<()> {
        // SAFETY: The pages belong to this mapping alone.
        unsafe { rustix::mm::mprotect(self.start, self.length, protection) }
    }

    /// Splits the mapping at a byte offset. The kernel sees no change until a part is dropped or
    /// moved.
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

    /// Moves the first bytes of this mapping over `target`, as many as `target` has. Both old
    /// ranges are gone afterwards, the rest of this mapping included.
    pub(crate) fn move_to(self, target: Self) -> Result<Self> {
        let (from, to) = (self.start, target.start);
        // SAFETY: The program has given up both ranges, and has no reference into them.
        unsafe {
            rustix::mm::mremap_fixed(from, self.length, target.length, MremapFlags::MAYMOVE, to)?
        };
        mem::forget(self);
        Ok(target)
    }

    /// Grows the mapping to `length` bytes, at another address if necessary.
    pub(crate) fn grow(&mut self, length: u64) -> Result<()> {
        let length = length as usize;
        // SAFETY: The program has no reference into the old range.
        self.start =
            unsafe { rustix::mm::mremap(self.start, self.length, length, MremapFlags::MAYMOVE)? };
        self.length = length;
        Ok(())
    }

    /// Makes all system calls that take a range of memory: `madvise`, `msync`, `mlock`, `mincore`.
    /// The results do not matter.
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
            // SAFETY: The pages belong to this mapping alone, and the program relies on no content
            // of them.
            let _ = unsafe { rustix::mm::madvise(start, length, advice) };
        }
        let mut resident = vec![0_u8; length.div_ceil(PAGE_SIZE as usize)];
        // SAFETY: These calls change nothing in the mapping. `resident` has a byte for each page.
        unsafe {
            let _ = rustix::mm::msync(start, length, MsyncFlags::SYNC);
            let _ = rustix::mm::mlock(start, length);
            libc::mincore(start, length, resident.as_mut_ptr());
        }
    }
}

/// System calls with a mapping as their memory, for the table of `docs/driver.md`.
impl Mapping {
    /// Reads one page of a file into the mapping.
    pub(crate) fn read_from(&self, file: BorrowedFd<'_>) -> Result<()> {
        let length = PAGE_SIZE as usize;
        assert!(length <= self.length);
        // SAFETY: The page is in the mapping, to which no reference is ever made.
        succeeded(unsafe { libc::read(file.as_raw_fd(), self.start, length) } > 0)
    }

    /// Writes one page of the mapping to a file.
    pub(crate) fn write_to(&self, file: BorrowedFd<'_>) -> Result<()> {
        let length = PAGE_SIZE as usize;
        assert!(length <= self.length);
        // SAFETY: The page is in the mapping, to which no reference is ever made.
        succeeded(unsafe { libc::write(file.as_raw_fd(), self.start, length) } > 0)
    }

    /// Receives up to one page from a socket into the mapping.
    pub(crate) fn receive_from(&self, socket: BorrowedFd<'_>) -> Result<()> {
        let length = PAGE_SIZE as usize;
        assert!(length <= self.length);
        // SAFETY: The page is in the mapping, to which no reference is ever made.
        succeeded(unsafe { libc::recv(socket.as_raw_fd(), self.start, length, 0) } > 0)
    }

    /// Sends one page of the mapping over a socket.
    pub(crate) fn send_to(&self, socket: BorrowedFd<'_>) -> Result<()> {
        let length = PAGE_SIZE as usize;
        assert!(length <= self.length);
        // SAFETY: The page is in the mapping, to which no reference is ever made.
        succeeded(unsafe { libc::send(socket.as_raw_fd(), self.start, length, 0) } > 0)
    }

    /// Puts one page of the mapping into a pipe without a copy (`vmsplice`).
    pub(crate) fn splice_to(&self, pipe: BorrowedFd<'_>) -> Result<()> {
        let part = self.page();
        // SAFETY: The page is in the mapping, to which no reference is ever made.
        succeeded(unsafe { libc::vmsplice(pipe.as_raw_fd(), &raw const part, 1, 0) } > 0)
    }

    /// Registers one page of the mapping as a buffer of a new io_uring, which then ends.
    pub(crate) fn register_with_io_uring(&self) -> Result<()> {
        /// `IORING_REGISTER_BUFFERS` (`include/uapi/linux/io_uring.h`).
        const REGISTER_BUFFERS: c_int = 0;
        /// Size of `struct io_uring_params`, in words.
        const PARAMETERS: usize = 15;
        let (mut parameters, part) = ([0_u64; PARAMETERS], self.page());
        // SAFETY: The kernel fills the parameters, and returns a descriptor that has no owner yet.
        let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
        succeeded(ring >= 0)?;
        // SAFETY: The kernel has just returned this descriptor, which has no owner yet.
        let ring = unsafe { OwnedFd::from_raw_fd(ring as c_int) };
        // SAFETY: The kernel reads the description of one buffer, and the ring never uses it.
        succeeded(unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                ring.as_raw_fd(),
                REGISTER_BUFFERS,
                &raw const part,
                1,
            ) >= 0
        })
    }

    /// Reads one page of the mapping that another process inherited (`process_vm_readv`).
    pub(crate) fn read_of(&self, process: Pid) -> Result<()> {
        let mut bytes = vec![0_u8; PAGE_SIZE as usize];
        let (own, other) = (buffer_of(&mut bytes), self.page());
        let process = process.as_raw_pid();
        // SAFETY: The kernel fills `bytes`.
        succeeded(unsafe {
            libc::process_vm_readv(process, &raw const own, 1, &raw const other, 1, 0) > 0
        })
    }

    /// Writes one page of the mapping that another process inherited (`process_vm_writev`).
    pub(crate) fn write_of(&self, process: Pid) -> Result<()> {
        let mut bytes = vec![0_u8; PAGE_SIZE as usize];
        let (own, other) = (buffer_of(&mut bytes), self.page());
        let process = process.as_raw_pid();
        // SAFETY: The kernel reads `bytes`, and writes to a page to which no reference is made.
        succeeded(unsafe {
            libc::process_vm_writev(process, &raw const own, 1, &raw const other, 1, 0) > 0
        })
    }

    /// Reads and writes the first word of the mapping that a child of this process inherited
    /// (`ptrace`). The child stays stopped.
    pub(crate) fn trace(&self, child: Pid) -> Result<()> {
        let (pid, nothing) = (child.as_raw_pid(), ptr::null_mut::<c_void>());
        // SAFETY: The kernel stops the child, and uses no memory of this process.
        succeeded(unsafe { libc::ptrace(libc::PTRACE_ATTACH, pid, nothing, nothing) } == 0)?;
        let mut status = 0;
        // SAFETY: The kernel writes the status.
        succeeded(unsafe { libc::waitpid(pid, &raw mut status, 0) } == pid)?;
        // SAFETY: The C library returns the word, which can be -1, and sets `errno` on an error.
        let word = unsafe {
            *libc::__errno_location() = 0;
            libc::ptrace(libc::PTRACE_PEEKDATA, pid, self.start, nothing)
        };
        // SAFETY: The C library has its `errno` there.
        succeeded(unsafe { *libc::__errno_location() } == 0)?;
        // SAFETY: The kernel writes to a word to which no reference is ever made.
        succeeded(unsafe { libc::ptrace(libc::PTRACE_POKEDATA, pid, self.start, word) } == 0)
    }

    /// Waits at the first word of the mapping for a value that it does not have (`FUTEX_WAIT`).
    pub(crate) fn wait_at(&self, private: bool) -> Result<()> {
        let flag = if private { libc::FUTEX_PRIVATE_FLAG } else { 0 };
        let other = !self.read(0) as u32;
        let nothing = ptr::null::<libc::timespec>();
        // SAFETY: The kernel reads the word, and returns at once because its value is another one.
        let done = succeeded(unsafe {
            let operation = libc::FUTEX_WAIT | flag;
            libc::syscall(libc::SYS_futex, self.start, operation, other, nothing) == 0
        });
        match done {
            Err(Errno::AGAIN) => Ok(()),
            done => done,
        }
    }

    /// Advises the kernel about the mapping.
    pub(crate) fn advise(&self, advice: Advice) -> Result<()> {
        // SAFETY: The pages belong to this mapping alone, and the program relies on no content.
        unsafe { rustix::mm::madvise(self.start, self.length, advice) }
    }

    /// Locks the mapping into memory.
    pub(crate) fn lock(&self) -> Result<()> {
        // SAFETY: The call changes no content.
        unsafe { rustix::mm::mlock(self.start, self.length) }
    }

    /// Writes the mapping back to its file.
    pub(crate) fn sync(&self) -> Result<()> {
        // SAFETY: The call changes no content.
        unsafe { rustix::mm::msync(self.start, self.length, MsyncFlags::SYNC) }
    }

    fn page(&self) -> libc::iovec {
        let length = PAGE_SIZE as usize;
        assert!(length <= self.length);
        libc::iovec {
            iov_base: self.start,
            iov_len: length,
        }
    }
}

fn buffer_of(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: The pages belong to this mapping alone, which ends here.
            let unmapped = unsafe { rustix::mm::munmap(self.start, self.length) };
            assert_eq!(unmapped, Ok(()));
        }
    }
}
