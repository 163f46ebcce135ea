// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The end of a channel that receives.

mod record;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use barlink_protocol::cursor::{Clock, Corrupt, Header, Kind};
use barlink_protocol::stream::{Position, gap};
use barlink_protocol::{PresenceWords, Strategy, Wakeup};

use crate::doorbell::Doorbells;
use crate::error::{ChannelError, Error};
use crate::memory::{Mapping, RingRegion};
use crate::owned::Owned;
use crate::peer::is_present;
use crate::readiness::Readiness;

pub(crate) use record::copy_from;
pub use record::{OwnedRecord, Record};

/// The receiver that the ring itself has.
pub type RingReceiver = barlink_protocol::Receiver<Mapping, Doorbells>;

/// The end of a channel that receives records. The claim of the end lasts as long as this value, in
/// the process that made it: a copy in a forked process does nothing
/// ([`ErrorKind::Inherited`](crate::ErrorKind::Inherited)). A receiver that is dropped releases the
/// records that it advanced over ([`Record::advance`]). If the thread panics, it does not, and the
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
    region: RingRegion,
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
        let gap = gap(self.next.unwrap_or(sequence), sequence).unwrap_or(0);
        self.gap = gap;
        self.all_missed = self.all_missed.saturating_add(gap);
        self.next = Some(sequence.wrapping_add(1));
        gap
    }
}

impl Receiver {
    pub(crate) fn new(
        ring: RingReceiver,
        region: RingRegion,
        peer: Option<PresenceWords>,
    ) -> Result<Self, Error> {
        Ok(Receiver {
            readiness: Readiness::new(ring.events(), ring.follows_reset())?,
            ring: Owned::new(ring),
            region,
            peer,
            header: Header {
                length: 0,
                kind: Kind::DATA,
                clock: Clock::MONOTONIC,
                sequence: 0,
                time: 0,
            },
            numbers: Numbers::default(),
            position: Position::default(),
            failed: None,
        })
    }

    /// Receives the next record. Waits for it as long as it takes, even while senders leave and
    /// come.
    ///
    /// ```no_run
    /// use barlink::{Kind, host};
    ///
    /// const SET_SPEED: Kind = Kind::USER;
    ///
    /// let mut commands = host::connect("default")?.receiver("up")?;
    /// loop {
    ///     let command = commands.recv()?;
    ///     match command.kind() {
    ///         SET_SPEED => println!("new speed: {:?}", command.to_vec()),
    ///         Kind::END => break,
    ///         other => println!("unknown command {}", other.number()),
    ///     }
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The channel is corrupt, the channel was reset
    /// ([`ErrorKind::Reset`](crate::ErrorKind::Reset)), a forked process uses the end
    /// ([`ErrorKind::Inherited`](crate::ErrorKind::Inherited)), ringing or waiting failed, or the
    /// device is gone.
    #[inline]
    pub fn recv(&mut self) -> Result<Record<'_>, Error> {
        self.check()?;
        while self.ring.wait(None)? != Wakeup::Ready {}
        let lost = Corrupt("a record that was found is not there");
        self.found().ok_or_else(|| lost.into())
    }

    /// Receives the next record, if there is one now.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use barlink::host;
    ///
    /// let mut keys = host::connect("default")?.receiver("up")?;
    /// loop {
    ///     // All input since the last frame, and then the next frame.
    ///     while let Some(key) = keys.try_recv()? {
    ///         println!("{:?}", key.to_vec());
    ///     }
    ///     std::thread::sleep(Duration::from_millis(16));
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
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
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use barlink::host;
    ///
    /// let mut sensor = host::connect("default")?.receiver("up")?;
    /// match sensor.recv_timeout(Duration::from_secs(1))? {
    ///     Some(reading) => println!("{:?}", reading.to_vec()),
    ///     None => println!("the sensor is silent"),
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
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

    /// Returns an iterator over copies of the records. It waits for each one, releases it, and ends
    /// after an error.
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

    /// Releases the records that the receiver advanced over ([`Record::advance`]), so that the
    /// sender can use their room. A record that was kept ([`Record::keep`]) remains in the channel.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let mut samples = host::connect("default")?.receiver("up")?;
    /// let mut sum = 0;
    /// while let Some(sample) = samples.try_recv()? {
    ///     sum += sample.len();
    ///     sample.advance();
    ///     if sum > 1 << 20 {
    ///         break;
    ///     }
    /// }
    /// // Long work follows, so the sender gets the room first.
    /// samples.release()?;
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Ringing failed ([`ErrorKind::Other`]): the records are released. The channel was reset
    /// ([`ErrorKind::Reset`]), this is a forked process ([`ErrorKind::Inherited`]) or the device is
    /// gone ([`ErrorKind::Gone`]): they may not be released.
    ///
    /// [`ErrorKind::Other`]: crate::ErrorKind::Other
    /// [`ErrorKind::Reset`]: crate::ErrorKind::Reset
    /// [`ErrorKind::Inherited`]: crate::ErrorKind::Inherited
    /// [`ErrorKind::Gone`]: crate::ErrorKind::Gone
    pub fn release(&mut self) -> Result<(), Error> {
        Ok(self.ring.release_advanced()?)
    }

    /// Returns how many records the sender dropped, and numbers it skipped, between those that this
    /// receiver got. Records that were dropped before the first one are not counted, because a new
    /// receiver does not know which number comes next.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let mut camera = host::connect("default")?.receiver("camera")?;
    /// for frame in camera.iter().take(100) {
    ///     println!("frame of {} bytes", frame?.bytes.len());
    /// }
    /// println!("{} frames were dropped in between", camera.missed());
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn missed(&self) -> u64 {
        self.numbers.all_missed
    }

    /// Returns whether a process holds the other end now. Between two VMs the other end is not
    /// visible, and counts as present. Records of a sender that has left are still received. A
    /// program that stops once the sender has left looks for records after it has asked.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use barlink::host;
    ///
    /// let mut log = host::connect("default")?.receiver("log")?;
    /// loop {
    ///     // Before the last look for lines, so that it finds all that the sender has sent.
    ///     let is_present = log.is_peer_present();
    ///     while let Some(line) = log.recv_timeout(Duration::from_secs(1))? {
    ///         println!("{}", String::from_utf8_lossy(&line.to_vec()));
    ///     }
    ///     if !is_present {
    ///         break;
    ///     }
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn is_peer_present(&self) -> bool {
        is_present(&self.region, self.peer)
    }

    /// Sets how this end waits from now on.
    ///
    /// ```no_run
    /// use barlink::{Strategy, host};
    ///
    /// let mut alarms = host::connect("default")?.receiver("up")?;
    /// // An alarm is rare: do not spend processor time on waiting for it.
    /// alarms.set_strategy(Strategy::SLEEP);
    /// println!("alarm: {:?}", alarms.recv()?.to_vec());
    /// # Ok::<(), barlink::Error>(())
    /// ```
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

    /// Returns the ring as [`Receiver::ring`] does, the numbers of its records, and the position in
    /// a byte stream. The position is a new one if the program has received records in another way
    /// meanwhile.
    pub(crate) fn streaming(&mut self) -> (&mut RingReceiver, &mut Numbers, &mut Position) {
        self.readiness.busy();
        if self.position.next() != self.numbers.next {
            self.position = Position::new(self.numbers.next);
        }
        (&mut self.ring, &mut self.numbers, &mut self.position)
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
        Some(Record::new(self))
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
            let _ = ring.release_advanced();
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

/// An iterator over copies of records. [`Receiver::iter`] returns it, as does a `for` loop over a
/// borrowed receiver.
///
/// ```no_run
/// use barlink::{Kind, host};
///
/// let mut receiver = host::connect("default")?.receiver("up")?;
/// for record in &mut receiver {
///     let record = record?;
///     if record.kind == Kind::END {
///         break;
///     }
///     println!("{} bytes", record.bytes.len());
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "an iterator receives nothing before it is asked for a record"]
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
