// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A reader that claims nothing, writes nothing and delays neither end of a channel, on both sides.

mod looks;
mod spin;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use barlink_protocol::cursor::{Header, Reset};
use barlink_protocol::wire::layout::End;
use barlink_protocol::{PresenceWords, Sight, Strategy};

use self::looks::Looks;
use self::spin::Spin;
use crate::error::Error;
use crate::event_error::EventError;
use crate::memory::{Mapping, RingRegion};
use crate::options::Side;
use crate::process::Process;
use crate::receiver::OwnedRecord;
use crate::removal::Removal;

/// Number of tries of one call to copy a record before it is overwritten.
const TRIES: u32 = 16;
/// Number of looks of a spinning tap for each look at the clock.
const LOOKS_PER_CLOCK: u32 = 16;
/// Longest time for which a spinning tap reads the region without a look for its removal.
const LONGEST_UNCHECKED: Duration = Duration::from_micros(100);

/// A reader of the records that other programs exchange. It copies them, and neither delays nor
/// disturbs the ends of the channel, which do not know of it. A channel can have any number of
/// taps, on both sides.
///
/// A tap misses records if the producer writes over them before the tap has copied them. Then it
/// goes on with the newest record, and [`Tap::missed`] counts exactly.
///
/// ```no_run
/// use barlink::Access;
/// use barlink::host::AttachOptions;
///
/// let options = AttachOptions::new().access(Access::ReadOnly);
/// let broker = options.connect("default")?;
/// let mut tap = broker.tap("up")?;
/// loop {
///     let record = tap.recv()?;
///     println!("record {}, {} missed", record.sequence, tap.missed());
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
///
/// The descriptor of a tap ([`AsFd`]) is readable when it is time to look again. A program that
/// waits with epoll, mio or tokio calls [`Tap::try_recv`] until that finds nothing, and waits
/// again.
///
/// ```no_run
/// use barlink::host;
/// use rustix::event::{PollFd, PollFlags, poll};
///
/// let mut tap = host::connect("default")?.tap("up")?;
/// loop {
///     poll(&mut [PollFd::new(&tap, PollFlags::IN)], None)?;
///     while let Some(record) = tap.try_recv()? {
///         println!("{:?}", record.bytes);
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Tap {
    ring: barlink_protocol::Tap<Mapping>,
    /// The mapping of the presence words.
    region: RingRegion,
    /// Presence of the producer, if it is visible.
    sender: Option<PresenceWords>,
    looks: Looks,
    spin: Spin,
    removal: Removal,
    /// The header of the record that was copied last.
    last: Option<Header>,
    /// The process that made the tap.
    process: Process,
}

impl Tap {
    /// Returns a tap of a channel, which begins behind the newest record. It needs no claim, and
    /// works with [`Access::ReadOnly`](crate::Access::ReadOnly).
    ///
    /// ```no_run
    /// use barlink::{Error, Side, Tap, guest, host};
    ///
    /// fn print(side: &impl Side, channel: &str) -> Result<(), Error> {
    ///     println!("{:?}", Tap::new(side, channel)?.recv()?);
    ///     Ok(())
    /// }
    ///
    /// print(&host::connect("default")?, "up")?;
    /// print(&guest::open("/dev/barlink0")?, "up")?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// There is no such channel.
    pub fn new<S: Side>(side: &S, name: &str) -> Result<Self, Error> {
        let index = side.find(name)?;
        let (layout, region) = (side.layout(), side.region());
        let entry = &layout.channels()[index];
        Ok(Tap {
            ring: barlink_protocol::Tap::attach(region.ring().clone(), entry),
            sender: PresenceWords::find(layout, index, End::Producer, region.size()),
            region: region.ring().clone(),
            looks: Looks::new()?,
            spin: Spin::of(Strategy::SLEEP),
            removal: side.removal(),
            last: None,
            process: Process::current(),
        })
    }

    /// Copies the next record, if there is one now. Returns `None` also while a reset of the
    /// channel is under way, and if the producer writes over each record before it is copied.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// // The lines that have come since the last look, once a second.
    /// let mut log = host::connect("default")?.tap("log")?;
    /// loop {
    ///     while let Some(line) = log.try_recv()? {
    ///         println!("{}", String::from_utf8_lossy(&line.bytes));
    ///     }
    ///     std::thread::sleep(std::time::Duration::from_secs(1));
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The channel was reset ([`ErrorKind::Reset`](crate::ErrorKind::Reset)). The tap goes on with
    /// the next call. Or the device is gone ([`ErrorKind::Gone`](crate::ErrorKind::Gone)).
    pub fn try_recv(&mut self) -> Result<Option<OwnedRecord>, Error> {
        let mut bytes = Vec::new();
        let found = self.copy(barlink_protocol::Tap::look, &mut bytes)?;
        Ok(found.map(|header| owned(header, bytes)))
    }

    /// Copies the next record. Looks for it again and again, after 50 µs and then after longer
    /// times, up to 10 ms, or to 100 ms if no record has come for ten seconds. Before that it spins
    /// if [`Tap::set_strategy`] says so.
    ///
    /// ```no_run
    /// use barlink::{Kind, host};
    ///
    /// let mut tap = host::connect("default")?.tap("up")?;
    /// let mut bytes = 0;
    /// loop {
    ///     let record = tap.recv()?;
    ///     match record.kind {
    ///         Kind::END => println!("a stream of {bytes} bytes"),
    ///         _ => bytes += record.bytes.len(),
    ///     }
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Tap::try_recv`].
    pub fn recv(&mut self) -> Result<OwnedRecord, Error> {
        loop {
            if let Some(record) = self.recv_timeout(Duration::MAX)? {
                return Ok(record);
            }
        }
    }

    /// Copies the next record, or returns `None` if there is none before `timeout` is over. Polls
    /// as [`Tap::recv`] does.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use barlink::host;
    ///
    /// let mut heartbeat = host::connect("default")?.tap("up")?;
    /// while heartbeat.recv_timeout(Duration::from_secs(5))?.is_some() {}
    /// println!("no record for 5 seconds: is the guest alive?");
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Tap::try_recv`].
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<Option<OwnedRecord>, Error> {
        let mut bytes = Vec::new();
        let found = self.copy_until(timeout, &mut bytes)?;
        Ok(found.map(|header| owned(header, bytes)))
    }

    /// Copies the next record into one that the program has, in place of its content, as
    /// [`Tap::recv_timeout`] does. Returns false if there is none before `timeout` is over, and
    /// then the content has no meaning. Large records cost less this way, because the memory of
    /// the last one is used again.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use barlink::{OwnedRecord, host};
    ///
    /// let mut camera = host::connect("default")?.tap("camera")?;
    /// let mut frame = OwnedRecord::default();
    /// while camera.recv_into(&mut frame, Duration::from_secs(1))? {
    ///     println!("frame {} of {} bytes", frame.sequence, frame.bytes.len());
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Tap::try_recv`].
    pub fn recv_into(
        &mut self,
        record: &mut OwnedRecord,
        timeout: Duration,
    ) -> Result<bool, Error> {
        let Some(header) = self.copy_until(timeout, &mut record.bytes)? else {
            return Ok(false);
        };
        *record = owned(header, std::mem::take(&mut record.bytes));
        Ok(true)
    }

    fn copy_until(
        &mut self,
        timeout: Duration,
        bytes: &mut Vec<u8>,
    ) -> Result<Option<Header>, Error> {
        let start = Instant::now();
        let mut may_spin = self.spin.is_possible();
        loop {
            let mut found = self.copy(barlink_protocol::Tap::look, bytes)?;
            if found.is_none() && std::mem::take(&mut may_spin) {
                found = self.copy_spinning(timeout.saturating_sub(start.elapsed()), bytes)?;
            }
            let left = timeout.saturating_sub(start.elapsed());
            if found.is_some() || left.is_zero() {
                return Ok(found);
            }
            self.removal.sleep(self.looks.left().min(left));
        }
    }

    /// Looks again and again without a sleep, for the time of the strategy or until `limit` is
    /// over.
    fn copy_spinning(
        &mut self,
        limit: Duration,
        bytes: &mut Vec<u8>,
    ) -> Result<Option<Header>, Error> {
        let (start, time) = (Instant::now(), self.spin.next.min(limit));
        let mut next_check = LONGEST_UNCHECKED;
        loop {
            let spun = start.elapsed();
            if spun >= time {
                break;
            }
            if spun >= next_check {
                if self.removal.has_come() {
                    return Err(EventError::Gone.into());
                }
                next_check = start.elapsed() + LONGEST_UNCHECKED;
            }
            for _ in 0..LOOKS_PER_CLOCK {
                std::hint::spin_loop();
                match self.copy_once(&barlink_protocol::Tap::look, bytes) {
                    Ok(None) => (),
                    Ok(found) => {
                        self.spin.has_succeeded();
                        return Ok(found);
                    }
                    Err(error) => {
                        // A region that is lost can look like a channel that was reset.
                        self.removal.check_region(&self.region)?;
                        return Err(error);
                    }
                }
            }
        }
        self.spin.has_failed();
        Ok(None)
    }

    /// Copies the newest record, whole, even if this tap has copied it before. The next record is
    /// then the one behind it, and the records before it that this tap has not copied are missed.
    /// Returns `None` if there is no record, or if the producer writes over each before it is
    /// copied.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use barlink::host;
    ///
    /// let mut camera = host::connect("default")?.tap("camera")?;
    /// // A preview: one frame each second, the newest that is there.
    /// loop {
    ///     if let Some(frame) = camera.latest()? {
    ///         println!("frame {}", frame.sequence);
    ///     }
    ///     std::thread::sleep(Duration::from_secs(1));
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Tap::try_recv`].
    pub fn latest(&mut self) -> Result<Option<OwnedRecord>, Error> {
        let mut bytes = Vec::new();
        let found = self.copy(barlink_protocol::Tap::look_at_newest, &mut bytes)?;
        Ok(found.map(|header| owned(header, bytes)))
    }

    /// Copies the newest record into one that the program has, in place of its content, as
    /// [`Tap::latest`] does. Returns false if that finds none, and then the content has no meaning.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use barlink::{OwnedRecord, host};
    ///
    /// let mut camera = host::connect("default")?.tap("camera")?;
    /// let mut frame = OwnedRecord::default();
    /// loop {
    ///     if camera.latest_into(&mut frame)? {
    ///         println!("frame {} of {} bytes", frame.sequence, frame.bytes.len());
    ///     }
    ///     std::thread::sleep(Duration::from_secs(1));
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Tap::try_recv`].
    pub fn latest_into(&mut self, record: &mut OwnedRecord) -> Result<bool, Error> {
        let found = self.copy(barlink_protocol::Tap::look_at_newest, &mut record.bytes)?;
        let Some(header) = found else {
            return Ok(false);
        };
        *record = owned(header, std::mem::take(&mut record.bytes));
        Ok(true)
    }

    /// Sets how the tap waits from now on: [`Tap::recv`], [`Tap::recv_timeout`] and
    /// [`Tap::recv_into`] first spin as the strategy says, and then sleep between looks. The
    /// default is [`Strategy::SLEEP`], which does not spin. Back-off sleeps of the strategy have no
    /// meaning, because the sender never rings a tap.
    ///
    /// ```no_run
    /// use barlink::{Strategy, host};
    ///
    /// let mut trigger = host::connect("default")?.tap("trigger")?;
    /// // This program has a CPU for the trigger alone, and must see it within microseconds.
    /// trigger.set_strategy(Strategy::SPIN);
    /// println!("{:?}", trigger.recv()?.bytes);
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn set_strategy(&mut self, strategy: Strategy) {
        self.spin = Spin::of(strategy);
    }

    /// Returns whether a process holds the sending end now. A tap of a VM does not see the senders
    /// of VMs, and they count as present. Records of a sender that has left are still copied. A
    /// program that stops once the sender has left looks for records after it has asked.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use barlink::host;
    ///
    /// let mut log = host::connect("default")?.tap("log")?;
    /// loop {
    ///     // Before the last look for lines, so that it finds all that the sender has sent.
    ///     let is_present = log.is_sender_present();
    ///     while let Some(line) = log.recv_timeout(Duration::from_secs(1))? {
    ///         println!("{}", String::from_utf8_lossy(&line.bytes));
    ///     }
    ///     if !is_present {
    ///         break;
    ///     }
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn is_sender_present(&self) -> bool {
        let region = &self.region;
        self.sender.is_none_or(|words| words.read(region).is_held())
    }

    /// Returns the number of records that were committed since this tap began, and that it passed
    /// over without a copy, up to the record that it copied last. It begins at 0 again after a
    /// reset.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let mut tap = host::connect("default")?.tap("up")?;
    /// tap.recv()?;
    /// println!("{} missed, {} dropped", tap.missed(), tap.dropped());
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn missed(&self) -> u64 {
        self.ring.missed()
    }

    /// Returns the number of records that the producer dropped because the channel was full, and of
    /// numbers that it skipped, since this tap began and up to the record that it copied last. It
    /// begins at 0 again after a reset.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let mut tap = host::connect("default")?.tap("camera")?;
    /// while tap.dropped() == 0 {
    ///     tap.recv()?;
    /// }
    /// println!("the receiver of the camera is slow");
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn dropped(&self) -> u64 {
        self.ring.dropped()
    }

    /// Copies the content of the record that `look` finds. Returns its header.
    fn copy(
        &mut self,
        look: impl Fn(&mut barlink_protocol::Tap<Mapping>) -> Sight,
        bytes: &mut Vec<u8>,
    ) -> Result<Option<Header>, Error> {
        let checked = self.process.check();
        checked.map_err(|process| EventError::Inherited { process })?;
        // The device can have gone since the last look.
        if self.looks.rested() && self.removal.has_come() {
            return Err(EventError::Gone.into());
        }
        let found = self.copy_once(&look, bytes);
        if !matches!(found, Ok(Some(_))) {
            // A region that is lost looks like one without records, or like a reset.
            self.removal.check_region(&self.region)?;
        }
        let found = found?;
        if found.is_none() {
            self.looks.found_nothing();
        }
        Ok(found)
    }

    fn copy_once(
        &mut self,
        look: &impl Fn(&mut barlink_protocol::Tap<Mapping>) -> Sight,
        bytes: &mut Vec<u8>,
    ) -> Result<Option<Header>, Error> {
        for _ in 0..TRIES {
            let header = match look(&mut self.ring) {
                Sight::Record(header) => header,
                Sight::Nothing => break,
                Sight::Reset => return Err(Error::Channel(Reset.into())),
            };
            bytes.resize(header.length as usize, 0);
            if self.ring.copy(bytes) {
                // The newest record may be the one that this tap has copied last.
                match self.last.replace(header) == Some(header) {
                    true => self.looks.found_nothing(),
                    false => self.looks.found_record(),
                }
                return Ok(Some(header));
            }
        }
        Ok(None)
    }
}

/// Returns the record with this header and content.
fn owned(header: Header, bytes: Vec<u8>) -> OwnedRecord {
    OwnedRecord {
        kind: header.kind,
        sequence: header.sequence,
        time: header.time,
        clock: header.clock,
        bytes,
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.looks.descriptor()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use barlink_protocol::wire::layout::{Channel, FIRST_FREE, Policy};

    use super::*;
    use crate::removal::{self, Removable};

    #[derive(Debug)]
    struct Pipe(std::io::PipeReader);

    impl Removable for Pipe {
        fn wait(&self, timeout: Option<Duration>) -> Result<bool, rustix::io::Errno> {
            removal::wait(&self.0, timeout)
        }
    }

    /// An access to the memory of a device that is gone would end the process. A pipe without a
    /// writer has the events of such a device.
    #[test]
    fn spinning_tap_notices_removal() {
        let size = 1 << 16;
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(size as u64).unwrap();
        let region = Mapping::map(&memory, size, crate::Access::ReadOnly).unwrap();
        let region = region.region();
        let entry = Channel {
            name: "up".parse().unwrap(),
            producer: 0,
            consumer: 1,
            vector: 0,
            policy: Policy::Wait,
            offset: FIRST_FREE,
            capacity: 4096,
        };
        let (device, writer) = std::io::pipe().unwrap();
        let second = Duration::from_secs(1);
        let mut tap = Tap {
            ring: barlink_protocol::Tap::attach(region.clone(), &entry),
            region,
            sender: None,
            looks: Looks::new().unwrap(),
            spin: Spin {
                least: 60 * second,
                most: 60 * second,
                next: 60 * second,
            },
            removal: Removal::of(Arc::new(Pipe(device))),
            last: None,
            process: Process::current(),
        };
        let removing = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            drop(writer);
        });
        let start = Instant::now();
        let error = tap.copy_spinning(60 * second, &mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Gone);
        assert!(start.elapsed() < 30 * second);
        removing.join().unwrap();
    }
}
