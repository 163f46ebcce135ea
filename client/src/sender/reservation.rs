// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Room in the shared memory that a record is written into.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use barlink_protocol::aligned::{ALIGNMENT, AlignedBuffer};
use barlink_protocol::cursor::{Kind, Stamp};
use barlink_protocol::{AtomicU64, Events, SenderReservation};

use crate::doorbell::Doorbells;
use crate::error::Error;
use crate::memory::Mapping;

/// Room for a record, in the shared memory itself. [`Write`] appends to the record, and writes 0
/// bytes once the room is used up. A reservation that is dropped leaves the channel as it was.
///
/// ```no_run
/// use std::io::Write;
///
/// use barlink::{Kind, host};
///
/// let mut log = host::connect("default")?.sender("log")?;
/// let mut line = log.reserve(80)?;
/// line.write_all(&std::fs::read("/proc/loadavg")?)?;
/// println!("{} of {} bytes", line.len(), line.capacity());
/// if !line.is_empty() {
///     line.commit(Kind::USER)?;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "a reservation that is not committed sends nothing"]
pub struct Reservation<'a> {
    reservation: SenderReservation<'a, Mapping, Doorbells>,
    /// Bytes that were written.
    length: u32,
    /// The bytes that were written behind the last whole word.
    tail: [u8; 8],
}

impl<'a> Reservation<'a> {
    pub(super) fn new(reservation: SenderReservation<'a, Mapping, Doorbells>) -> Self {
        Reservation {
            reservation,
            length: 0,
            tail: [0; 8],
        }
    }

    /// Returns the number of bytes that were written so far.
    pub fn len(&self) -> usize {
        self.length as usize
    }

    /// Returns whether nothing was written yet.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Returns the number of bytes that can be written in all: the length that was reserved.
    pub fn capacity(&self) -> usize {
        self.reservation.length() as usize
    }

    /// Appends bytes of a file to the record. Calls `read(2)` once, so a pipe can give fewer bytes
    /// than fit, and another call appends more. Returns the bytes read: 0 at the end of the file,
    /// or if the room is used up, as for [`Write::write`].
    ///
    /// The kernel reads straight into an empty reservation, without a copy in between. Bytes go by
    /// way of a private buffer if the reservation has some already, or if the kernel cannot read
    /// the file into the memory of a device, as with `O_DIRECT` in a guest.
    ///
    /// ```no_run
    /// use std::fs::File;
    ///
    /// use barlink::{Kind, host};
    ///
    /// let mut sender = host::connect("default")?.sender("down")?;
    /// let photo = File::open("photo.jpg")?;
    /// loop {
    ///     let mut record = sender.reserve(1 << 16)?;
    ///     if record.read_from(&photo)? == 0 {
    ///         break;
    ///     }
    ///     record.commit(Kind::USER)?;
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// `read(2)` failed; [`io::ErrorKind::WouldBlock`] is a file that is non-blocking and not
    /// ready. Or the device is gone.
    pub fn read_from(&mut self, file: impl AsFd) -> io::Result<usize> {
        let events = self.reservation.events();
        events.check_process().map_err(Error::from)?;
        let file = file.as_fd();
        if self.length > 0 {
            return self.append_from(file);
        }
        self.length = match self.reservation.read_from(file.as_raw_fd()) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EINVAL)) => {
                self.reservation
                    .events()
                    .check_device()
                    .map_err(Error::from)?;
                return self.append_from(file);
            }
            length => length?,
        };
        self.load_tail();
        Ok(self.length as usize)
    }

    /// Returns the room in place, as words, for a program that builds the record in them. Byte 0 of
    /// the record is the lowest byte of the first word. The words have any values at first.
    /// [`Reservation::set_len`] then says how many bytes the record has.
    ///
    /// ```no_run
    /// use std::sync::atomic::Ordering;
    ///
    /// use barlink::{Kind, host};
    ///
    /// let mut sensor = host::connect("default")?.sender("down")?;
    /// let mut record = sensor.reserve(16)?;
    /// for (word, value) in record.words().iter().zip([3_u64, 4]) {
    ///     word.store(value, Ordering::Relaxed);
    /// }
    /// record.set_len(16);
    /// record.commit(Kind::USER)?;
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn words(&mut self) -> &[AtomicU64] {
        self.reservation.words()
    }

    /// Sets the number of bytes that were written so far, those in [`Reservation::words`] included.
    ///
    /// # Panics
    ///
    /// Panics if there is less room.
    pub fn set_len(&mut self, length: usize) {
        assert!(
            length <= self.capacity(),
            "{length} bytes of {}",
            self.capacity()
        );
        self.length = length as u32;
        self.load_tail();
    }

    /// Loads the bytes behind the last whole word.
    fn load_tail(&mut self) {
        if !self.length.is_multiple_of(8) {
            self.tail = self.reservation.word(self.length / 8).to_le_bytes();
        }
    }

    /// Appends bytes of a file by way of a private buffer. Returns the bytes read.
    #[cold]
    fn append_from(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        // A file with O_DIRECT is read in whole blocks.
        let length = match self.capacity() - self.len() {
            0 => return Ok(0),
            length @ ..ALIGNMENT => length,
            length => (length / ALIGNMENT * ALIGNMENT).min(256 << 10),
        };
        let mut buffer = AlignedBuffer::new(length)?;
        let length = rustix::io::read(file, buffer.bytes())?;
        self.write(&buffer.bytes()[..length])
    }

    /// Commits the record with the bytes that were written, and rings the receiver if it asked for
    /// that. Records that were staged before are committed with it.
    ///
    /// ```no_run
    /// use std::io::Write;
    ///
    /// use barlink::{Kind, host};
    ///
    /// let mut sensor = host::connect("default")?.sender("down")?;
    /// let mut record = sensor.reserve(16)?;
    /// let reading = 21.5_f64;
    /// record.write_all(&reading.to_le_bytes())?;
    /// // A reading out of range is not sent: the reservation is dropped.
    /// if reading < 100.0 {
    ///     record.commit(Kind::USER)?;
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Ringing failed ([`ErrorKind::Other`]): the records are committed. The channel was reset
    /// ([`ErrorKind::Reset`]), this is a forked process ([`ErrorKind::Inherited`]) or the device is
    /// gone ([`ErrorKind::Gone`]): they may not be in the channel.
    ///
    /// [`ErrorKind::Other`]: crate::ErrorKind::Other
    /// [`ErrorKind::Reset`]: crate::ErrorKind::Reset
    /// [`ErrorKind::Inherited`]: crate::ErrorKind::Inherited
    /// [`ErrorKind::Gone`]: crate::ErrorKind::Gone
    pub fn commit(mut self, kind: Kind) -> Result<(), Error> {
        self.complete();
        Ok(self.reservation.commit(kind, self.length)?)
    }

    /// Commits the record as [`Reservation::commit`] does, with a time stamp of the program's own.
    ///
    /// ```no_run
    /// use std::io::Write;
    ///
    /// use barlink::{Clock, Kind, Stamp, host};
    ///
    /// // A clock that the camera has, and that its frames carry.
    /// const SENSOR: Clock = Clock::USER;
    ///
    /// let mut camera = host::connect("default")?.sender("camera")?;
    /// let mut frame = camera.reserve(320 * 240)?;
    /// frame.write_all(&[0; 320 * 240])?;
    /// frame.commit_at(Kind::USER, Stamp::new(1_000_000, SENSOR))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Reservation::commit`].
    pub fn commit_at(mut self, kind: Kind, stamp: Stamp) -> Result<(), Error> {
        self.complete();
        Ok(self.reservation.commit_at(kind, self.length, stamp)?)
    }

    /// Writes the bytes behind the last whole word.
    fn complete(&mut self) {
        let partial = (self.length % 8) as usize;
        if partial > 0 {
            self.reservation
                .write(self.length / 8 * 8, &self.tail[..partial]);
        }
    }
}

impl Write for Reservation<'_> {
    /// Appends bytes to the record, as many as there is room for. Returns their number.
    #[inline]
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let events = self.reservation.events();
        events.check_process().map_err(Error::from)?;
        let room = self.capacity() - self.len();
        let bytes = &bytes[..bytes.len().min(room)];
        let mut rest = bytes;
        let partial = (self.length % 8) as usize;
        if partial > 0 {
            let fits = rest.len().min(8 - partial);
            let (now, later) = rest.split_at(fits);
            self.tail[partial..partial + fits].copy_from_slice(now);
            self.length += fits as u32;
            rest = later;
            if partial + fits < 8 {
                return Ok(bytes.len());
            }
            self.reservation.write(self.length - 8, &self.tail);
        }
        let (whole, last) = rest.split_at(rest.len() / 8 * 8);
        if !whole.is_empty() {
            self.reservation.write(self.length, whole);
        }
        self.tail[..last.len()].copy_from_slice(last);
        self.length += rest.len() as u32;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
