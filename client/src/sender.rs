// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The end of a channel that sends, and the reservation that a record is written into.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use barlink_protocol::cursor::Kind;
use barlink_protocol::{Draft, PresenceWords, Strategy};

use crate::doorbell::Doorbells;
use crate::error::{ChannelError, Error};
use crate::memory::{Mapping, Region};
use crate::owned::Owned;
use crate::readiness::Readiness;
use crate::stream::StreamWriter;

/// The sender that the ring itself has.
pub type RingSender = barlink_protocol::Sender<Mapping, Doorbells>;

/// The outcome of a record that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a record can be dropped"]
pub enum Sent {
    /// The record was committed: the receiver sees it.
    Committed,
    /// The record was staged: [`Sender::publish`] commits it.
    Staged,
    /// The channel was full, and this sender drops such records. The record was counted.
    Dropped,
}

/// The end of a channel that sends records. The claim of the end lasts as long as this value. When
/// it is dropped, it publishes the staged records, and an error of that is lost:
/// [`Sender::publish`] returns it.
///
/// ```no_run
/// use barlink::{Kind, Sent, host};
///
/// let broker = host::connect("default")?;
/// let mut sender = broker.sender("down")?;
/// if sender.send(Kind::USER, b"a command")? == Sent::Dropped {
///     println!("{} records are gone", sender.dropped());
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
///
/// The descriptor of a sender ([`AsFd`]) is readable while a call may find room. A program that got
/// [`Error::Full`] waits for it with epoll, mio or tokio, and tries again.
#[derive(Debug)]
pub struct Sender {
    ring: Owned<RingSender>,
    readiness: Readiness,
    region: Region,
    peer: Option<PresenceWords>,
}

impl Sender {
    pub(crate) fn new(
        ring: RingSender,
        region: Region,
        peer: Option<PresenceWords>,
    ) -> Result<Self, Error> {
        Ok(Sender {
            readiness: Readiness::new(ring.events())?,
            ring: Owned::new(ring),
            region,
            peer,
        })
    }

    /// Copies a record into the channel and commits it. Waits for room as long as it takes. A
    /// sender that drops does not wait.
    ///
    /// # Errors
    ///
    /// The record is larger than [`Sender::max_record`], the channel is corrupt, or the device is
    /// gone.
    #[inline]
    pub fn send(&mut self, kind: Kind, bytes: &[u8]) -> Result<Sent, Error> {
        let sent = self.ring.send(kind, bytes, None);
        self.outcome(sent)
    }

    /// Copies a record into the channel and commits it, if there is room now.
    ///
    /// # Errors
    ///
    /// [`Error::Full`] if there is no room, and those of [`Sender::send`].
    #[inline]
    pub fn try_send(&mut self, kind: Kind, bytes: &[u8]) -> Result<Sent, Error> {
        self.send_timeout(kind, bytes, Duration::ZERO)
    }

    /// Copies a record into the channel and commits it. Waits for room until `timeout` is over.
    ///
    /// # Errors
    ///
    /// [`Error::Full`] if there is still no room then, and those of [`Sender::send`].
    #[inline]
    pub fn send_timeout(
        &mut self,
        kind: Kind,
        bytes: &[u8],
        timeout: Duration,
    ) -> Result<Sent, Error> {
        let sent = self.ring.send(kind, bytes, Some(timeout));
        self.outcome(sent)
    }

    /// Copies a record into the channel without committing it. [`Sender::publish`] commits all
    /// staged records at once, which costs less than committing each. Waits for room as
    /// [`Sender::send`] does, and then publishes first.
    ///
    /// ```no_run
    /// use barlink::{Kind, host};
    ///
    /// let broker = host::connect("default")?;
    /// let mut sender = broker.sender("down")?;
    /// for number in 0..1000_u32 {
    ///     let _ = sender.stage(Kind::USER, &number.to_le_bytes())?;
    /// }
    /// sender.publish()?;
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Sender::send`].
    #[inline]
    pub fn stage(&mut self, kind: Kind, bytes: &[u8]) -> Result<Sent, Error> {
        let time = self.ring.time();
        let sent = self.ring.stage(kind, bytes, None, time);
        self.outcome(sent)
    }

    /// Commits all staged records, and rings the receiver if it asked for that.
    ///
    /// # Errors
    ///
    /// Ringing failed.
    pub fn publish(&mut self) -> Result<(), Error> {
        Ok(self.ring.publish()?)
    }

    /// Reserves room for a record of at most `length` bytes in the shared memory itself. Waits for
    /// room as long as it takes, also if the sender drops.
    ///
    /// ```no_run
    /// use std::io::Write;
    ///
    /// use barlink::{Kind, host};
    ///
    /// let broker = host::connect("default")?;
    /// let mut sender = broker.sender("down")?;
    /// let mut record = sender.reserve(256)?;
    /// writeln!(record, "set speed {}", 3.5)?;
    /// record.commit(Kind::USER)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Sender::send`].
    pub fn reserve(&mut self, length: usize) -> Result<Reservation<'_>, Error> {
        self.reserve_until(length, None)
    }

    /// Reserves room for a record, if there is room now.
    ///
    /// # Errors
    ///
    /// [`Error::Full`] if there is no room, and those of [`Sender::send`].
    pub fn try_reserve(&mut self, length: usize) -> Result<Reservation<'_>, Error> {
        self.reserve_until(length, Some(Duration::ZERO))
    }

    /// Reserves room for a record. Waits for room until `timeout` is over.
    ///
    /// # Errors
    ///
    /// [`Error::Full`] if there is still no room then, and those of [`Sender::send`].
    pub fn reserve_timeout(
        &mut self,
        length: usize,
        timeout: Duration,
    ) -> Result<Reservation<'_>, Error> {
        self.reserve_until(length, Some(timeout))
    }

    #[inline]
    fn reserve_until(
        &mut self,
        length: usize,
        timeout: Option<Duration>,
    ) -> Result<Reservation<'_>, Error> {
        if timeout.is_some() && self.ring.draft(length, timeout)?.is_none() {
            self.found_no_room();
            return Err(Error::Full);
        }
        self.readiness.busy();
        // Room that was found is still there, so this does not wait for it.
        match self.ring.draft(length, None)? {
            Some(draft) => Ok(Reservation {
                draft,
                length: 0,
                tail: [0; 8],
            }),
            None => Err(Error::Full),
        }
    }

    /// Returns a writer that sends a byte stream, as `barlink send` does. It sets
    /// [`Strategy::STREAM`], which remains set afterwards: [`Sender::set_strategy`] sets another
    /// one.
    ///
    /// ```no_run
    /// use std::io::Write;
    ///
    /// use barlink::host;
    ///
    /// let broker = host::connect("default")?;
    /// let mut sender = broker.sender("down")?;
    /// let mut stream = sender.stream();
    /// stream.write_all(b"a file, or a log")?;
    /// stream.finish()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stream(&mut self) -> StreamWriter<'_> {
        StreamWriter::new(self)
    }

    /// Returns the most bytes that one record can carry.
    pub fn max_record(&self) -> usize {
        self.ring.max_record() as usize
    }

    /// Returns the number of the next record. It counts all records that were committed, staged or
    /// dropped before.
    pub fn sequence(&self) -> u64 {
        self.ring.sequence()
    }

    /// Returns the number of records that were dropped since the channel began.
    pub fn dropped(&self) -> u64 {
        self.ring.dropped()
    }

    /// Whether this sender drops records that find the channel full.
    pub fn drops(&self) -> bool {
        self.ring.drops()
    }

    /// Whether a process holds the other end, now. Between two VMs it is not visible, and counts as
    /// present.
    pub fn is_peer_present(&self) -> bool {
        is_present(&self.region, self.peer)
    }

    /// Sets how this end waits from now on.
    pub fn set_strategy(&mut self, strategy: Strategy) {
        self.ring.set_strategy(strategy);
    }

    /// Returns the ring's own sender, which the bench measures. The claim goes with it.
    #[doc(hidden)]
    pub fn into_ring(mut self) -> RingSender {
        self.ring.take()
    }

    /// Returns the ring for calls that can sleep. Such a sleep takes rings and disarms the wake-up,
    /// so the descriptor must be readable until the end finds no room again.
    pub(crate) fn ring(&mut self) -> &mut RingSender {
        self.readiness.busy();
        &mut self.ring
    }

    #[inline]
    fn outcome(
        &mut self,
        sent: Result<barlink_protocol::Sent, ChannelError>,
    ) -> Result<Sent, Error> {
        let sent = match sent? {
            barlink_protocol::Sent::Committed => Sent::Committed,
            barlink_protocol::Sent::Staged => Sent::Staged,
            barlink_protocol::Sent::Dropped => Sent::Dropped,
            barlink_protocol::Sent::TimedOut => {
                self.found_no_room();
                return Err(Error::Full);
            }
        };
        self.readiness.busy();
        Ok(sent)
    }

    #[cold]
    fn found_no_room(&mut self) {
        self.readiness.quiet(self.ring.events(), self.ring.peer());
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let ring = self.ring.get().filter(|ring| !ring.events().is_gone());
        if let Some(ring) = ring {
            // The records are committed even if ringing fails.
            let _ = ring.publish();
        }
    }
}

impl AsFd for Sender {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.readiness.as_fd()
    }
}

impl AsRawFd for Sender {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// Reads whether a process holds the end whose presence is in these words.
pub(crate) fn is_present(region: &Region, words: Option<PresenceWords>) -> bool {
    words.is_none_or(|words| words.read(region).is_held())
}

/// Room for a record, in the shared memory itself. [`Write`] appends to the record. A reservation
/// that is dropped leaves the channel as it was.
///
/// See [`Sender::reserve`] for an example.
#[derive(Debug)]
pub struct Reservation<'a> {
    draft: Draft<'a, Mapping, Doorbells>,
    /// Bytes that were written.
    length: u32,
    /// The bytes that were written behind the last whole word.
    tail: [u8; 8],
}

impl Reservation<'_> {
    /// Returns the bytes that were written so far.
    pub fn len(&self) -> usize {
        self.length as usize
    }

    /// Whether nothing was written yet.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Returns the bytes that can be written in all.
    pub fn capacity(&self) -> usize {
        self.draft.length() as usize
    }

    /// Lets the kernel read from a file straight into an empty reservation, without a copy in
    /// between. Returns the bytes read: 0 at the end of the file, or if the reservation is not
    /// empty.
    ///
    /// # Errors
    ///
    /// `read(2)` failed.
    pub fn read_from(&mut self, file: impl AsFd) -> io::Result<usize> {
        if self.length > 0 {
            return Ok(0);
        }
        self.length = self.draft.read_from(file.as_fd().as_raw_fd())?;
        if !self.length.is_multiple_of(8) {
            self.tail = self.draft.word(self.length / 8).to_le_bytes();
        }
        Ok(self.length as usize)
    }

    /// Commits the record with the bytes that were written, and rings the receiver if it asked for
    /// that.
    ///
    /// # Errors
    ///
    /// Ringing failed. The record is committed all the same.
    pub fn commit(mut self, kind: Kind) -> Result<(), Error> {
        let partial = (self.length % 8) as usize;
        if partial > 0 {
            self.draft.write(self.length / 8 * 8, &self.tail[..partial]);
        }
        Ok(self.draft.commit(kind, self.length)?)
    }
}

impl Write for Reservation<'_> {
    /// Appends bytes to the record, as many as there is room for.
    #[inline]
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
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
            self.draft.write(self.length - 8, &self.tail);
        }
        let (whole, last) = rest.split_at(rest.len() / 8 * 8);
        if !whole.is_empty() {
            self.draft.write(self.length, whole);
        }
        self.tail[..last.len()].copy_from_slice(last);
        self.length += rest.len() as u32;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
