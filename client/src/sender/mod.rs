// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The end of a channel that sends.

mod reservation;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use barlink_protocol::cursor::{Kind, Stamp};
use barlink_protocol::{PresenceWords, Strategy};

use crate::doorbell::Doorbells;
use crate::error::{ChannelError, Error};
use crate::memory::{Mapping, RingRegion};
use crate::owned::Owned;
use crate::peer::is_present;
use crate::readiness::Readiness;

pub use reservation::Reservation;

/// The sender that the ring itself has.
pub type RingSender = barlink_protocol::Sender<Mapping, Doorbells>;

/// The outcome of a record that was sent.
///
/// ```no_run
/// use barlink::{Kind, Sent, host};
///
/// let mut sensor = host::connect("default")?.sender("down")?;
/// let mut lost = 0;
/// for reading in [21.5_f32, 21.7, 21.6] {
///     if sensor.send(Kind::USER, &reading.to_le_bytes())? == Sent::Dropped {
///         lost += 1;
///     }
/// }
/// println!("{lost} of 3 readings found the channel full");
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sent {
    /// The record was committed: the receiver sees it.
    Committed,
    /// The record was staged: [`Sender::publish`] commits it.
    Staged,
    /// The channel was full, and this sender drops such records. The record was counted.
    Dropped,
}

/// The end of a channel that sends records. The claim of the end lasts as long as this value, in
/// the process that made it: a copy in a forked process does nothing
/// ([`ErrorKind::Inherited`](crate::ErrorKind::Inherited)). Dropping the sender publishes its staged
/// records and ignores errors; call [`Sender::publish`] first to see them.
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
///
/// ```no_run
/// use barlink::{ErrorKind, Kind, host};
/// use rustix::event::{PollFd, PollFlags, poll};
///
/// let mut sender = host::connect("default")?.sender("down")?;
/// while let Err(error) = sender.try_send(Kind::USER, b"a command") {
///     if error.kind() != ErrorKind::Full {
///         return Err(error.into());
///     }
///     poll(&mut [PollFd::new(&sender, PollFlags::IN)], None)?;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Sender {
    ring: Owned<RingSender>,
    readiness: Readiness,
    region: RingRegion,
    peer: Option<PresenceWords>,
}

impl Sender {
    pub(crate) fn new(
        ring: RingSender,
        region: RingRegion,
        peer: Option<PresenceWords>,
    ) -> Result<Self, Error> {
        Ok(Sender {
            readiness: Readiness::new(ring.events(), ring.follows_reset())?,
            ring: Owned::new(ring),
            region,
            peer,
        })
    }

    /// Copies a record into the channel and commits it, with all records that were staged before.
    /// Waits for room as long as it takes. A sender that drops does not wait: it returns
    /// [`Sent::Dropped`].
    ///
    /// ```no_run
    /// use barlink::{Kind, host};
    ///
    /// const SET_SPEED: Kind = Kind::USER;
    ///
    /// let mut commands = host::connect("default")?.sender("down")?;
    /// commands.send(SET_SPEED, &3.5_f32.to_le_bytes())?;
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The record is larger than [`Sender::max_record`], the channel is corrupt, the channel was
    /// reset ([`ErrorKind::Reset`](crate::ErrorKind::Reset)), a forked process uses the end
    /// ([`ErrorKind::Inherited`](crate::ErrorKind::Inherited)), ringing or waiting failed, or the
    /// device is gone.
    #[inline]
    pub fn send(&mut self, kind: Kind, bytes: &[u8]) -> Result<Sent, Error> {
        let sent = self.ring.send(kind, bytes, None);
        self.outcome(sent)
    }

    /// Copies a record into the channel and commits it, if there is room now. Otherwise a sender
    /// that drops returns [`Sent::Dropped`], and any other an error.
    ///
    /// ```no_run
    /// use barlink::{ErrorKind, Kind, host};
    ///
    /// let mut camera = host::connect("default")?.sender("camera")?;
    /// let frame = vec![0; 320 * 240];
    /// match camera.try_send(Kind::USER, &frame) {
    ///     Err(error) if error.kind() == ErrorKind::Full => println!("frame skipped"),
    ///     sent => println!("frame {:?}", sent?),
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Full`] if there is no room, and those of [`Sender::send`].
    #[inline]
    pub fn try_send(&mut self, kind: Kind, bytes: &[u8]) -> Result<Sent, Error> {
        self.send_timeout(kind, bytes, Duration::ZERO)
    }

    /// Copies a record into the channel and commits it. Waits for room until `timeout` is over. A
    /// sender that drops does not wait.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use barlink::{ErrorKind, Kind, host};
    ///
    /// let mut log = host::connect("default")?.sender("log")?;
    /// let sent = log.send_timeout(Kind::USER, b"started", Duration::from_millis(100));
    /// if sent.is_err_and(|error| error.kind() == ErrorKind::Full) {
    ///     eprintln!("the reader of the log does not keep up");
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
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
    ///     sender.stage(Kind::USER, &number.to_le_bytes())?;
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

    /// Copies records of one kind into the channel and commits them together, which costs less than
    /// sending each: the clock is read once, for all their time stamps, and the receiver sees them
    /// at once. Waits for room as long as it takes, and then commits those before first. Returns
    /// how many were dropped, which is 0 unless the sender drops.
    ///
    /// ```no_run
    /// use barlink::{Kind, host};
    ///
    /// let mut sensor = host::connect("default")?.sender("down")?;
    /// let readings = [21.5_f64, 21.7, 21.6].map(f64::to_le_bytes);
    /// sensor.send_all(Kind::USER, readings)?;
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Sender::send`]. The records before the one that failed are committed, unless the
    /// channel is corrupt or was reset, or the device is gone.
    pub fn send_all<B: AsRef<[u8]>>(
        &mut self,
        kind: Kind,
        records: impl IntoIterator<Item = B>,
    ) -> Result<u64, Error> {
        let time = self.ring.time();
        let mut dropped = 0;
        for record in records {
            let sent = self.ring.stage(kind, record.as_ref(), None, time);
            match self.outcome(sent) {
                Ok(sent) => dropped += u64::from(sent == Sent::Dropped),
                Err(error) => {
                    // The error of the record says more than one that follows from it.
                    let _ = self.publish();
                    return Err(error);
                }
            }
        }
        self.publish()?;
        Ok(dropped)
    }

    /// Copies a record into the channel and commits it as [`Sender::send`] does, with a time stamp
    /// of the program's own. So a program that forwards records keeps their times.
    ///
    /// ```no_run
    /// use std::time::{SystemTime, UNIX_EPOCH};
    ///
    /// use barlink::{Clock, Kind, Stamp, host};
    ///
    /// let mut log = host::connect("default")?.sender("log")?;
    /// let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    /// let stamp = Stamp::new(now.as_nanos() as u64, Clock::REALTIME);
    /// log.send_at(Kind::USER, b"started", stamp)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Sender::send`].
    pub fn send_at(&mut self, kind: Kind, bytes: &[u8], stamp: Stamp) -> Result<Sent, Error> {
        let sent = self.ring.send_at(kind, bytes, None, stamp);
        self.outcome(sent)
    }

    /// Copies a record into the channel without committing it, as [`Sender::stage`] does, with a
    /// time stamp of the program's own.
    ///
    /// ```no_run
    /// use barlink::{Clock, Kind, Stamp, host};
    ///
    /// let broker = host::connect("default")?;
    /// let (mut source, mut copy) = (broker.receiver("up")?, broker.sender("copy")?);
    /// // Times by the guest's clock mean nothing to a reader that expects the host's.
    /// loop {
    ///     let record = source.recv()?;
    ///     copy.skip(record.missed())?;
    ///     let stamp = Stamp::new(record.time(), Clock::REMOTE);
    ///     copy.stage_at(record.kind(), &record.to_vec(), stamp)?;
    ///     record.release()?;
    ///     copy.publish()?;
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Sender::send`].
    pub fn stage_at(&mut self, kind: Kind, bytes: &[u8], stamp: Stamp) -> Result<Sent, Error> {
        let sent = self.ring.stage(kind, bytes, None, stamp);
        self.outcome(sent)
    }

    /// Skips sequence numbers, so that no record has them. A program that forwards records calls
    /// this to report records that were lost before they reached it. Skipped numbers count as
    /// dropped records. Records that were staged are committed first.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let broker = host::connect("default")?;
    /// let (mut tap, mut copy) = (broker.tap("camera")?, broker.sender("copy")?);
    /// let mut lost = 0;
    /// loop {
    ///     let frame = tap.recv()?;
    ///     let all = tap.missed() + tap.dropped();
    ///     copy.skip(all - lost)?;
    ///     lost = all;
    ///     copy.send(frame.kind, &frame.bytes)?;
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Ringing failed ([`ErrorKind::Other`]): the numbers are skipped. The channel was reset
    /// ([`ErrorKind::Reset`]), this is a forked process ([`ErrorKind::Inherited`]) or the device is
    /// gone ([`ErrorKind::Gone`]): they may not be skipped.
    ///
    /// [`ErrorKind::Other`]: crate::ErrorKind::Other
    /// [`ErrorKind::Reset`]: crate::ErrorKind::Reset
    /// [`ErrorKind::Inherited`]: crate::ErrorKind::Inherited
    /// [`ErrorKind::Gone`]: crate::ErrorKind::Gone
    pub fn skip(&mut self, count: u64) -> Result<(), Error> {
        Ok(self.ring.skip(count)?)
    }

    /// Sets the sequence number of the channel's first record. The numbers below it do not count as
    /// dropped.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let broker = host::connect("default")?;
    /// let (mut source, mut copy) = (broker.receiver("up")?, broker.sender("copy")?);
    /// let first = source.recv()?.to_owned();
    /// // The copies have the numbers of their originals.
    /// copy.set_first_sequence(first.sequence)?;
    /// copy.send(first.kind, &first.bytes)?;
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A record was sent, staged or dropped, or a number skipped, since the channel's last reset
    /// ([`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput)), the channel was reset
    /// ([`ErrorKind::Reset`](crate::ErrorKind::Reset)), or a forked process uses the end
    /// ([`ErrorKind::Inherited`](crate::ErrorKind::Inherited)).
    pub fn set_first_sequence(&mut self, number: u64) -> Result<(), Error> {
        Ok(self.ring.set_first_sequence(number)?)
    }

    /// Commits all staged records, and rings the receiver if it asked for that.
    ///
    /// ```no_run
    /// use barlink::{Kind, host};
    ///
    /// let mut log = host::connect("default")?.sender("log")?;
    /// for line in std::io::stdin().lines() {
    ///     log.stage(Kind::USER, line?.as_bytes())?;
    ///     if log.sequence().is_multiple_of(64) {
    ///         log.publish()?;
    ///     }
    /// }
    /// log.publish()?;
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
    pub fn publish(&mut self) -> Result<(), Error> {
        Ok(self.ring.publish()?)
    }

    /// Reserves room for a record of at most `length` bytes, in the shared memory itself. Waits for
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

    /// Reserves room for a record of at most `length` bytes, if there is room now.
    ///
    /// ```no_run
    /// use std::io::Write;
    ///
    /// use barlink::{ErrorKind, Kind, host};
    ///
    /// let mut camera = host::connect("default")?.sender("camera")?;
    /// match camera.try_reserve(320 * 240) {
    ///     Ok(mut frame) => {
    ///         frame.write_all(&[0; 320 * 240])?;
    ///         frame.commit(Kind::USER)?;
    ///     }
    ///     Err(error) if error.kind() == ErrorKind::Full => println!("frame skipped"),
    ///     Err(error) => return Err(error.into()),
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Full`] if there is no room, also if the sender drops, and those of
    /// [`Sender::send`].
    pub fn try_reserve(&mut self, length: usize) -> Result<Reservation<'_>, Error> {
        self.reserve_until(length, Some(Duration::ZERO))
    }

    /// Reserves room for a record of at most `length` bytes. Waits for room until `timeout` is
    /// over, also if the sender drops.
    ///
    /// ```no_run
    /// use std::fs::File;
    /// use std::time::Duration;
    ///
    /// use barlink::{Kind, host};
    ///
    /// let mut camera = host::connect("default")?.sender("camera")?;
    /// let video = File::open("/dev/video0")?;
    /// // Waits for at most one frame time.
    /// let mut frame = camera.reserve_timeout(640 * 480 * 2, Duration::from_millis(33))?;
    /// frame.read_from(&video)?;
    /// frame.commit(Kind::USER)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
        if timeout.is_some() && self.ring.reserve(length, timeout)?.is_none() {
            self.found_no_room();
            return Err(Error::Full);
        }
        self.readiness.busy();
        // Room that was found is still there, so this does not wait for it.
        match self.ring.reserve(length, None)? {
            Some(reservation) => Ok(Reservation::new(reservation)),
            None => Err(Error::Full),
        }
    }

    /// Returns the most bytes that one record can carry: capacity / 2 − 24, in a channel that
    /// overwrites capacity / 4 − 24, and at most 2³² − 8 (`docs/protocol.md`, rule 4.1.2).
    ///
    /// ```no_run
    /// use barlink::{Kind, host};
    ///
    /// let mut sender = host::connect("default")?.sender("down")?;
    /// let photo = std::fs::read("photo.jpg")?;
    /// for part in photo.chunks(sender.max_record()) {
    ///     sender.send(Kind::USER, part)?;
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn max_record(&self) -> usize {
        self.ring.max_record() as usize
    }

    /// Returns the sequence number of the next record. It is the channel's first number, 0 unless
    /// [`Sender::set_first_sequence`] has set it, and the number of records that were committed,
    /// staged or dropped, and of numbers that were skipped, since the channel's last reset, by this
    /// sender and those before it.
    ///
    /// ```no_run
    /// use barlink::{Kind, host};
    ///
    /// let mut commands = host::connect("default")?.sender("down")?;
    /// let number = commands.sequence();
    /// commands.send(Kind::USER, b"stop")?;
    /// println!("command {number} waits for its reply");
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn sequence(&self) -> u64 {
        self.ring.sequence()
    }

    /// Returns the number of records that were dropped, and of numbers that were skipped, since the
    /// channel's last reset, by this sender and those before it.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let camera = host::connect("default")?.sender("camera")?;
    /// let (dropped, all) = (camera.dropped(), camera.sequence());
    /// println!("{dropped} of {all} frames were dropped");
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn dropped(&self) -> u64 {
        self.ring.dropped()
    }

    /// Returns whether this sender drops records that find the channel full. The channel's entry in
    /// the layout decides, unless
    /// [`ChannelOptions::drop_when_full`](crate::ChannelOptions::drop_when_full) does.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let log = host::connect("default")?.sender("log")?;
    /// if !log.drops() {
    ///     eprintln!("a slow reader of the log will stop this program");
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn drops(&self) -> bool {
        self.ring.drops()
    }

    /// Returns whether a process holds the other end now. Between two VMs the other end is not
    /// visible, and counts as present. A channel that overwrites has no other end, which counts as
    /// present, too.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use barlink::{Kind, host};
    ///
    /// let mut camera = host::connect("default")?.sender("camera")?;
    /// while !camera.is_peer_present() {
    ///     std::thread::sleep(Duration::from_millis(10));
    /// }
    /// camera.send(Kind::USER, b"the first frame")?;
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn is_peer_present(&self) -> bool {
        is_present(&self.region, self.peer)
    }

    /// Sets how this end waits from now on.
    ///
    /// ```no_run
    /// use std::io::Write;
    ///
    /// use barlink::{Kind, Strategy, host};
    ///
    /// let mut sender = host::connect("default")?.sender("down")?;
    /// let mut stream = sender.stream();
    /// stream.write_all(b"the firmware")?;
    /// stream.finish()?;
    /// // Back from a stream to commands, which may not be late.
    /// sender.set_strategy(Strategy::PROMPT);
    /// sender.send(Kind::USER, b"restart")?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
