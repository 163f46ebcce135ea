// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Shared memory as words. Except for `copy.rs`, this is the only file of this crate with `unsafe`.
//!
//! Two rules apply to memory that another process writes while this one reads it:
//!
//! 1. The only references to it are `&[AtomicU64]`, never references to plain data. The compiler
//!    then knows that a word can change between two loads.
//! 2. A value is loaded once into a local variable and checked. Only the local variable is used.
//!
//! Rust's model does not cover accesses of other sizes by another process. On the hardware, an
//! aligned 64-bit load returns a mixture of bytes that were stored there, for which rule 2 is
//! enough.
#![expect(
    unsafe_code,
    reason = "turns a mapping into words, and lets the kernel copy"
)]

use core::ops::{Deref, Range};

use crate::copy::Copier;
#[cfg(not(loom))]
use crate::io;
use crate::sync::{AtomicU64, Ordering, fence};
use crate::wire::layout::PAGE_WORDS;

/// Returns the words of a mapping.
///
/// # Safety
///
/// `start` must be aligned to 8 bytes. For the whole of `'a`, the `length / 8` words from `start`
/// must be mapped and readable (and writable, if the caller stores through the result). This
/// process must access them only through atomics or the copies of [`Region`].
pub unsafe fn words<'a>(start: *mut u8, length: usize) -> &'a [AtomicU64] {
    // SAFETY: The caller vouches for address, length and lifetime. `AtomicU64` has the size and
    // alignment of `u64`, is valid with any bits, and permits shared mutation. Writes by other
    // processes are atomic, or tear into some value: see the module's rules.
    unsafe { core::slice::from_raw_parts(start.cast(), length / 8) }
}

/// Error of a range that is not in the mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("{length} bytes at {offset:#x} are not in the mapping, which has {size}")]
pub struct OutOfRegion {
    offset: u64,
    length: usize,
    size: u64,
}

impl OutOfRegion {
    /// Returns the offset of the first byte of the range.
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the number of bytes in the range.
    pub const fn length(&self) -> usize {
        self.length
    }

    /// Returns the size of the mapping, in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }
}

/// A region, or its mapped part, from its first byte on.
///
/// Offsets are in bytes, are multiples of 8, and lie in the mapping. They come from a checked
/// [`Layout`](crate::wire::layout::Layout), so an offset outside is a fault of this program, and
/// panics. An offset within a word stands for that word.
#[derive(Clone, Debug)]
pub struct Region<M> {
    memory: M,
    copier: Copier,
    /// The fences that are left out, for a model that shows the need for them, as bits.
    #[cfg(loom)]
    left_out: u32,
}

/// A fence, or the order of a store, that a model can leave out.
#[cfg(loom)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelFence {
    /// The fence of a producer between its limit and its data.
    Limit,
    /// The fence of a tap between its copy and its look at the limit.
    Copy,
    /// The fence of a tap between its loads of a commit note and its second look at the cursor.
    Note,
    /// The fence of a producer behind the store of its cursor.
    Commit,
    /// The Release order of a producer's store of its dropped records.
    Dropped,
    /// The fence of a reset between its generation and its loads of the cursors.
    Reset,
    /// The Release order of the channel table's count.
    Count,
}

impl<M: Deref<Target = [AtomicU64]>> Region<M> {
    /// Creates a region over `memory`, which must always deref to the same words.
    pub fn new(memory: M) -> Self {
        Region {
            memory,
            copier: Copier::detect(),
            #[cfg(loom)]
            left_out: 0,
        }
    }

    /// Returns the same region, over which a program leaves out a fence.
    #[cfg(loom)]
    pub fn without(self, fence: ModelFence) -> Self {
        Region {
            left_out: self.left_out | 1 << fence as u32,
            ..self
        }
    }

    #[cfg(loom)]
    fn leaves_out(&self, fence: ModelFence) -> bool {
        self.left_out & 1 << fence as u32 != 0
    }

    /// Returns the same region for a mapping that is, or may be, write-combining. Without fences,
    /// stores overtake each other there, and loads are made early. The ends of channels have the
    /// necessary fences. A program that loads and stores words by itself puts a `fence` with
    /// `SeqCst` between accesses whose order matters.
    pub fn over_write_combining(self) -> Self {
        let copier = self.copier.over_combining();
        Region { copier, ..self }
    }

    /// Returns the size of the mapping, in bytes.
    pub fn size(&self) -> u64 {
        self.memory.len() as u64 * 8
    }

    /// Returns the word at an offset.
    pub fn word(&self, offset: u64) -> &AtomicU64 {
        &self.memory[index(offset)]
    }

    /// Loads a word that publishes other words: words that were stored before its release are
    /// visible after this load.
    pub(crate) fn acquire(&self, offset: u64) -> u64 {
        let value = self.word(offset).load(Ordering::Acquire);
        self.copier.fence_loads();
        value
    }

    /// Stores a word that publishes other words: a reader that sees the word sees everything that
    /// was stored or copied in before.
    pub(crate) fn release(&self, offset: u64, value: u64) {
        self.copier.fence_stores();
        self.word(offset).store(value, Ordering::Release);
    }

    /// Orders all loads before the fence before all loads behind it.
    pub(crate) fn fence_loads(&self) {
        fence(Ordering::Acquire);
        self.copier.fence_loads();
    }

    /// Orders the store of a producer's limit before all accesses behind the fence, streaming
    /// stores included.
    pub(crate) fn fence_limit(&self) {
        #[cfg(loom)]
        if self.leaves_out(ModelFence::Limit) {
            return;
        }
        self.fence();
    }

    /// Orders the store of a producer's cursor before all accesses behind the fence.
    #[inline(always)]
    pub(crate) fn fence_commit(&self) {
        #[cfg(loom)]
        if self.leaves_out(ModelFence::Commit) {
            return;
        }
        self.fence();
    }

    /// Orders the generation of a reset before its loads of the cursors.
    pub(crate) fn fence_reset(&self) {
        #[cfg(loom)]
        if self.leaves_out(ModelFence::Reset) {
            return;
        }
        self.fence();
    }

    /// Stores the count of the channel table behind its entries.
    pub(crate) fn release_count(&self, offset: u64, value: u64) {
        #[cfg(loom)]
        if self.leaves_out(ModelFence::Count) {
            return self.store(offset, value);
        }
        self.release(offset, value);
    }

    /// Stores the number of a producer's dropped records behind all commits before.
    pub(crate) fn release_dropped(&self, offset: u64, value: u64) {
        #[cfg(loom)]
        if self.leaves_out(ModelFence::Dropped) {
            return self.store(offset, value);
        }
        self.release(offset, value);
    }

    /// Orders a tap's copy before its look at the limit.
    pub(crate) fn fence_copy(&self) {
        #[cfg(loom)]
        if self.leaves_out(ModelFence::Copy) {
            return;
        }
        self.fence_loads();
    }

    /// Orders a tap's loads of a commit note before its second look at the cursor.
    pub(crate) fn fence_note(&self) {
        #[cfg(loom)]
        if self.leaves_out(ModelFence::Note) {
            return;
        }
        self.fence_loads();
    }

    /// Orders all accesses before the fence before all accesses behind it, and makes earlier stores
    /// visible, write-combining buffers included.
    pub(crate) fn fence(&self) {
        fence(Ordering::SeqCst);
        self.copier.fence_all();
    }

    /// Orders streaming stores before all stores behind the fence.
    pub(crate) fn fence_streamed(&self) {
        self.copier.fence_streamed();
    }

    /// Loads a word that no other words depend on.
    pub fn load(&self, offset: u64) -> u64 {
        self.word(offset).load(Ordering::Relaxed)
    }

    /// Stores a word that no other words depend on.
    pub fn store(&self, offset: u64, value: u64) {
        self.word(offset).store(value, Ordering::Relaxed);
    }

    /// Copies the page at an offset into private memory.
    pub fn page(&self, offset: u64) -> [u64; PAGE_WORDS] {
        core::array::from_fn(|index| self.load(offset + 8 * index as u64))
    }

    /// Returns the words that hold so many bytes from an offset on.
    pub(crate) fn words(&self, offset: u64, bytes: usize) -> &[AtomicU64] {
        let first = index(offset);
        &self.memory[first..first + bytes.div_ceil(8)]
    }

    /// Copies bytes into the region. If the bytes end within a word, the rest of that word becomes
    /// zero.
    #[inline]
    pub fn copy_in(&self, offset: u64, bytes: &[u8]) {
        self.copy_in_by(offset, bytes, false);
    }

    /// Copies bytes into the region as [`Region::copy_in`] does, with streaming stores if `streams`
    /// is true. [`Region::fence_streamed`] orders such stores before later ones.
    #[inline]
    pub(crate) fn copy_in_by(&self, offset: u64, bytes: &[u8], streams: bool) {
        let target = self.words(offset, bytes.len());
        let (whole, tail) = bytes.split_at(bytes.len() / 8 * 8);
        let (words, last) = target.split_at(whole.len() / 8);
        self.copier.copy_in(words, whole, streams);
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

    /// Returns an error if bytes from an offset on are not all in the mapping.
    pub fn check(&self, offset: u64, length: usize) -> Result<(), OutOfRegion> {
        let end = offset.checked_add(length as u64);
        match end.is_some_and(|end| end <= self.size()) {
            true => Ok(()),
            false => Err(OutOfRegion {
                offset,
                length,
                size: self.size(),
            }),
        }
    }

    /// Copies bytes out of any place in the mapping, for inspection by a person.
    pub fn peek(&self, offset: u64, bytes: &mut [u8]) -> Result<(), OutOfRegion> {
        for (word, within, part) in self.cut(offset, bytes.len())? {
            let value = word.load(Ordering::Relaxed).to_le_bytes();
            let length = part.len();
            bytes[part].copy_from_slice(&value[within..within + length]);
        }
        Ok(())
    }

    /// Copies bytes to any place in the mapping. A word that the bytes fill in part is loaded,
    /// changed and stored, so no other program may change the rest of that word meanwhile.
    pub fn poke(&self, offset: u64, bytes: &[u8]) -> Result<(), OutOfRegion> {
        for (word, within, part) in self.cut(offset, bytes.len())? {
            let mut value = word.load(Ordering::Relaxed).to_le_bytes();
            value[within..within + part.len()].copy_from_slice(&bytes[part]);
            word.store(u64::from_le_bytes(value), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Cuts a range into words. Yields each word, the index of the word's first byte in the range,
    /// and the part of the range that is in the word.
    fn cut(
        &self,
        offset: u64,
        length: usize,
    ) -> Result<impl Iterator<Item = (&AtomicU64, usize, Range<usize>)>, OutOfRegion> {
        self.check(offset, length)?;
        let end = offset + length as u64;
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

    /// Writes `length` bytes of the region, from any `offset` on, to a file descriptor by
    /// `write(2)`. The bytes are not copied in user space, and no reference to them is made.
    /// Returns the bytes written.
    #[cfg(not(loom))]
    pub fn write_to(&self, fd: libc::c_int, offset: u64, length: usize) -> io::Result<usize> {
        let source = self.bytes(offset, length);
        // SAFETY: The range was bounds-checked and stays mapped while `self` is borrowed. `write`
        // only reads it.
        result(unsafe { libc::write(fd, source.cast(), length) })
    }

    /// Fills up to `length` bytes of the region, from `offset` on, from a file descriptor by
    /// `read(2)`. Returns the bytes read, 0 at the end of the file.
    #[cfg(not(loom))]
    pub fn read_from(&self, fd: libc::c_int, offset: u64, length: usize) -> io::Result<usize> {
        let target = self.bytes(offset, length);
        // SAFETY: The range was bounds-checked and stays mapped while `self` is borrowed. It is
        // shared memory under `AtomicU64`, so the compiler expects writes by others, here by the
        // kernel.
        result(unsafe { libc::read(fd, target.cast(), length) })
    }

    /// Returns the address of a byte at any offset, from which `length` bytes are mapped.
    #[cfg(not(loom))]
    fn bytes(&self, offset: u64, length: usize) -> *mut u8 {
        let within = (offset % 8) as usize;
        let words = self.words(offset - within as u64, within + length);
        words.as_ptr().cast::<u8>().cast_mut().wrapping_add(within)
    }
}

/// Converts an offset to the index of a word in the memory.
#[cfg(not(loom))]
fn index(offset: u64) -> usize {
    (offset / 8) as usize
}

/// Converts an offset to the index of a word in a model's memory. loom tracks every word, so the
/// model has only the words in use: of the broker's page, the driver's page, and between them one
/// channel, all of one slot. A model of the channel table has only the table.
#[cfg(loom)]
fn index(offset: u64) -> usize {
    use crate::wire::layout::{FIRST_FREE, PAGE_SIZE, TABLE_COUNT, channel, presence, table_entry};
    const HEADER: u64 = FIRST_FREE / PAGE_SIZE;
    const DATA: u64 = HEADER + 1;
    let within = offset % PAGE_SIZE;
    let word = match (offset / PAGE_SIZE, within) {
        (0, TABLE_COUNT) => 0,
        (0, _) => 1 + (within - table_entry(0)) / 8,
        (HEADER, channel::GENERATION) => 8,
        (HEADER, channel::READ) => 9,
        (HEADER, channel::CONSUMER_RUNG) => 10,
        (HEADER, channel::CONSUMER_THRESHOLD) => 11,
        (HEADER, channel::PRODUCER_THRESHOLD) => 12,
        (HEADER, channel::DROPPED) => 13,
        (HEADER, channel::PRODUCER_RUNG) => 14,
        (HEADER, channel::FIRST) => 15,
        (HEADER, channel::MARKS) => 24,
        (HEADER, _) => 16 + (within - channel::WRITTEN) / 8,
        (DATA, _) => 25 + within / 8,
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

/// Fills private memory from a file descriptor by `read(2)`. Returns the bytes read, 0 at the end
/// of the file.
#[cfg(not(loom))]
pub(crate) fn read(fd: libc::c_int, bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: The memory is borrowed exclusively, and `read` writes at most its length.
    result(unsafe { libc::read(fd, bytes.as_mut_ptr().cast(), bytes.len()) })
}

/// Writes private memory to a file descriptor by `write(2)`. Returns the bytes written.
#[cfg(not(loom))]
pub(crate) fn write(fd: libc::c_int, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: `write` only reads the memory, which is borrowed.
    result(unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) })
}

/// Reports the errors of a file that come when it is closed, by closing a copy of its descriptor. A
/// disk's quota or a file server can report its error as late as this. A process that has no
/// descriptor left for the copy cannot learn of such an error, which is an error as well. The close
/// gives back the locks by `fcntl` that the process has of the file.
#[cfg(not(loom))]
pub(crate) fn flush(fd: libc::c_int) -> io::Result<()> {
    // SAFETY: The call accesses no memory.
    let copied = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    result(copied as libc::ssize_t)?;
    // SAFETY: The copy was just made, and nothing else knows of it.
    match result(unsafe { libc::close(copied) } as libc::ssize_t) {
        // The descriptor is closed after EINTR as well.
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

/// Clears O_DIRECT of an open file, which other descriptors may share. Returns whether it was set.
#[cfg(not(loom))]
pub(crate) fn clear_direct(fd: libc::c_int) -> bool {
    // SAFETY: The call accesses no memory.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    let is_set = flags != -1 && flags & libc::O_DIRECT != 0;
    // SAFETY: The call accesses no memory. Reads and writes of the file become buffered.
    is_set && unsafe { libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_DIRECT) } == 0
}

/// Waits until a file descriptor is ready for these events of `poll(2)`, or has an error. A signal
/// ends the wait as well.
#[cfg(not(loom))]
pub(crate) fn poll(fd: libc::c_int, events: libc::c_short) -> io::Result<()> {
    let mut poll = libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    // SAFETY: The kernel writes one `pollfd`, which is borrowed exclusively.
    match result(unsafe { libc::poll(&mut poll, 1, -1) } as libc::ssize_t) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

#[cfg(not(loom))]
fn stat(fd: libc::c_int) -> Option<libc::stat> {
    let mut stat = core::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `fstat` writes one `stat`, which is borrowed exclusively.
    if unsafe { libc::fstat(fd, stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: `fstat` has succeeded, so it has written the value.
    Some(unsafe { stat.assume_init() })
}

/// Returns whether a file descriptor is of a pipe.
#[cfg(not(loom))]
pub(crate) fn is_pipe(fd: libc::c_int) -> bool {
    stat(fd).is_some_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFIFO)
}

/// Returns whether a file descriptor is of a socket that passes messages, not bytes (`socket(2)`).
#[cfg(not(loom))]
pub(crate) fn is_message_socket(fd: libc::c_int) -> bool {
    socket_option(fd, libc::SO_TYPE).is_some_and(|kind| kind != libc::SOCK_STREAM)
}

/// Returns an option of a socket that is a number. `None` for other files.
#[cfg(not(loom))]
fn socket_option(fd: libc::c_int, option: libc::c_int) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `getsockopt` writes one `int` and its length, which are borrowed exclusively.
    let told = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    (told == 0).then_some(value)
}

/// Returns whether a file is of a file system of the kernel whose sizes do not tell how many bytes
/// a file has. An unknown file system is none.
#[cfg(not(loom))]
pub fn is_pseudo(fd: libc::c_int) -> bool {
    /// `MQUEUE_MAGIC` in `ipc/mqueue.c`, and `CONFIGFS_MAGIC`, `DEBUGFS_MAGIC` and `RDTGROUP_MAGIC`
    /// in `linux/magic.h`.
    const FURTHER: [u32; 4] = [0x1980_0202, 0x6265_6570, 0x6462_6720, 0x0765_5821];
    const KNOWN: [u32; 6] = [
        libc::PROC_SUPER_MAGIC as u32,
        libc::SYSFS_MAGIC as u32,
        libc::CGROUP_SUPER_MAGIC as u32,
        libc::CGROUP2_SUPER_MAGIC as u32,
        libc::TRACEFS_MAGIC as u32,
        libc::SECURITYFS_MAGIC as u32,
    ];
    let mut found = core::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `fstatfs` writes one `statfs`, which is borrowed exclusively.
    if unsafe { libc::fstatfs(fd, found.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: `fstatfs` has succeeded, so it has written the value.
    let kind = unsafe { found.assume_init() }.f_type as u32;
    KNOWN.contains(&kind) || FURTHER.contains(&kind)
}

/// Returns the size of a regular file in bytes, as its file system tells it now: a file system in
/// user space or on a server is asked again. `None` for other files.
#[cfg(not(loom))]
pub(crate) fn file_size(fd: libc::c_int) -> Option<u64> {
    let mut found = core::mem::MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_FORCE_SYNC;
    let wanted = libc::STATX_TYPE | libc::STATX_SIZE;
    // SAFETY: The path is a C string. `statx` writes one `statx`, which is borrowed exclusively.
    let told = unsafe { libc::statx(fd, c"".as_ptr(), flags, wanted, found.as_mut_ptr()) };
    if told == 0 {
        // SAFETY: `statx` has succeeded, so it has written the value.
        let found = unsafe { found.assume_init() };
        let is_regular = u32::from(found.stx_mode) & libc::S_IFMT == libc::S_IFREG;
        return is_regular.then_some(found.stx_size);
    }
    // A sandbox can refuse that call.
    let stat = stat(fd).filter(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFREG)?;
    u64::try_from(stat.st_size).ok()
}

/// Moves the position of a file by an offset in bytes. Returns the new position.
#[cfg(not(loom))]
pub(crate) fn seek(fd: libc::c_int, offset: i64) -> Option<u64> {
    // SAFETY: `lseek` accesses no memory.
    let position = unsafe { libc::lseek(fd, offset, libc::SEEK_CUR) };
    u64::try_from(position).ok()
}

/// Returns the error that each `read(2)` of a descriptor would have, if it is of a folder, of a
/// socket that listens or of an epoll, or is not open for reading.
#[cfg(not(loom))]
pub(crate) fn check_readable(fd: libc::c_int) -> io::Result<()> {
    if stat(fd).is_some_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFDIR) {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    check_access(fd, libc::O_WRONLY)?;
    let listens = socket_option(fd, libc::SO_ACCEPTCONN).is_some_and(|listens| listens != 0);
    // A read of no bytes would tell as well, but takes a message from some devices, such as
    // /dev/kmsg.
    let mut event = core::mem::MaybeUninit::<libc::epoll_event>::zeroed();
    // SAFETY: `epoll_wait` writes at most one event, which is borrowed exclusively.
    let is_epoll = unsafe { libc::epoll_wait(fd, event.as_mut_ptr(), 1, 0) } >= 0;
    match listens || is_epoll {
        true => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        false => Ok(()),
    }
}

/// Returns the error that each `write(2)` of a descriptor would have, if it is not open for
/// writing.
#[cfg(not(loom))]
pub(crate) fn check_writable(fd: libc::c_int) -> io::Result<()> {
    check_access(fd, libc::O_RDONLY)
}

/// Returns an error if a descriptor is open for the `other` access only, for none at all, or not
/// open.
#[cfg(not(loom))]
fn check_access(fd: libc::c_int, other: libc::c_int) -> io::Result<()> {
    // SAFETY: The call accesses no memory.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    result(flags as libc::ssize_t)?;
    match flags & libc::O_PATH != 0 || flags & libc::O_ACCMODE == other {
        true => Err(io::Error::from_raw_os_error(libc::EBADF)),
        false => Ok(()),
    }
}

/// Returns how many bytes a pipe, a socket or a terminal has to read. `None` for files that do not
/// tell.
#[cfg(not(loom))]
pub(crate) fn bytes_ready(fd: libc::c_int) -> Option<u64> {
    let mut ready: libc::c_int = 0;
    // SAFETY: FIONREAD writes one `int`, which is borrowed exclusively.
    let told = unsafe { libc::ioctl(fd, libc::FIONREAD, &raw mut ready) };
    u64::try_from(ready).ok().filter(|_| told == 0)
}

#[cfg(not(loom))]
fn result(returned: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}
