// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The end of a channel that receives, and the records that it gives.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use barlink_protocol::cursor::{Corrupt, Header, Kind};
use barlink_protocol::{AtomicU64, PresenceWords, Strategy, Wakeup};

use crate::doorbell::Doorbells;
use crate::error::{ChannelError, Error};
use crate::memory::{Mapping, Region};
use crate::owned::Owned;
use crate::readiness::Readiness;
use crate::sender::is_present;
use crate::stream::{Position, StreamReader};

/// The receiver that the ring itself has.
pub type RingReceiver = barlink_protocol::Receiver<Mapping, Doorbells>;

/// The end of a channel that receives records. The claim of the end lasts as long as this value.
/// When it is dropped, it releases the records that were passed, unless the thread panics: then the
/// next receiver gets them again.
///
/// ```no_run
/// use barlink::host;
///
/// let broker = host::connect("default")?;
/// let mut receiver = broker.receiver("up")?;
/// loop {
///     let record = receiver.recv()?;
///     println!("record {}: {:?}", record.sequence(), record.to_vec());
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
///
/// The descriptor of a receiver ([`AsFd`]) is readable while a call may find a record. A program
/// that waits with epoll, mio or tokio calls [`Receiver::try_recv`] until that finds none, and
/// waits again.
///
/// ```no_run
/// use barlink::host;
/// use rustix::event::{PollFd, PollFlags, poll};
///
/// let broker = host::connect("default")?;
/// let mut receiver = broker.receiver("up")?;
/// loop {
///     poll(&mut [PollFd::new(&receiver, PollFlags::IN)], None)?;
///     while let Some(record) = receiver.try_recv()? {
///         println!("{:?}", record.to_vec());
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Receiver {
    ring: Owned<RingReceiver>,
    readiness: Readiness,
    region: Region,
    peer: Option<PresenceWords>,
    /// The header of the last record.
    header: Header,
    numbers: Numbers,
    position: Position,
    /// The error of a release when a record was dropped, for the next call.
    failed: Option<Error>,
}

/// The numbers of the records that a receiver found.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    /// Records that were dropped before the last one.
    gap: u64,
    /// The sequence number behind the last record.
    next: Option<u64>,
    all_missed: u64,
}

impl Numbers {
    /// Notes that a record was found. Returns the number of records that were dropped before it.
    #[inline(always)]
    pub(crate) fn note(&mut self, sequence: u64) -> u64 {
        let gap = sequence.saturating_sub(self.next.unwrap_or(sequence));
        self.gap = gap;
        self.all_missed = self.all_missed.saturating_add(gap);
        self.next = Some(sequence.saturating_add(1));
        gap
    }

    /// Returns the sequence number behind the last record.
    pub(crate) fn next(&self) -> Option<u64> {
        self.next
    }
}

impl Receiver {
    pub(crate) fn new(
        ring: RingReceiver,
        region: Region,
        peer: Option<PresenceWords>,
    ) -> Result<Self, Error> {
        Ok(Receiver {
            readiness: Readiness::new(ring.events())?,
            ring: Owned::new(ring),
            region,
            peer,
            header: Header {
                length: 0,
                kind: Kind::DATA,
                sequence: 0,
                time: 0,
            },
            numbers: Numbers::default(),
            position: Position::default(),
            failed: None,
        })
    }

    /// Receives the next record. Waits for it as long as it takes, over any coming and going of the
    /// sender.
    ///
    /// # Errors
    ///
    /// The channel is corrupt, or the device is gone.
    #[inline]
    pub fn recv(&mut self) -> Result<Record<'_>, Error> {
        self.check()?;
        while self.ring.wait(None)? != Wakeup::Ready {}
        let lost = Corrupt("a record that was found is not there");
        self.found().ok_or_else(|| lost.into())
    }

    /// Receives the next record, if there is one now.
    ///
    /// # Errors
    ///
    /// Those of [`Receiver::recv`].
    #[inline]
    pub fn try_recv(&mut self) -> Result<Option<Record<'_>>, Error> {
        self.check()?;
        loop {
            match self.ring.wait(Some(Duration::ZERO))? {
                Wakeup::Ready => return Ok(self.found()),
                Wakeup::PeerChanged => (),
                Wakeup::TimedOut => {
                    self.found_nothing();
                    return Ok(None);
                }
            }
        }
    }

    /// Receives the next record, or returns `None` if there is none before `timeout` is over.
    ///
    /// # Errors
    ///
    /// Those of [`Receiver::recv`].
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<Option<Record<'_>>, Error> {
        self.check()?;
        let start = Instant::now();
        let mut left = timeout;
        loop {
            match self.ring.wait(Some(left))? {
                Wakeup::Ready => return Ok(self.found()),
                Wakeup::PeerChanged => left = timeout.saturating_sub(start.elapsed()),
                Wakeup::TimedOut => {
                    self.found_nothing();
                    return Ok(None);
                }
            }
        }
    }

    /// Returns an iterator over copies of the records. It waits for each one, and ends after an
    /// error.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let broker = host::connect("default")?;
    /// let mut receiver = broker.receiver("up")?;
    /// for record in receiver.iter().take(10) {
    ///     println!("{:?}", record?.bytes);
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn iter(&mut self) -> Iter<'_> {
        Iter {
            receiver: self,
            failed: false,
        }
    }

    /// Releases the records that were passed ([`Record::pass`]), so that the sender can use their
    /// room. A record that was kept ([`Record::keep`]) remains in the channel.
    ///
    /// # Errors
    ///
    /// Ringing failed.
    pub fn release(&mut self) -> Result<(), Error> {
        Ok(self.ring.release_passed()?)
    }

    /// Returns a reader of one byte stream, as `barlink recv` is. A reader that is dropped within a
    /// stream leaves the rest to the next reader. It sets [`Strategy::STREAM`], which remains set
    /// afterwards: [`Receiver::set_strategy`] sets another one.
    ///
    /// ```no_run
    /// use std::io::Read;
    ///
    /// use barlink::host;
    ///
    /// let broker = host::connect("default")?;
    /// let mut receiver = broker.receiver("up")?;
    /// let mut text = String::new();
    /// receiver.stream().read_to_string(&mut text)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stream(&mut self) -> StreamReader<'_> {
        StreamReader::new(self)
    }

    /// Returns the number of records that the sender dropped between those that this receiver got.
    /// Records that were dropped before the first one are not counted, because a new receiver does
    /// not know which number comes next.
    pub fn missed(&self) -> u64 {
        self.numbers.all_missed
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

    /// Returns the ring's own receiver, which the bench measures. The claim goes with it.
    #[doc(hidden)]
    pub fn into_ring(mut self) -> RingReceiver {
        self.ring.take()
    }

    /// Returns the ring for calls that can sleep. Such a sleep takes rings and disarms the wake-up,
    /// so the descriptor must be readable until the end finds nothing again.
    pub(crate) fn ring(&mut self) -> &mut RingReceiver {
        self.readiness.busy();
        &mut self.ring
    }

    /// Returns the ring as [`Receiver::ring`] does, and the numbers of its records.
    pub(crate) fn numbered(&mut self) -> (&mut RingReceiver, &mut Numbers) {
        self.readiness.busy();
        (&mut self.ring, &mut self.numbers)
    }

    /// Returns the position in a byte stream, to change it.
    pub(crate) fn position(&mut self) -> &mut Position {
        &mut self.position
    }

    /// Returns the position in a byte stream.
    pub(crate) fn stream_position(&self) -> Position {
        self.position
    }

    /// Reports a release that failed when a record was dropped.
    #[inline]
    fn check(&mut self) -> Result<(), Error> {
        match &self.failed {
            None => Ok(()),
            Some(_) => self.fail(),
        }
    }

    #[cold]
    fn fail(&mut self) -> Result<(), Error> {
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Notes that a release failed when a record was dropped.
    #[cold]
    fn defer(&mut self, error: ChannelError) {
        self.failed = Some(error.into());
    }

    #[inline]
    fn found(&mut self) -> Option<Record<'_>> {
        self.readiness.busy();
        self.header = *self.ring.record()?.header();
        self.numbers.note(self.header.sequence);
        Some(Record {
            receiver: self,
            position: 0,
            at_end: AtEnd::Release,
        })
    }

    #[cold]
    fn found_nothing(&mut self) {
        self.readiness.quiet(self.ring.events(), self.ring.peer());
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let may_release =
            |ring: &&mut RingReceiver| !(std::thread::panicking() || ring.events().is_gone());
        if let Some(ring) = self.ring.get().filter(may_release) {
            // A failed ring delays the sender until it looks by itself; there is no later call.
            let _ = ring.release_passed();
        }
    }
}

impl AsFd for Receiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.readiness.as_fd()
    }
}

impl AsRawFd for Receiver {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl<'a> IntoIterator for &'a mut Receiver {
    type Item = Result<OwnedRecord, Error>;
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

/// An iterator over copies of records: see [`Receiver::iter`].
#[derive(Debug)]
pub struct Iter<'a> {
    receiver: &'a mut Receiver,
    failed: bool,
}

impl Iterator for Iter<'_> {
    type Item = Result<OwnedRecord, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let record = self.receiver.recv().and_then(|record| {
            let copy = record.to_owned();
            record.release()?;
            Ok(copy)
        });
        self.failed = record.is_err();
        Some(record)
    }
}

/// A private copy of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedRecord {
    /// The type of its content.
    pub kind: Kind,
    /// Its number in the channel, from 0. A gap is records that were dropped.
    pub sequence: u64,
    /// The sender's monotonic clock when it committed the record, in nanoseconds.
    pub time: u64,
    /// Its content.
    pub bytes: Vec<u8>,
}

/// The end of a record's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtEnd {
    /// Release it, and all that were passed.
    Release,
    /// Release it later.
    Pass,
    /// The next call receives it again.
    Keep,
}

/// A record, in the shared memory itself. When it is dropped, its room is the sender's again,
/// unless the thread panics: then the record is received again. In a guest whose device was
/// unplugged, using or dropping a record is an access to memory that is gone (SIGBUS).
///
/// The sender can change the content at any time, so there is no `&[u8]` of it: a program that
/// parses it copies it first. All methods but [`Record::words`] copy. [`Read`] reads the content
/// once, from its start.
///
/// ```no_run
/// use barlink::host;
///
/// let broker = host::connect("default")?;
/// let mut receiver = broker.receiver("up")?;
/// let record = receiver.recv()?;
/// let mut start = [0; 16];
/// let copied = record.copy_to(&mut start);
/// println!("{} bytes begin with {:?}", record.len(), &start[..copied]);
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Debug)]
pub struct Record<'a> {
    receiver: &'a mut Receiver,
    /// The offset of the next byte for [`Read`].
    position: usize,
    at_end: AtEnd,
}

impl Record<'_> {
    /// Returns the type of the content.
    pub fn kind(&self) -> Kind {
        self.receiver.header.kind
    }

    /// Returns the number of the record in the channel, from 0.
    pub fn sequence(&self) -> u64 {
        self.receiver.header.sequence
    }

    /// Returns the sender's monotonic clock when it committed the record, in nanoseconds.
    pub fn time(&self) -> u64 {
        self.receiver.header.time
    }

    /// Returns the number of records that the sender dropped before this one and after the last
    /// that was received.
    pub fn missed(&self) -> u64 {
        self.receiver.numbers.gap
    }

    /// Returns the bytes of content.
    pub fn len(&self) -> usize {
        self.receiver.header.length as usize
    }

    /// Whether the content is empty.
    pub fn is_empty(&self) -> bool {
        self.receiver.header.length == 0
    }

    /// Copies the start of the content, as much as fits. Returns the bytes copied.
    #[inline]
    pub fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let record = self.receiver.ring.record();
        record.map_or(0, |record| record.copy_to(0, bytes))
    }

    /// Copies the content.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        self.copy_to(&mut bytes);
        bytes
    }

    /// Copies the record.
    pub fn to_owned(&self) -> OwnedRecord {
        OwnedRecord {
            kind: self.kind(),
            sequence: self.sequence(),
            time: self.time(),
            bytes: self.to_vec(),
        }
    }

    /// Returns the content in place, as words that the sender can still change. The last word is
    /// padded with zeros by an honest sender.
    pub fn words(&self) -> &[AtomicU64] {
        let record = self.receiver.ring.record();
        record.map_or(&[], |record| record.into_words())
    }

    /// Lets the kernel write the content, or the rest of what was read, straight to a file. Returns
    /// the bytes written, which can be fewer than there are.
    ///
    /// # Errors
    ///
    /// `write(2)` failed.
    pub fn write_to(&mut self, file: impl AsFd) -> io::Result<usize> {
        let Some(record) = self.receiver.ring.record() else {
            return Ok(0);
        };
        let written = record.write_to(file.as_fd().as_raw_fd(), self.position)?;
        self.position += written;
        Ok(written)
    }

    /// Releases the record, as dropping it does.
    ///
    /// # Errors
    ///
    /// Ringing the sender failed. Where a record is dropped, the next call of the receiver returns
    /// that error.
    pub fn release(mut self) -> Result<(), Error> {
        self.at_end = AtEnd::Pass;
        Ok(self.receiver.ring.release()?)
    }

    /// Passes the record: it is released with the next one that is released, or as soon as there is
    /// no further one. Releasing many at once costs less than releasing each.
    pub fn pass(mut self) {
        self.at_end = AtEnd::Pass;
    }

    /// Keeps the record in the channel: the next call receives it again, or the next receiver if
    /// this process ends.
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
    // The rest of a word first: what follows is copied in whole words.
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
            AtEnd::Pass => self.receiver.ring.pass(),
            // It was not handled, so it is received again.
            AtEnd::Release if std::thread::panicking() => (),
            AtEnd::Release => {
                if let Err(error) = self.receiver.ring.release() {
                    self.receiver.defer(error);
                }
            }
        }
    }
}
