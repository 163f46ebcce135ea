// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A record that a receiver found, in place or copied.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};

use barlink_protocol::aligned::AlignedBuffer;
use barlink_protocol::cursor::{Clock, Kind};
use barlink_protocol::{AtomicU64, Events};

use crate::error::Error;
use crate::memory::Mapping;
use crate::receiver::Receiver;

/// Size of the private buffer for files to which the kernel cannot write from the region.
const COPY_SIZE: usize = 256 << 10;

/// A private copy of a record. [`Iter`](crate::Iter) and [`Tap`](crate::Tap) return it, and
/// [`Record::to_owned`] makes it.
///
/// ```no_run
/// use std::sync::mpsc;
///
/// use barlink::{OwnedRecord, host};
///
/// let (worker, records) = mpsc::channel::<OwnedRecord>();
/// std::thread::spawn(move || {
///     for record in records {
///         println!("{} ns: {:?}", record.time, record.bytes);
///     }
/// });
/// let mut receiver = host::connect("default")?.receiver("up")?;
/// while worker.send(receiver.recv()?.to_owned()).is_ok() {}
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OwnedRecord {
    /// The type of the content.
    pub kind: Kind,
    /// The number of the record in the channel, from 0 at each reset unless the sender chose
    /// another one. A gap is records that were dropped, or numbers that the sender skipped.
    pub sequence: u64,
    /// The time of `clock`, in nanoseconds: the sender's `CLOCK_MONOTONIC` when it sent or staged
    /// the record, unless the sender gave another time. A guest and its host have different clocks.
    pub time: u64,
    /// The clock of the time.
    pub clock: Clock,
    /// The content.
    pub bytes: Vec<u8>,
}

impl Default for OwnedRecord {
    /// Returns an empty record, for [`Tap::recv_into`](crate::Tap::recv_into).
    fn default() -> Self {
        OwnedRecord {
            kind: Kind::DATA,
            sequence: 0,
            time: 0,
            clock: Clock::MONOTONIC,
            bytes: Vec::new(),
        }
    }
}

/// Effect of dropping a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtEnd {
    /// Release it, and all that the receiver advanced over.
    Release,
    /// Release it later.
    Advance,
    /// The next call receives it again.
    Keep,
}

/// A record, in the shared memory itself. When it is dropped, its room is the sender's again. If
/// the thread panics, it is not released, and is received again. In a guest whose device was
/// unplugged, using or dropping a record is an access to memory that is gone (SIGBUS).
///
/// The sender can change the content at any time, so there is no `&[u8]` of it: a program that
/// parses it copies it first. All methods but [`Record::words`] copy. [`Read`] reads the content
/// once, from its start.
///
/// ```no_run
/// use std::io::Read;
///
/// use barlink::host;
///
/// let mut receiver = host::connect("default")?.receiver("up")?;
/// let mut record = receiver.recv()?;
/// println!("record {} of {:?}", record.sequence(), record.kind());
/// println!("at {} ns, {} missed", record.time(), record.missed());
/// if !record.is_empty() {
///     let mut text = String::with_capacity(record.len());
///     record.read_to_string(&mut text)?;
///     println!("{text}");
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "a record that is dropped is released, and is not received again"]
pub struct Record<'a> {
    receiver: &'a mut Receiver,
    /// The offset of the next byte for [`Read`].
    position: usize,
    at_end: AtEnd,
}

impl<'a> Record<'a> {
    pub(super) fn new(receiver: &'a mut Receiver) -> Self {
        Record {
            receiver,
            position: 0,
            at_end: AtEnd::Release,
        }
    }

    /// Returns the type of the content.
    pub fn kind(&self) -> Kind {
        self.receiver.header.kind
    }

    /// Returns the number of the record in the channel, from 0 at each reset unless the sender
    /// chose another one.
    pub fn sequence(&self) -> u64 {
        self.receiver.header.sequence
    }

    /// Returns the time of [`Record::clock`], in nanoseconds: the sender's `CLOCK_MONOTONIC` when
    /// it sent or staged the record, unless the sender gave another time. A guest and its host have
    /// different clocks, so their times cannot be compared.
    pub fn time(&self) -> u64 {
        self.receiver.header.time
    }

    /// Returns the clock of the time.
    ///
    /// ```no_run
    /// use barlink::{Clock, host};
    ///
    /// let mut log = host::connect("default")?.receiver("log")?;
    /// let line = log.recv()?;
    /// // Times of different clocks cannot be compared.
    /// if line.clock() == Clock::REALTIME {
    ///     println!("{} s since 1970", line.time() / 1_000_000_000);
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn clock(&self) -> Clock {
        self.receiver.header.clock
    }

    /// Returns the number of records that the sender dropped, and of numbers that it skipped,
    /// between the last one that was received and this one.
    pub fn missed(&self) -> u64 {
        self.receiver.numbers.gap
    }

    /// Returns the number of bytes of content.
    pub fn len(&self) -> usize {
        self.receiver.header.length as usize
    }

    /// Returns whether the content is empty.
    pub fn is_empty(&self) -> bool {
        self.receiver.header.length == 0
    }

    /// Copies the start of the content, as much as fits. Returns the number of bytes copied.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let mut camera = host::connect("default")?.receiver("camera")?;
    /// let frame = camera.recv()?;
    /// // The header of a frame: width and height.
    /// let mut header = [0; 8];
    /// if frame.copy_to(&mut header) == header.len() {
    ///     let [width, height, ..] = header;
    ///     println!("{width} × {height} tiles");
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    #[inline]
    pub fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let record = self.receiver.ring.record();
        record.map_or(0, |record| record.copy_to(0, bytes))
    }

    /// Copies the content.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let mut commands = host::connect("default")?.receiver("up")?;
    /// let text = String::from_utf8(commands.recv()?.to_vec())?;
    /// println!("{:?}", text.split_whitespace().collect::<Vec<_>>());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        self.copy_to(&mut bytes);
        bytes
    }

    /// Copies the record, with its kind, number and time.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let mut log = host::connect("default")?.receiver("log")?;
    /// let mut lines = Vec::new();
    /// while let Some(line) = log.try_recv()? {
    ///     lines.push(line.to_owned());
    /// }
    /// lines.sort_by_key(|line| line.kind.number());
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn to_owned(&self) -> OwnedRecord {
        OwnedRecord {
            kind: self.kind(),
            sequence: self.sequence(),
            time: self.time(),
            clock: self.clock(),
            bytes: self.to_vec(),
        }
    }

    /// Returns the content in place, as words that the sender can still change. Byte 0 of the
    /// content is the lowest byte of the first word. A sender that follows the protocol pads the
    /// last word with zeros.
    ///
    /// ```no_run
    /// use std::sync::atomic::Ordering;
    ///
    /// use barlink::host;
    ///
    /// let mut camera = host::connect("default")?.receiver("camera")?;
    /// let frame = camera.recv()?;
    /// // The brightness of every eighth pixel, without a copy of the frame.
    /// let mut sum = 0;
    /// for word in frame.words() {
    ///     sum += word.load(Ordering::Relaxed) & 0xff;
    /// }
    /// println!("brightness {sum}");
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn words(&self) -> &[AtomicU64] {
        let record = self.receiver.ring.record();
        record.map_or(&[], |record| record.into_words())
    }

    /// Lets the kernel write the content straight to a file, without the bytes that were already
    /// read. Returns the number of bytes written, which can be fewer than there are. Each call goes
    /// on where the last one ended, and returns 0 after the last byte. If the kernel cannot write
    /// to the file from the memory of a device, as with `O_DIRECT` in a guest, the bytes go by way
    /// of a private buffer.
    ///
    /// ```no_run
    /// use std::fs::File;
    ///
    /// use barlink::host;
    ///
    /// let mut receiver = host::connect("default")?.receiver("up")?;
    /// let file = File::create("photo.jpg")?;
    /// let mut photo = receiver.recv()?;
    /// while photo.write_to(&file)? > 0 {}
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// `write(2)` failed; [`io::ErrorKind::WouldBlock`] is a file that is non-blocking and not
    /// ready. Or the device is gone.
    pub fn write_to(&mut self, file: impl AsFd) -> io::Result<usize> {
        let Some(record) = self.receiver.ring.record() else {
            return Ok(0);
        };
        let file = file.as_fd().as_raw_fd();
        let written = match record.write_to(file, self.position) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EINVAL)) => {
                self.receiver
                    .ring
                    .events()
                    .check_device()
                    .map_err(Error::from)?;
                let mut buffer = AlignedBuffer::new(COPY_SIZE)?;
                record.write_copy(file, self.position, buffer.bytes())?
            }
            written => written?,
        };
        self.position += written;
        Ok(written)
    }

    /// Releases the record, as dropping it does, and all records that the receiver advanced over.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let mut commands = host::connect("default")?.receiver("up")?;
    /// let command = commands.recv()?;
    /// println!("done: {:?}", command.to_vec());
    /// // The sender may be waiting for this room: see here that it was rung.
    /// command.release()?;
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Ringing failed ([`ErrorKind::Other`]): the records are released. The channel was reset
    /// ([`ErrorKind::Reset`]), this is a forked process ([`ErrorKind::Inherited`]) or the device is
    /// gone ([`ErrorKind::Gone`]): they may not be released. If a record is dropped instead, the
    /// next call of the receiver returns that error.
    ///
    /// [`ErrorKind::Other`]: crate::ErrorKind::Other
    /// [`ErrorKind::Reset`]: crate::ErrorKind::Reset
    /// [`ErrorKind::Inherited`]: crate::ErrorKind::Inherited
    /// [`ErrorKind::Gone`]: crate::ErrorKind::Gone
    pub fn release(mut self) -> Result<(), Error> {
        self.at_end = AtEnd::Advance;
        Ok(self.receiver.ring.release()?)
    }

    /// Advances over the record without releasing it. It is released with the next record that is
    /// released, or by the next call that finds no record at once. Releasing many records at once
    /// costs less than releasing each.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let mut samples = host::connect("default")?.receiver("up")?;
    /// loop {
    ///     let sample = samples.recv()?;
    ///     // Every 64th sample is released, and the 63 before with it.
    ///     if sample.sequence() % 64 != 0 {
    ///         sample.advance();
    ///     }
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn advance(mut self) {
        self.at_end = AtEnd::Advance;
    }

    /// Keeps the record in the channel: the next call receives it again, or the next receiver if
    /// this process ends.
    ///
    /// ```no_run
    /// use barlink::{Kind, host};
    ///
    /// let mut jobs = host::connect("default")?.receiver("up")?;
    /// let job = jobs.recv()?;
    /// if job.kind() != Kind::USER {
    ///     // Another program takes up the channel, and does this job.
    ///     job.keep();
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn keep(mut self) {
        self.at_end = AtEnd::Keep;
    }
}

impl Read for Record<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let Some(record) = self.receiver.ring.record() else {
            return Ok(0);
        };
        let read = copy_from(&record, self.position, bytes);
        self.position += read;
        Ok(read)
    }
}

/// Copies content from any offset on. Returns the bytes copied.
pub(crate) fn copy_from(
    record: &barlink_protocol::Record<'_, Mapping>,
    offset: usize,
    bytes: &mut [u8],
) -> usize {
    let left = record.length().saturating_sub(offset);
    let within = offset % 8;
    if left == 0 {
        return 0;
    }
    if within == 0 {
        return record.copy_to(offset, bytes);
    }
    // Copies the rest of a word first, so that all other bytes are copied in whole words.
    let word = record.word(offset / 8).to_le_bytes();
    let count = left.min(8 - within).min(bytes.len());
    let (first, rest) = bytes.split_at_mut(count);
    first.copy_from_slice(&word[within..within + count]);
    match rest.is_empty() || count == left {
        true => count,
        false => count + record.copy_to(offset + count, rest),
    }
}

impl Drop for Record<'_> {
    #[inline]
    fn drop(&mut self) {
        match self.at_end {
            AtEnd::Keep => (),
            AtEnd::Advance => self.receiver.ring.advance(),
            // The record was not handled, so it is received again.
            AtEnd::Release if std::thread::panicking() => (),
            AtEnd::Release => {
                if let Err(error) = self.receiver.ring.release() {
                    self.receiver.defer(error);
                }
            }
        }
    }
}
