// SPDX-License-Identifier: GPL-2.0 OR MIT

//! An open `/dev/barlinkN`: the file operations that implement [`crate::wire::uapi`].
//!
//! C header: `include/linux/fs.h`.

use crate::{
    areas::MapOptions,
    buffer,
    chardev::CharDevice,
    claims::FileId,
    compat,
    device::Device,
    events::{
        subscribe,
        Listener,
        Subscription,
        Vectors, //
    },
    mapping,
    shim,
    signals::Signals,
    wire::{
        layout::PAGE_WORDS,
        uapi::{
            self,
            Asked,
            Buffer,
            Claim,
            Doorbell,
            Eventfd,
            Info,
            Interrupts,
            Map,
            Superblock, //
        },
    },
};
use kernel::{
    bindings,
    error::from_result,
    fs::file::{
        flags,
        LocalFile, //
    },
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    },
    transmute::{
        AsBytes,
        FromBytes, //
    },
    types::ForeignOwnable,
    uaccess::{
        UserPtr,
        UserSlice, //
    },
};

/// `EPOLLIN | EPOLLRDNORM` (`include/uapi/linux/eventpoll.h`).
const READABLE: bindings::__poll_t = 0x001 | 0x040;
/// `EPOLLERR | EPOLLHUP`.
const HUNG_UP: bindings::__poll_t = 0x008 | 0x010;

/// `EOPNOTSUPP` (`include/uapi/asm-generic/errno.h`), which the `kernel` crate does not name.
const EOPNOTSUPP: c_int = 95;

/// File operations of a device node. `owner` keeps the module loaded while a file is open.
pub(crate) const OPERATIONS: bindings::file_operations = bindings::file_operations {
    owner: compat::THIS_MODULE,
    open: Some(open),
    flush: Some(flush),
    release: Some(release),
    read: Some(read),
    poll: Some(poll),
    unlocked_ioctl: Some(ioctl),
    // A 32-bit process has the same structures.
    #[cfg(CONFIG_COMPAT)]
    compat_ioctl: bindings::compat_ptr_ioctl,
    mmap_prepare: Some(mapping::prepare),
    // Chooses addresses at which large pages are possible.
    #[cfg(CONFIG_TRANSPARENT_HUGEPAGE)]
    get_unmapped_area: Some(bindings::thp_get_unmapped_area),
    ..pin_init::zeroed()
};

// SAFETY: The struct consists of integers without padding: `uapi.rs` asserts that its size is the
// sum of their sizes.
unsafe impl AsBytes for Info {}
// SAFETY: The struct is an array of integers.
unsafe impl AsBytes for Interrupts {}
// SAFETY: The struct is an integer.
unsafe impl AsBytes for Asked {}
// SAFETY: The struct consists of four integers without padding, 24 bytes in all.
unsafe impl AsBytes for Buffer {}
// SAFETY: The struct consists of integers, for which any bytes are valid.
unsafe impl FromBytes for Buffer {}
// SAFETY: The struct consists of two integers, for which any bytes are valid.
unsafe impl FromBytes for Claim {}
// SAFETY: The struct consists of two integers, for which any bytes are valid.
unsafe impl FromBytes for Doorbell {}

// SAFETY: The struct consists of two integers, for which any bytes are valid.
unsafe impl FromBytes for Map {}
// SAFETY: The struct consists of two integers, for which any bytes are valid.
unsafe impl FromBytes for Eventfd {}

/// An open file.
#[pin_data]
pub(crate) struct OpenFile {
    /// The file's device, which may be gone.
    pub(crate) device: Arc<Device>,
    id: FileId,
    listener: Arc<Listener>,
    _removal: Subscription,
    #[pin]
    vectors: Mutex<Vectors>,
    /// Eventfds that vectors of the device write.
    #[pin]
    signals: Mutex<Signals>,
    /// Map options for the file's next mappings, as [`MapOptions::word`].
    options: Atomic<u32>,
}

impl OpenFile {
    /// Creates a file without claims. `ENOMEM`.
    ///
    /// Memory of a file is charged to the program's control group, here and in `events.rs` and
    /// `signals.rs`, because a program can open many files. With 256 vectors a file has 18 KiB.
    fn new(device: Arc<Device>) -> Result<Pin<KBox<Self>>> {
        let listener = Arc::pin_init(Listener::new(), GFP_KERNEL_ACCOUNT)?;
        let removal = subscribe(&listener, &device.removal, None)?;
        let vectors = Vectors::all(&listener, &device.vectors)?;
        KBox::pin_init(
            try_pin_init!(Self {
                id: device.new_file(),
                device,
                listener,
                _removal: removal,
                vectors <- new_mutex!(vectors),
                signals <- new_mutex!(Signals::new()),
                options: Atomic::new(MapOptions::DEFAULT.word()),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Returns the open file behind a `struct file`.
    ///
    /// # Safety
    ///
    /// `file` must have [`OPERATIONS`], and stay open for `'a`.
    pub(crate) unsafe fn of<'a>(file: *const bindings::file) -> Pin<&'a Self> {
        // SAFETY: By this function's contract, `open` has stored the value there and `release` has
        // not taken it yet.
        unsafe { Pin::<KBox<Self>>::borrow((*file).private_data) }
    }

    /// Returns the vectors of this file that have fired. Unless `nonblocking`, waits for the first.
    ///
    /// `EAGAIN` if the call would wait, `ERESTARTSYS` if a signal ends the wait, `EOPNOTSUPP` if
    /// the device has no vectors, `ENODEV`.
    fn interrupts(&self, nonblocking: bool) -> Result<Interrupts> {
        loop {
            self.device.check()?;
            if self.device.vectors.is_empty() {
                return Err(Error::from_errno(-EOPNOTSUPP));
            }
            if let Some(fired) = self.listener.take() {
                return Ok(fired);
            }
            if nonblocking {
                return Err(EAGAIN);
            }
            let something = || self.listener.has_fired() || self.device.is_gone();
            self.listener.sleepers.wait(something)?;
        }
    }

    /// Claims one end of a channel, and narrows the file's vectors to those of its claims.
    fn claim(&self, claim: Claim) -> Result {
        let (end, vector) = self.device.own_end(claim.channel, claim.end)?;
        self.vectors
            .lock()
            .claim(&self.listener, &self.device.vectors, vector, || {
                self.device.claim(claim.channel, end, self.id)
            })
    }

    /// Returns the options for the file's next mappings.
    pub(crate) fn options(&self) -> MapOptions {
        MapOptions::from_word(self.options.load(Relaxed))
    }

    /// Handles an ioctl. `ENOTTY` if the command is unknown.
    fn ioctl(&self, file: &LocalFile, command: u32, argument: usize) -> Result<c_long> {
        self.device.check()?;
        let user = |size| UserSlice::new(UserPtr::from_addr(argument), size);
        match command {
            uapi::INFO => user(size_of::<Info>())
                .writer()
                .write(&self.device.info()?)?,
            uapi::CLAIM => {
                check_writable(file)?;
                self.claim(user(size_of::<Claim>()).reader().read()?)?;
            }
            uapi::DOORBELL => {
                check_writable(file)?;
                let doorbell: Doorbell = user(size_of::<Doorbell>()).reader().read()?;
                self.device.ring(doorbell.peer, doorbell.vector)?;
            }
            uapi::MAP => {
                let map: Map = user(size_of::<Map>()).reader().read()?;
                let options = MapOptions::new(map.cache, map.flags)?;
                self.options.store(options.word(), Relaxed);
            }
            uapi::EVENTFD => {
                let eventfd: Eventfd = user(size_of::<Eventfd>()).reader().read()?;
                let mut signals = self.signals.lock();
                signals.set(&self.device, eventfd.vector, eventfd.descriptor)?;
            }
            uapi::BUFFER => {
                check_writable(file)?;
                let (mut reader, mut writer) = user(size_of::<Buffer>()).reader_writer();
                let request: Buffer = reader.read()?;
                buffer::make(&self.device, request.size, |made| writer.write(&made))?;
            }
            uapi::SUPERBLOCK => {
                let mut words = KVec::with_capacity(PAGE_WORDS, GFP_KERNEL)?;
                for _ in 0..PAGE_WORDS {
                    words.push(0, GFP_KERNEL)?;
                }
                let page: &mut [u64; PAGE_WORDS] =
                    words.as_mut_slice().try_into().map_err(|_| EINVAL)?;
                self.device.superblock(page)?;
                user(size_of::<Superblock>()).writer().write(&*page)?;
            }
            uapi::REFRESH => self.device.refresh()?,
            uapi::ASK => {
                check_writable(file)?;
                let count = self.device.ask()?;
                user(size_of::<Asked>()).writer().write(&Asked { count })?;
            }
            _ => return Err(ENOTTY),
        }
        Ok(0)
    }
}

/// Returns `EBADF` if a file is not open for writing.
pub(crate) fn check_writable(file: &LocalFile) -> Result {
    match file.flags() & flags::O_ACCMODE {
        flags::O_WRONLY | flags::O_RDWR => Ok(()),
        _ => Err(EBADF),
    }
}

/// Implements the `open` file operation: creates an [`OpenFile`], and gives the file the address
/// space of its device.
///
/// # Safety
///
/// Only for [`OPERATIONS`], in the `miscdevice` of a [`CharDevice`].
unsafe extern "C" fn open(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    from_result(|| {
        // SAFETY: `misc_open` has stored the `miscdevice` there, and holds the lock without which
        // `misc_deregister` cannot finish.
        let device = unsafe { CharDevice::of((*file).private_data.cast()) };
        let opened = OpenFile::new(device)?;
        // SAFETY: Only this function uses the file until it returns, and a driver may set these two
        // fields. The address space exists until `release` drops the device, and the kernel does
        // not use it after that.
        unsafe {
            (*file).f_mapping = opened.device.mappings.address_space();
            (*file).private_data = opened.into_foreign();
        }
        // SAFETY: Both pointers are valid, and the file is being opened. The function cannot fail:
        // it only makes the file one without a position.
        Ok(unsafe { bindings::stream_open(inode, file) })
    })
}

/// Implements the `flush` file operation, which the kernel calls when a process closes a descriptor
/// or ends: lets the file's claims name a process that still has the file.
///
/// # Safety
///
/// Only for [`OPERATIONS`].
unsafe extern "C" fn flush(file: *mut bindings::file, _owner: bindings::fl_owner_t) -> c_int {
    // SAFETY: The file is open until this returns.
    let opened = unsafe { OpenFile::of(file) };
    // SAFETY: The file is open until this returns, and the function only compares the pointer.
    let other = || unsafe { shim::barlink_process_with(file) };
    opened.device.pass_on(opened.id, other);
    0
}

/// Implements the `release` file operation: ends the file's claims and subscriptions.
///
/// # Safety
///
/// Only for [`OPERATIONS`].
unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: `open` has stored the value there, and the kernel calls no other operation of the
    // file after this one.
    let opened = unsafe { Pin::<KBox<OpenFile>>::from_foreign((*file).private_data) };
    opened.device.release(opened.id);
    0
}

/// Implements the `read` file operation: returns one [`Interrupts`].
///
/// # Safety
///
/// Only for [`OPERATIONS`].
unsafe extern "C" fn read(
    file: *mut bindings::file,
    buffer: *mut c_char,
    size: usize,
    _position: *mut bindings::loff_t,
) -> isize {
    // SAFETY: The file is open while it is read. `LocalFile` rules out that another thread is in an
    // `fdget_pos` without the lock, because both could use the file position. This file has no
    // position (`stream_open`), so such a thread does no harm.
    let (opened, file) = unsafe { (OpenFile::of(file), LocalFile::from_raw_file(file)) };
    from_result(|| {
        if size < size_of::<Interrupts>() {
            return Err(EINVAL);
        }
        let fired = opened.interrupts(file.flags() & flags::O_NONBLOCK != 0)?;
        let mut user = UserSlice::new(UserPtr::from_ptr(buffer.cast()), size).writer();
        user.write(&fired)
            .inspect_err(|_| opened.listener.put_back(&fired))?;
        // CAST: The size is 32.
        Ok(size_of::<Interrupts>() as isize)
    })
}

/// Implements the `poll` file operation: reports fired vectors, or that the device is gone.
///
/// # Safety
///
/// Only for [`OPERATIONS`].
unsafe extern "C" fn poll(
    file: *mut bindings::file,
    table: *mut bindings::poll_table,
) -> bindings::__poll_t {
    // SAFETY: The file is open while it is polled.
    let opened = unsafe { OpenFile::of(file) };
    // SAFETY: The arguments are those of a running `poll` operation, and the file keeps the
    // listener until its release.
    unsafe { opened.listener.sleepers.poll(file, table) };
    if opened.device.is_gone() {
        HUNG_UP
    } else if opened.listener.has_fired() {
        READABLE
    } else {
        0
    }
}

/// Implements the `unlocked_ioctl` file operation: handles one ioctl.
///
/// # Safety
///
/// Only for [`OPERATIONS`].
unsafe extern "C" fn ioctl(
    file: *mut bindings::file,
    command: c_uint,
    argument: c_ulong,
) -> c_long {
    // SAFETY: The file is open during the call. As in `read`, another thread's `fdget_pos` without
    // the lock does no harm, because the file has no position.
    let (opened, file) = unsafe { (OpenFile::of(file), LocalFile::from_raw_file(file)) };
    from_result(|| opened.ioctl(file, command, argument))
}
