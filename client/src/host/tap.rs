// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A reader that claims nothing, writes nothing and delays neither end of a channel.
//!
//! A producer never writes further than one capacity ahead of the consumer's cursor. So a copy of a
//! record is whole if the consumer has not released the record by the time that the copy is
//! complete. Records that the consumer releases earlier are missed, and counted.

use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use barlink_protocol::cursor::{Capacity, Corrupt, HEADER_BYTES, Header};
use barlink_protocol::wire::layout::channel;

use super::Attachment;
use crate::error::Error;
use crate::event_error::EventError;
use crate::memory::Region;
use crate::process::Process;
use crate::receiver::OwnedRecord;

/// First and longest time between two polls.
const FIRST_LOOK: Duration = Duration::from_micros(50);
const LONGEST_LOOK: Duration = Duration::from_millis(10);
/// Tries to read both cursors at one moment, or a record before it is released.
const TRIES: u32 = 16;

/// A look at a channel that another program receives. It copies the records that the receiver has
/// not released, and delays neither end.
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
#[derive(Debug)]
pub struct Tap {
    region: Region,
    base: u64,
    capacity: Capacity,
    generation: u64,
    /// The cursor of the next record.
    cursor: u64,
    /// The sequence number of the next record, if one was received.
    next: Option<u64>,
    missed: u64,
    /// The process that made the tap.
    process: Process,
}

/// The result of one look at the next record.
enum Found {
    Record(OwnedRecord, u64),
    Padding(u64),
}

impl Attachment {
    /// Returns a tap of a channel, which begins at the first record that was not released. It needs
    /// no claim, and works with [`Access::ReadOnly`](crate::Access::ReadOnly). A channel can have
    /// any number of taps.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// // The lines that the receiver of the log has not handled yet.
    /// let broker = host::connect("default")?;
    /// let mut lines = broker.tap("log")?;
    /// while let Some(line) = lines.try_recv()? {
    ///     println!("{}", String::from_utf8_lossy(&line.bytes));
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// There is no such channel, or it is corrupt.
    pub fn tap(&self, name: &str) -> Result<Tap, Error> {
        let index = self.find(name)?;
        let entry = &self.layout().channels()[index];
        let mut tap = Tap {
            region: self.region().ring().clone(),
            base: entry.offset,
            capacity: Capacity::of(entry),
            // No channel has it, so the first look begins at the consumer's cursor.
            generation: u64::MAX,
            cursor: 0,
            next: None,
            missed: 0,
            process: Process::current(),
        };
        let generation = tap.load(channel::GENERATION);
        if generation.is_multiple_of(2) {
            tap.restart(generation)?;
        }
        Ok(tap)
    }
}

impl Tap {
    /// Copies the next record, if there is one now. Returns `None` also while a reset of the
    /// channel is under way, and where the receiver releases each record before it is copied.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use barlink::host;
    ///
    /// let mut tap = host::connect("default")?.tap("camera")?;
    /// // A preview: one frame each second, the newest that is there.
    /// loop {
    ///     let mut newest = None;
    ///     while let Some(frame) = tap.try_recv()? {
    ///         newest = Some(frame);
    ///     }
    ///     println!("{:?}", newest.map(|frame| frame.sequence));
    ///     std::thread::sleep(Duration::from_secs(1));
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The channel is corrupt.
    pub fn try_recv(&mut self) -> Result<Option<OwnedRecord>, Error> {
        let checked = self.process.check();
        checked.map_err(|process| EventError::Inherited { process })?;
        // A consumer that releases all records at once leaves none to copy.
        for _ in 0..TRIES {
            let generation = self.load(channel::GENERATION);
            if generation % 2 == 1 {
                // A reset is under way, and its cursors need not fit together.
                return Ok(None);
            }
            if generation != self.generation {
                self.restart(generation)?;
            }
            let cursors = self.cursors();
            if cursors.is_err() && self.load(channel::GENERATION) != generation {
                continue;
            }
            let (read, written) = cursors?;
            if self.cursor < read {
                // The consumer was faster: the records up to here may be overwritten.
                self.cursor = read;
            }
            if self.cursor >= written {
                return Ok(None);
            }
            let found = self.look(written - self.cursor);
            // The producer may have written over the record, or a reset may have emptied the
            // channel: then look again.
            if !self.is_whole() {
                continue;
            }
            match found? {
                Found::Padding(end) => self.cursor = end,
                Found::Record(record, end) => {
                    let expected = self.next.unwrap_or(record.sequence);
                    let missed = record.sequence.saturating_sub(expected);
                    self.missed = self.missed.saturating_add(missed);
                    self.next = Some(record.sequence.saturating_add(1));
                    self.cursor = end;
                    return Ok(Some(record));
                }
            }
        }
        Ok(None)
    }

    /// Copies the next record. Looks for it again and again, after 50 µs and then after longer
    /// times, up to 10 ms. Waits for the next reset if a reset of the channel was cut short.
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
    /// The channel is corrupt.
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
    /// The channel is corrupt.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<Option<OwnedRecord>, Error> {
        let start = Instant::now();
        let mut sleep = FIRST_LOOK;
        loop {
            let record = self.try_recv()?;
            let left = timeout.saturating_sub(start.elapsed());
            if record.is_some() || left.is_zero() {
                return Ok(record);
            }
            std::thread::sleep(sleep.min(left));
            sleep = (sleep * 2).min(LONGEST_LOOK);
        }
    }

    /// Returns the number of records that were dropped, or released before this tap could copy
    /// them. It counts the gaps between the records that the tap returned.
    pub fn missed(&self) -> u64 {
        self.missed
    }

    /// Begins at the consumer's cursor, at the start and after a reset of the channel.
    fn restart(&mut self, generation: u64) -> Result<(), Corrupt> {
        match self.cursors() {
            Ok((read, _)) => self.cursor = read,
            // The next look begins again.
            Err(_) if self.load(channel::GENERATION) != generation => return Ok(()),
            Err(corrupt) => return Err(corrupt),
        }
        self.generation = generation;
        self.next = None;
        Ok(())
    }

    fn load(&self, offset: u64) -> u64 {
        let word = self.region.word(self.base + offset);
        word.load(barlink_protocol::Ordering::Acquire)
    }

    /// Reads the cursors of both ends at one moment, and checks them.
    fn cursors(&self) -> Result<(u64, u64), Corrupt> {
        let mut result = Err(Corrupt("its cursors never stand still"));
        for _ in 0..TRIES {
            let read = self.load(channel::READ);
            let written = self.load(channel::WRITTEN);
            result = self.capacity.in_flight(written, read);
            if self.load(channel::READ) == read && result.is_ok() {
                return Ok((read, written));
            }
        }
        result.map(|_| (self.cursor, self.cursor))
    }

    /// Whether the record at the cursor was still there when everything before this call was read.
    fn is_whole(&self) -> bool {
        // SYNC: released; the producer writes over a record after it has seen the consumer's cursor
        // move. So a copy with any byte of that is followed by a load that sees the cursor.
        fence(Ordering::Acquire);
        self.load(channel::READ) <= self.cursor && self.load(channel::GENERATION) == self.generation
    }

    /// Copies the record at the cursor. `available` is the number of bytes that are committed
    /// behind the cursor.
    fn look(&self, available: u64) -> Result<Found, Corrupt> {
        let start = self.base + channel::DATA + self.capacity.offset(self.cursor);
        let has_header = self.capacity.to_end(self.cursor) >= HEADER_BYTES;
        let words = [0, 8, 16].map(|offset| match offset == 0 || has_header {
            true => self.region.load(start + offset),
            false => 0,
        });
        let span = self.capacity.check(words[0], self.cursor, available)?;
        let end = self.cursor + span;
        let Some(header) = Header::from_words(words) else {
            return Ok(Found::Padding(end));
        };
        let mut bytes = vec![0; header.length as usize];
        self.region.copy_out(start + HEADER_BYTES, &mut bytes);
        let record = OwnedRecord {
            kind: header.kind,
            sequence: header.sequence,
            time: header.time,
            bytes,
        };
        Ok(Found::Record(record, end))
    }
}
