// SPDX-License-Identifier: GPL-2.0 OR MIT

//! An open `/dev/barlinkN`: the file operations behind [`crate::wire::uapi`].
//!
//! C header: `include/linux/fs.h`.

use crate::{
    areas::Manner,
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
    signals::Signals,
    wire::uapi::{
        self,
        Buffer,
        Claim,
        Doorbell,
        Eventfd,
        Info,
        Interrupts,
        Map, //
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

/// What a file of this driver can do. The owner keeps the module loaded while a file is open.
pub(crate) const OPERATIONS: bindings::file_operations = bindings::file_operations {
    owner: compat::THIS_MODULE,
    open: Some(open),
    release: Some(release),
    read: Some(read),
    poll: Some(poll),
    unlocked_ioctl: Some(ioctl),
    // The structures are the same for a 32-bit process.
    #[cfg(CONFIG_COMPAT)]
    compat_ioctl: bindings::compat_ptr_ioctl,
    mmap_prepare: Some(mapping::prepare),
    ..pin_init::zeroed()
};

// SAFETY: Made of integers, without padding: `uapi.rs` asserts that its size is the sum of theirs.
unsafe impl AsBytes for Info {}
// SAFETY: An array of integers.
unsafe impl AsBytes for Interrupts {}
// SAFETY: Four integers, without padding: 24 bytes.
unsafe impl AsBytes for Buffer {}
// SAFETY: The same; any bytes are some.
unsafe impl FromBytes for Buffer {}
// SAFETY: Two integers; any bytes are some.
unsafe impl FromBytes for Claim {}
// SAFETY: Two integers, of any value, as it stands in `uapi.rs`.
unsafe impl FromBytes for Doorbell {}

// SAFETY: Two integers; any bytes are some.
unsafe impl FromBytes for Map {}
// SAFETY: As above.
unsafe impl FromBytes for Eventfd {}

/// An open file.
#[pin_data]
pub(crate) struct OpenFile {
    /// The device, which may be gone.
    pub(crate) device: Arc<Device>,
    id: FileId,
    listener: Arc<Listener>,
    _removal: Subscription,
    #[pin]
    vectors: Mutex<Vectors>,
    /// What user space has written for interrupts.
    #[pin]
    signals: Mutex<Signals>,
    /// How mappings are made: the word of a [`Manner`].
    manner: Atomic<u32>,
}

impl OpenFile {
    /// A file that holds no claim. `ENOMEM`.
    ///
    /// What a file has is allocated for the control group of the program, here, in `events.rs` and in `signals.rs`: with 256 vectors it is
    /// 18 KiB, and a program can open many.
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
                manner: Atomic::new(Manner::DEFAULT.word()),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// The open file behind a C one.
    ///
    /// # Safety
    ///
    /// `file` must have [`OPERATIONS`], and stay open for `'a`.
    pub(crate) unsafe fn of<'a>(file: *const bindings::file) -> Pin<&'a Self> {
        // SAFETY: By this function's contract `open` has put the value there, and `release` has not taken it.
        unsafe { Pin::<KBox<Self>>::borrow((*file).private_data) }
    }

    /// Waits, unless `nonblocking`, until a vector of this file has fired, and gives those that have.
    ///
    /// `EAGAIN` if it would wait, `ERESTARTSYS`, `EOPNOTSUPP` if the device has no vectors, `ENODEV`.
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

    /// Claims one end of a channel, and narrows this file's vectors to those of its claims.
    fn claim(&self, claim: Claim) -> Result {
        let (end, vector) = self.device.own_end(claim.channel, claim.end)?;
        self.vectors
            .lock()
            .claim(&self.listener, &self.device.vectors, vector, || {
                self.device.claim(claim.channel, end, self.id)
            })
    }

    /// How this file's mappings are to be made.
    pub(crate) fn manner(&self) -> Manner {
        Manner::from_word(self.manner.load(Relaxed))
    }

    /// Obeys an ioctl. `ENOTTY` if it is none.
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
                let bell: Doorbell = user(size_of::<Doorbell>()).reader().read()?;
                self.device.ring(bell.peer, bell.vector)?;
            }
            uapi::MAP => {
                let map: Map = user(size_of::<Map>()).reader().read()?;
                let manner = Manner::new(map.cache, map.flags)?;
                self.manner.store(manner.word(), Relaxed);
            }
            uapi::EVENTFD => {
                let eventfd: Eventfd = user(size_of::<Eventfd>()).reader().read()?;
                let mut signals = self.signals.lock();
                signals.set(&self.device, eventfd.vector, eventfd.descriptor)?;
            }
            uapi::BUFFER => {
                check_writable(file)?;
                let (mut reader, mut writer) = user(size_of::<Buffer>()).reader_writer();
                let wish: Buffer = reader.read()?;
                buffer::make(&self.device, wish.size, |made| writer.write(&made))?;
            }
            _ => return Err(ENOTTY),
        }
        Ok(0)
    }
}

/// `EBADF` if a file is not open for writing.
fn check_writable(file: &LocalFile) -> Result {
    match file.flags() & flags::O_ACCMODE {
        flags::O_WRONLY | flags::O_RDWR => Ok(()),
        _ => Err(EBADF),
    }
}

/// The `open` file operation.
///
/// # Safety
///
/// Only for [`OPERATIONS`], in the `miscdevice` of a [`CharDevice`].
unsafe extern "C" fn open(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    from_result(|| {
        // SAFETY: `misc_open` has put the `miscdevice` there, and keeps it from being deregistered meanwhile.
        let device = unsafe { CharDevice::of((*file).private_data.cast()) };
        let opened = OpenFile::new(device)?;
        // SAFETY: Until `open` returns the file is its alone, and these two fields are the driver's to set.
        // The address space stays until `release` drops the device, after which the kernel uses it no more.
        unsafe {
            (*file).f_mapping = opened.device.mappings.address_space();
            (*file).private_data = opened.into_foreign();
        }
        // SAFETY: Both are valid, and the file is being opened. No positions, no seeking; never fails.
        Ok(unsafe { bindings::stream_open(inode, file) })
    })
}

/// The `release` file operation: ends the file's claims and subscriptions.
///
/// # Safety
///
/// Only for [`OPERATIONS`].
unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: `open` has put the value there, and nobody uses the file any more.
    let opened = unsafe { Pin::<KBox<OpenFile>>::from_foreign((*file).private_data) };
    opened.device.release(opened.id);
    0
}

/// The `read` file operation: an [`Interrupts`] at a time.
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
        // CAST: 32.
        Ok(size_of::<Interrupts>() as isize)
    })
}

/// The `poll` file operation.
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
    // SAFETY: The arguments are this operation's. The listener stays until the file is released.
    unsafe { opened.listener.sleepers.poll(file, table) };
    if opened.device.is_gone() {
        HUNG_UP
    } else if opened.listener.has_fired() {
        READABLE
    } else {
        0
    }
}

/// The `unlocked_ioctl` file operation.
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
