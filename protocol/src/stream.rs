// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Byte streams through a channel, from a file descriptor to a file descriptor.
//!
//! A stream is a record of [`Kind::BEGIN`], records of [`Kind::DATA`] with the bytes, and a record
//! of [`Kind::END`]. [`Position`] decides for each record that a receiver finds whether it belongs
//! to the stream. A record that does not stays in the channel. [`send`] and [`receive`] set the
//! strategy of their end to [`Strategy::STREAM`], which remains set afterwards.
//!
//! The descriptors can be non-blocking: a transfer then waits until they are ready.

extern crate std;

use core::ops::Deref;
use core::time::Duration;

use libc::c_int;

use crate::aligned::{ALIGNMENT, AlignedBuffer};
use crate::channel::{Receiver, Sender, Sent};
use crate::consumer::Record;
use crate::cursor::{HEADER_BYTES, Header, Kind};
use crate::error::ChannelError;
use crate::io;
use crate::link::{Events, Wakeup};
use crate::region;
use crate::strategy::Strategy;
use crate::sync::AtomicU64;

/// Time for which a sender that drops waits for space for the beginning or the end of a stream.
const MARK_TIMEOUT: Duration = Duration::from_secs(1);
/// Size of the private buffer of a receiver, in bytes.
const BUFFER_BYTES: usize = 256 << 10;

/// Progress of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes sent or received.
    pub bytes: u64,
    /// Records of [`Kind::DATA`] sent or received. With [`Accept::raw`], a receiver counts records
    /// of other kinds too.
    pub records: u64,
    /// Records that were dropped because the channel was full. A receiver counts the gaps in the
    /// numbers of the records, which include records of other kinds.
    pub dropped: u64,
    /// Whether the receiver took up the stream without its beginning.
    pub headless: bool,
}

/// An observer of a stream. `()` ignores all calls.
pub trait Watch {
    /// Handles the progress after a record.
    fn progress(&mut self, _progress: &Progress) {}

    /// Handles the number of each record that [`receive`] finds, before the record is released.
    fn record(&mut self, _sequence: u64) {}

    /// Returns the time after which a wait for the other end is reported by [`Watch::waits`].
    /// `None` for no reports; the wait then needs no timer.
    fn report_after(&self) -> Option<Duration> {
        None
    }

    /// Handles a wait that has lasted for [`Watch::report_after`] and goes on: a receiver waits for
    /// the first data of a stream, or a sender for space. `is_away` is true if no process holds the
    /// other end.
    fn waits(&mut self, _is_away: bool) {}

    /// Returns the time without a record, or without space for one, after which the stream ends
    /// with [`StreamError::TimedOut`]. `None` for no limit. The time that a descriptor takes does
    /// not count.
    fn timeout(&self) -> Option<Duration> {
        None
    }
}

impl Watch for () {}

/// Records that a receiver accepts beyond those of a whole stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Accept {
    partial: bool,
    raw: bool,
}

impl Accept {
    /// Sets whether to accept a stream whose beginning or records are missing. The default is
    /// `false`.
    pub fn partial(mut self, accepts: bool) -> Self {
        self.partial = accepts;
        self
    }

    /// Returns whether a stream whose beginning or records are missing is accepted.
    pub fn is_partial(&self) -> bool {
        self.partial
    }

    /// Sets whether to accept records of every kind, and to write their payloads. The stream needs
    /// no beginning. It ends with a record of [`Kind::END`], or when the sender has left. The
    /// default is `false`.
    pub fn raw(mut self, accepts: bool) -> Self {
        self.raw = accepts;
        self
    }

    /// Returns whether records of every kind are accepted.
    pub fn is_raw(&self) -> bool {
        self.raw
    }
}

/// Reason why a record belongs to no stream that a receiver can take up. The record stays in the
/// channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Misplaced {
    /// The stream has no beginning.
    #[error(
        "the beginning of the stream is missing: another receiver took it, or the sender sent none"
    )]
    NoBeginning,
    /// The record is of another kind.
    #[error("the next record, of {length} bytes, is of kind {kind}, which is not of a stream")]
    OtherKind {
        /// Kind of the record.
        kind: Kind,
        /// Bytes of payload.
        length: u32,
    },
    /// The sequence numbers go back.
    #[error("the next record has the number {found}, and records up to {last} were received")]
    WentBack {
        /// Number of the record.
        found: u64,
        /// Number of the last record before it.
        last: u64,
    },
}

/// Part of a stream that a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The beginning.
    Begin,
    /// Bytes.
    Data,
    /// The end.
    End,
    /// The beginning of a further stream, because the sender of this one left. It was not taken up.
    NextBegin,
}

/// Position of a receiver in a channel's streams. It outlives a receiver that stops within a
/// stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Whether a record of this stream was taken up.
    pub begun: bool,
    /// Bytes that were taken of the current record.
    pub done: usize,
    /// Records that were dropped within this stream or before it.
    pub dropped: u64,
    /// Whether the stream was taken up without its beginning.
    pub headless: bool,
    /// Whether the last record was taken up as one of any kind.
    raw: bool,
    /// Whether the next record can be the last one again, because that was not released.
    seen: bool,
    next: Option<u64>,
}

impl Position {
    /// Creates the position behind the record before `next`, between two streams. `next` is `None`
    /// before the first record.
    pub fn new(next: Option<u64>) -> Self {
        Position {
            seen: true,
            next,
            ..Position::default()
        }
    }

    /// Returns the sequence number behind the last record that was taken up.
    pub fn next(&self) -> Option<u64> {
        self.next
    }

    /// Takes up the record with this header, or finds again the one that was taken up last. Returns
    /// the part of the stream that the record is. An error leaves the position unchanged.
    pub fn take_up(&mut self, header: &Header, accept: Accept) -> Result<Part, Misplaced> {
        // Records of any kind begin no stream.
        let begun = self.begun && self.raw == accept.raw;
        let part = match header.kind {
            Kind::BEGIN if begun && !self.is_last(header) && !accept.raw => {
                return Ok(Part::NextBegin);
            }
            Kind::BEGIN => Part::Begin,
            Kind::END => Part::End,
            Kind::DATA => Part::Data,
            _ if accept.raw => Part::Data,
            kind => {
                return Err(Misplaced::OtherKind {
                    kind,
                    length: header.length,
                });
            }
        };
        let is_headless = !begun && part != Part::Begin && !accept.raw;
        if is_headless && !accept.partial {
            return Err(Misplaced::NoBeginning);
        }
        if !self.is_last(header) {
            let expected = self.next.unwrap_or(header.sequence);
            if header.sequence < expected && !accept.partial {
                return Err(Misplaced::WentBack {
                    found: header.sequence,
                    last: expected - 1,
                });
            }
            let gap = header.sequence.saturating_sub(expected);
            self.dropped = self.dropped.saturating_add(gap);
            self.next = Some(header.sequence.saturating_add(1));
            self.seen = true;
            self.done = 0;
        }
        self.headless = is_headless || (begun && self.headless);
        self.raw = accept.raw;
        self.begun = true;
        Ok(part)
    }

    /// Returns whether a record was taken up before.
    fn is_last(&self, header: &Header) -> bool {
        self.seen && self.next == header.sequence.checked_add(1)
    }

    /// Notes that the record that was taken up last is released.
    pub fn release(&mut self) {
        self.seen = false;
        self.done = 0;
    }

    /// Ends the stream. The next record belongs to another one.
    pub fn end(&mut self) {
        *self = Position {
            next: self.next,
            ..Position::default()
        };
    }
}

/// Reason why a stream ended early, or why it is not whole.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError<X> {
    /// The channel cannot be used.
    #[error(transparent)]
    Channel(#[from] ChannelError<X>),
    /// `read(2)` from the source failed.
    #[error("cannot read the source")]
    Read(#[source] io::Error),
    /// `write(2)` to the target failed.
    #[error("cannot write the target")]
    Write {
        /// The error of the system call.
        source: io::Error,
        /// Bytes at the target's end that belong to a record that was not released. The next
        /// receiver gets the whole record again.
        partial: u64,
    },
    /// The producer left before the end of the stream. The value is the number of bytes received.
    #[error("the sender left before the end of the stream, after {0} bytes")]
    Incomplete(u64),
    /// The next record is not of this stream. It stays in the channel.
    #[error(transparent)]
    Misplaced(#[from] Misplaced),
    /// The stream was received to its end, and records of it or before it are missing.
    #[error("{} dropped because the channel was full; the others were received", were(.0.dropped))]
    Missing(Progress),
    /// The sender drops, and the channel had no space for the end of the stream.
    #[error("the end of the stream was dropped because the channel was full")]
    EndDropped(Progress),
    /// No record came, or there was no space for one, within [`Watch::timeout`].
    #[error("nothing moved through the channel for {} s", .after.as_secs_f64())]
    TimedOut {
        /// The time.
        after: Duration,
        /// The progress until then.
        progress: Progress,
    },
}

/// A number of records as the subject of a sentence.
fn were(records: u64) -> impl core::fmt::Display {
    struct Were(u64);
    impl core::fmt::Display for Were {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            match self.0 {
                1 => f.write_str("1 record was"),
                count => write!(f, "{count} records were"),
            }
        }
    }
    Were(records)
}

/// The wait for one record, or for space for one.
#[derive(Default)]
struct Wait {
    /// Time of this side's clock at which the wait began, if it has a timeout.
    since: Option<Duration>,
}

impl Wait {
    /// Returns the time to sleep: until the wait is reported or its timeout is over, whichever is
    /// first.
    fn next(
        &mut self,
        report_after: Option<Duration>,
        timeout: Option<Duration>,
        now: impl FnOnce() -> Duration,
    ) -> Option<Duration> {
        let Some(timeout) = timeout else {
            return report_after;
        };
        let now = now();
        let waited = now.saturating_sub(*self.since.get_or_insert(now));
        let left = timeout.saturating_sub(waited);
        Some(report_after.map_or(left, |report| report.min(left)))
    }

    /// Returns an error if the timeout is over.
    fn check<X>(
        &self,
        timeout: Option<Duration>,
        now: impl FnOnce() -> Duration,
        progress: &Progress,
    ) -> Result<(), StreamError<X>> {
        match (timeout, self.since) {
            (Some(after), Some(since)) if now().saturating_sub(since) >= after => {
                Err(StreamError::TimedOut {
                    after,
                    progress: *progress,
                })
            }
            _ => Ok(()),
        }
    }
}

/// Sends a stream of all bytes that `source` has, in records of at most `scratch.len()` bytes. All
/// records but the first are filled in place. A sender that drops reads into `scratch` first, as
/// does a sender whose source cannot be read into the region.
///
/// A sender that drops waits for a second at most for space for the end of the stream. If there is
/// none, it counts the end as dropped, and the result is [`StreamError::EndDropped`].
pub fn send<M, E>(
    sender: &mut Sender<M, E>,
    source: c_int,
    scratch: &mut [u8],
    watch: &mut impl Watch,
) -> Result<Progress, StreamError<E::Error>>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events,
{
    sender.set_strategy(Strategy::STREAM);
    let mut total = Progress::default();
    // The begin is sent together with the first data. So a sender that has no data leaves nothing
    // in the channel, and a sender that drops sends no data without a begin.
    let mut begun = false;
    let mut wait = Wait::default();
    // Bytes of the first record, which is read before the begin is sent.
    let mut first = 0;
    let max_record = sender.max_record() as usize;
    // The kernel cannot copy between the region and every file (`docs/driver.md`).
    let mut in_place = true;
    loop {
        let length = if sender.drops() {
            let length = read_private(source, scratch).map_err(StreamError::Read)?;
            if length > 0 {
                begun = begun || sender.send(Kind::BEGIN, &[], None)? == Sent::Committed;
                if !begun || sender.send(Kind::DATA, &scratch[..length], None)? == Sent::Dropped {
                    total.dropped += 1;
                    continue;
                }
            }
            length
        } else {
            let now = || sender.events().now();
            let time = wait.next(watch.report_after(), watch.timeout(), now);
            // A sender that finds no room takes nothing from its source. The first record goes
            // behind the mark of the beginning.
            let length = match (begun, first) {
                (false, _) => (scratch.len() + HEADER_BYTES as usize).min(max_record),
                (true, 0) => scratch.len(),
                (true, length) => length,
            };
            let Some(mut reservation) = sender.reserve(length, time)? else {
                wait.check(watch.timeout(), || sender.events().now(), &total)?;
                watch.waits(sender.peer_is_away());
                continue;
            };
            wait = Wait::default();
            if !begun {
                first = read_private(source, scratch).map_err(StreamError::Read)?;
                if first == 0 {
                    break;
                }
                let _ = mark_watched(sender, Kind::BEGIN, watch, &total)?;
                begun = true;
                continue;
            }
            let is_read = core::mem::take(&mut first);
            let read = match is_read {
                0 if in_place => retry(source, libc::POLLIN, || reservation.read_from(source))
                    .map(|length| length as usize),
                0 => read_private(source, scratch),
                length => Ok(length),
            };
            let length = match read {
                Err(error) if in_place && (is_fault(&error) || is_invalid(&error)) => {
                    check(reservation.events())?;
                    in_place = false;
                    continue;
                }
                read => read.map_err(StreamError::Read)?,
            };
            if length > 0 {
                if is_read > 0 || !in_place {
                    reservation.write(0, &scratch[..length]);
                }
                reservation.commit(Kind::DATA, length as u32)?;
            }
            length
        };
        if length == 0 {
            break;
        }
        total.bytes += length as u64;
        total.records += 1;
        watch.progress(&total);
    }
    // Without a begin, the end would belong to the stream of an earlier sender.
    if !begun {
        begun = mark_watched(sender, Kind::BEGIN, watch, &total)? == Sent::Committed;
    }
    if begun && mark_watched(sender, Kind::END, watch, &total)? == Sent::Committed {
        Ok(total)
    } else {
        Err(StreamError::EndDropped(total))
    }
}

/// Commits a record without payload: the beginning or the end of a stream. A sender that drops
/// waits for a second at most, and then drops the record.
pub fn mark<M, E>(sender: &mut Sender<M, E>, kind: Kind) -> Result<Sent, ChannelError<E::Error>>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events,
{
    match mark_watched(sender, kind, &mut (), &Progress::default()) {
        Ok(sent) => Ok(sent),
        Err(StreamError::Channel(error)) => Err(error),
        Err(_) => Ok(Sent::TimedOut),
    }
}

fn mark_watched<M, E>(
    sender: &mut Sender<M, E>,
    kind: Kind,
    watch: &mut impl Watch,
    total: &Progress,
) -> Result<Sent, StreamError<E::Error>>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events,
{
    let mut wait = Wait::default();
    let timeout = match sender.drops() {
        true => Some(watch.timeout().unwrap_or(MARK_TIMEOUT).min(MARK_TIMEOUT)),
        false => watch.timeout(),
    };
    loop {
        let time = wait.next(watch.report_after(), timeout, || sender.events().now());
        if let Some(reservation) = sender.reserve(0, time)? {
            reservation.commit(kind, 0)?;
            return Ok(Sent::Committed);
        }
        let over = wait.check(timeout, || sender.events().now(), total);
        if sender.drops() && over.is_err() {
            sender.drop_record();
            return Ok(Sent::Dropped);
        }
        over?;
        watch.waits(sender.peer_is_away());
    }
}

/// Receives a stream, from the channel's next record to the end of the stream, and writes its bytes
/// from the region to `target`. The next record must be the beginning of a stream, unless
/// `position` is within one or `accept` permits another. A record that is not of the stream stays
/// in the channel.
pub fn receive<M, E>(
    receiver: &mut Receiver<M, E>,
    target: c_int,
    accept: Accept,
    position: &mut Position,
    watch: &mut impl Watch,
) -> Result<Progress, StreamError<E::Error>>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events,
{
    receiver.set_strategy(Strategy::STREAM);
    let mut total = Progress::default();
    let mut buffer = Buffer::default();
    let mut wait = Wait::default();
    loop {
        // If the sender has left, the channel still has the records that it committed, and no
        // further ones come. Its presence is looked at only while there is no record, because each
        // look goes over the bus in a guest.
        let away = position.begun && !receiver.poll()? && receiver.peer_is_away();
        let report_after = watch.report_after().filter(|_| total.records == 0);
        let time = match away {
            true => Some(Duration::ZERO),
            false => wait.next(report_after, watch.timeout(), || receiver.events().now()),
        };
        match receiver.wait(time)? {
            Wakeup::Ready => wait = Wait::default(),
            Wakeup::TimedOut if away => {
                position.end();
                return match accept.raw {
                    true => finish(total, accept),
                    false => Err(StreamError::Incomplete(total.bytes)),
                };
            }
            Wakeup::TimedOut => {
                wait.check(watch.timeout(), || receiver.events().now(), &total)?;
                if total.records == 0 && watch.report_after().is_some() {
                    watch.waits(receiver.peer_is_away());
                }
                continue;
            }
            Wakeup::PeerChanged => continue,
        }
        let Some(record) = receiver.record() else {
            continue;
        };
        let header = *record.header();
        let part = position.take_up(&header, accept)?;
        if part == Part::NextBegin {
            // Its records stay in the channel for the next receiver.
            position.end();
            return Err(StreamError::Incomplete(total.bytes));
        }
        (total.dropped, total.headless) = (position.dropped, position.headless);
        watch.record(header.sequence);
        if part == Part::Data || accept.raw {
            let first = position.done;
            buffer.write_all(receiver, &record, target, first)?;
            total.bytes += (record.length() - first) as u64;
            total.records += u64::from(part == Part::Data);
        }
        position.release();
        receiver.release()?;
        if part == Part::End {
            position.end();
            return finish(total, accept);
        }
        watch.progress(&total);
    }
}

/// Returns the result of a stream that was received to its end.
fn finish<X>(total: Progress, accept: Accept) -> Result<Progress, StreamError<X>> {
    match total.dropped > 0 && !accept.partial {
        true => Err(StreamError::Missing(total)),
        false => Ok(total),
    }
}

/// A private buffer between the region and files to which the kernel cannot write from the region.
/// It is empty until such a file is met.
#[derive(Default)]
struct Buffer(AlignedBuffer);

impl Buffer {
    /// Writes the payload of a record, from byte `done` on.
    fn write_all<M, E>(
        &mut self,
        receiver: &Receiver<M, E>,
        record: &Record<'_, M>,
        target: c_int,
        mut done: usize,
    ) -> Result<(), StreamError<E::Error>>
    where
        M: Deref<Target = [AtomicU64]> + Clone,
        E: Events,
    {
        let first = done;
        while done < record.length() {
            let written = retry(target, libc::POLLOUT, || match self.0.is_empty() {
                true => record.write_to(target, done),
                false => record.write_copy(target, done, self.0.bytes()),
            });
            done += match written {
                Err(error) if self.0.is_empty() && (is_fault(&error) || is_invalid(&error)) => {
                    check(receiver.events())?;
                    self.0 = AlignedBuffer::new(BUFFER_BYTES);
                    0
                }
                Ok(0) => return Err(failed(io::ErrorKind::WriteZero.into(), done - first)),
                written => written.map_err(|source| failed(source, done - first))?,
            };
        }
        Ok(())
    }
}

fn failed<X>(source: io::Error, done: usize) -> StreamError<X> {
    StreamError::Write {
        source,
        partial: done as u64,
    }
}

/// Reads into private memory. A file with O_DIRECT is read in whole blocks, if it refuses other
/// lengths.
fn read_private(source: c_int, buffer: &mut [u8]) -> io::Result<usize> {
    let blocks = buffer.len() / ALIGNMENT * ALIGNMENT;
    match retry(source, libc::POLLIN, || region::read(source, buffer)) {
        Err(error) if is_invalid(&error) && blocks > 0 => retry(source, libc::POLLIN, || {
            region::read(source, &mut buffer[..blocks])
        }),
        read => read,
    }
}

/// Returns the error of an end whose region is gone.
fn check<E: Events>(events: &E) -> Result<(), ChannelError<E::Error>> {
    events.check_device().map_err(ChannelError::Events)
}

/// Returns whether the kernel could not access the region. It cannot pin the memory of a device,
/// which some files need.
fn is_fault(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EFAULT)
}

/// Returns whether a file refused the address or the length of a buffer, as one with O_DIRECT can.
fn is_invalid(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

/// Repeats a call that a signal interrupted, or whose descriptor is non-blocking and was not ready.
fn retry<T>(fd: c_int, events: i16, mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => region::poll(fd, events)?,
            result => return result,
        }
    }
}
