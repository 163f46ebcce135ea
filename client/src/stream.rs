// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Byte streams through a channel, as `barlink send` and `barlink recv` use them.
//!
//! A stream is records of [`Kind::DATA`] between one of [`Kind::BEGIN`] and one of [`Kind::END`].
//! [`StreamWriter`] and [`StreamReader`] are for programs with bytes in memory. For files there are
//! [`send`] and [`receive`]: the kernel copies between the file and the shared memory.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use barlink_protocol::cursor::Kind;
/// The counts of a stream. A [`Watch`] sees them. [`send`] and [`receive`] return the last ones.
///
/// ```no_run
/// use std::fs::File;
/// use std::time::Instant;
///
/// use barlink::host;
/// use barlink::stream::{self, Progress};
///
/// let mut sender = host::connect("default")?.sender("down")?;
/// let start = Instant::now();
/// let sent: Progress = stream::send(&mut sender, File::open("film.mp4")?, 1 << 20, &mut ())?;
/// let speed = sent.bytes as f64 / start.elapsed().as_secs_f64();
/// println!("{} records at {:.0} MB/s", sent.records, speed / 1e6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub use barlink_protocol::stream::Progress;
/// An observer of [`send`] or [`receive`]: a progress bar, or a warning that the other end is away.
///
/// ```no_run
/// use std::fs::File;
///
/// use barlink::host;
/// use barlink::stream::{self, Progress, Watch};
///
/// struct Terminal;
///
/// impl Watch for Terminal {
///     fn progress(&mut self, progress: &Progress) {
///         eprint!("\r{} bytes", progress.bytes);
///     }
/// }
///
/// let mut receiver = host::connect("default")?.receiver("up")?;
/// stream::receive(&mut receiver, File::create("film.mp4")?, &mut Terminal)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub use barlink_protocol::stream::Watch;
use barlink_protocol::{Sent, Strategy, Wakeup, stream};

use crate::error::Error;
use crate::event_error::EventError;
use crate::receiver::{Numbers, Receiver, copy_from};
use crate::sender::Sender;

/// Most bytes that a writer puts into one record: larger ones are no faster.
const RECORD_SIZE: usize = 1 << 20;

/// The reason why a stream ended early. The errors of its source and its target are
/// [`io::Error`]s; [`StreamError::Incomplete`] is a stream whose sender left.
///
/// ```no_run
/// use std::fs::File;
///
/// use barlink::host;
/// use barlink::stream::{self, StreamError};
///
/// let mut receiver = host::connect("default")?.receiver("up")?;
/// let file = File::create("photo.jpg")?;
/// match stream::receive(&mut receiver, &file, &mut ()) {
///     Err(StreamError::Incomplete(bytes)) => println!("only {bytes} bytes came"),
///     Err(StreamError::Write { partial, .. }) => {
///         // The whole record comes again, so its first part must not stay in the file.
///         file.set_len(file.metadata()?.len() - partial)?;
///     }
///     received => println!("{} bytes", received?.bytes),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// [`StreamError::Incomplete`]: stream::StreamError::Incomplete
pub type StreamError = stream::StreamError<EventError>;

/// Sends all bytes of a file as one stream, in records of at most `record_size` bytes. A size of 0
/// counts as 1, and a size above [`Sender::max_record`] as that. `watch` sees the progress;
/// `&mut ()` ignores it. Sets [`Strategy::STREAM`], which remains set afterwards.
///
/// ```no_run
/// use std::fs::File;
///
/// use barlink::{host, stream};
///
/// let broker = host::connect("default")?;
/// let mut sender = broker.sender("down")?;
/// let sent = stream::send(&mut sender, File::open("photo.jpg")?, 1 << 20, &mut ())?;
/// println!("{} bytes", sent.bytes);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// The source cannot be read, or the channel stopped working.
pub fn send(
    sender: &mut Sender,
    source: impl AsFd,
    record_size: usize,
    watch: &mut impl Watch,
) -> Result<Progress, StreamError> {
    let mut record = vec![0; record_size.clamp(1, sender.max_record())];
    let source = source.as_fd().as_raw_fd();
    stream::send(sender.ring(), source, &mut record, watch)
}

/// Receives one stream, and writes its bytes to a file. A gap in the numbers of the records is no
/// error: [`Progress::dropped`] counts it. `watch` sees the progress; `&mut ()` ignores it. Sets
/// [`Strategy::STREAM`], which remains set afterwards.
///
/// ```no_run
/// use std::fs::File;
///
/// use barlink::{host, stream};
///
/// let broker = host::connect("default")?;
/// let mut receiver = broker.receiver("up")?;
/// let received = stream::receive(&mut receiver, File::create("photo.jpg")?, &mut ())?;
/// println!("{} bytes, {} lost", received.bytes, received.dropped);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// The target cannot be written, the sender left before the end of the stream, or the channel
/// stopped working.
pub fn receive(
    receiver: &mut Receiver,
    target: impl AsFd,
    watch: &mut impl Watch,
) -> Result<Progress, StreamError> {
    let target = target.as_fd().as_raw_fd();
    let (ring, numbers) = receiver.numbered();
    let mut watch = Noting { watch, numbers };
    stream::receive(ring, target, &mut watch)
}

/// A watch that notes the numbers of the records as well.
struct Noting<'a, W> {
    watch: &'a mut W,
    numbers: &'a mut Numbers,
}

impl<W: Watch> Watch for Noting<'_, W> {
    fn progress(&mut self, progress: &Progress) {
        self.watch.progress(progress);
    }

    fn record(&mut self, sequence: u64) {
        self.numbers.note(sequence);
        self.watch.record(sequence);
    }

    fn report_after(&self) -> Option<Duration> {
        self.watch.report_after()
    }

    fn waits(&mut self, is_away: bool) {
        self.watch.waits(is_away);
    }
}

/// A writer of one byte stream, which begins with the first bytes and ends with
/// [`StreamWriter::finish`]. If a program drops the writer without that, the receiver learns that
/// the stream is incomplete. Each write sends one record of at most 1 MiB, so a program that writes
/// few bytes at a time puts a [`BufWriter`](io::BufWriter) around it.
///
/// ```no_run
/// use std::io::{BufWriter, Write};
///
/// use barlink::host;
///
/// let mut sender = host::connect("default")?.sender("down")?;
/// let mut stream = sender.stream();
/// let mut table = BufWriter::with_capacity(1 << 16, &mut stream);
/// for number in 0..1_000_000_u64 {
///     writeln!(table, "{number} {}", number * number)?;
/// }
/// table.flush()?;
/// drop(table);
/// stream.finish()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct StreamWriter<'a> {
    sender: &'a mut Sender,
    begun: bool,
    dropped: u64,
}

impl<'a> StreamWriter<'a> {
    pub(crate) fn new(sender: &'a mut Sender) -> Self {
        sender.set_strategy(Strategy::STREAM);
        StreamWriter {
            sender,
            begun: false,
            dropped: 0,
        }
    }

    /// Returns the number of records of this stream that were dropped, as far as it was written.
    ///
    /// ```no_run
    /// use std::io::Write;
    ///
    /// use barlink::{ChannelOptions, host};
    ///
    /// let broker = host::connect("default")?;
    /// let options = ChannelOptions::new().drop_when_full(true);
    /// let mut sender = options.sender(&broker, "down")?;
    /// let mut audio = sender.stream();
    /// for _ in 0..1000 {
    ///     audio.write_all(&[0; 1764])?;
    /// }
    /// println!("{} of 1000 blocks were dropped", audio.dropped());
    /// audio.finish()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Ends the stream. Waits for room, also if the sender drops.
    ///
    /// ```no_run
    /// use std::io::copy;
    /// use std::net::TcpListener;
    ///
    /// use barlink::host;
    ///
    /// let mut sender = host::connect("default")?.sender("down")?;
    /// for connection in TcpListener::bind("127.0.0.1:7000")?.incoming() {
    ///     // One stream for each connection.
    ///     let mut stream = sender.stream();
    ///     copy(&mut connection?, &mut stream)?;
    ///     stream.finish()?;
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The channel stopped working.
    pub fn finish(self) -> Result<(), Error> {
        let ring = self.sender.ring();
        if !self.begun {
            stream::mark(ring, Kind::BEGIN)?;
        }
        Ok(stream::mark(ring, Kind::END)?)
    }
}

impl Write for StreamWriter<'_> {
    /// Sends bytes as one record, of at most 1 MiB. A record that is dropped counts as written.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(RECORD_SIZE).min(self.sender.max_record());
        if length == 0 {
            return Ok(0);
        }
        let mut put = |kind, bytes| {
            let sent = self.sender.ring().send(kind, bytes, None);
            sent.map(|sent| sent == Sent::Committed)
                .map_err(Error::from)
        };
        // The beginning can be dropped like any other record. Data without one would be taken for
        // another sender's.
        self.begun = self.begun || put(Kind::BEGIN, &[])?;
        if !(self.begun && put(Kind::DATA, &bytes[..length])?) {
            self.dropped += 1;
        }
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Position of a receiver in a byte stream. It outlives a reader that is dropped within a stream.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Position {
    /// Bytes that were read of the current record, if that is the last one of `next`.
    done: usize,
    /// Data of this stream came.
    begun: bool,
    /// Records that were dropped within this stream.
    dropped: u64,
    /// The sequence number behind the last record of a reader. Another one of the receiver means
    /// that the program has received records in another way, so this position is no longer valid.
    next: Option<u64>,
}

/// A reader of one byte stream. It ends with the stream, and then another reader can receive the
/// next stream. A sender that leaves before the end is [`io::ErrorKind::UnexpectedEof`].
///
/// A gap in the numbers of the records stands for dropped records, and is counted
/// ([`StreamReader::dropped`]). A reader that has found one returns the bytes that came, and then
/// [`io::ErrorKind::InvalidData`] instead of the end. A gap before the stream's beginning counts as
/// well, because the reader cannot tell whether the dropped records belong to the stream.
///
/// ```no_run
/// use std::io::{BufRead, BufReader};
///
/// use barlink::host;
///
/// let mut receiver = host::connect("default")?.receiver("log")?;
/// for line in BufReader::new(receiver.stream()).lines() {
///     let line = line?;
///     if line.contains("error") {
///         println!("{line}");
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct StreamReader<'a> {
    receiver: &'a mut Receiver,
    /// The stream has ended, after so many dropped records.
    ended: Option<u64>,
}

impl<'a> StreamReader<'a> {
    pub(crate) fn new(receiver: &'a mut Receiver) -> Self {
        receiver.set_strategy(Strategy::STREAM);
        let (_, numbers) = receiver.numbered();
        let next = numbers.next();
        let position = receiver.position();
        if position.next != next {
            *position = Position::default();
        }
        StreamReader {
            receiver,
            ended: None,
        }
    }

    /// Returns the number of records that the sender dropped within this stream, as far as it was
    /// read. A receiver's first stream counts from its first record ([`Receiver::missed`]).
    ///
    /// ```no_run
    /// use std::io::{ErrorKind, Read};
    ///
    /// use barlink::host;
    ///
    /// let mut receiver = host::connect("default")?.receiver("up")?;
    /// let mut stream = receiver.stream();
    /// let mut audio = Vec::new();
    /// match stream.read_to_end(&mut audio) {
    ///     // The bytes that came are there, so play them with a click.
    ///     Err(error) if error.kind() == ErrorKind::InvalidData => {
    ///         println!("{} clicks", stream.dropped());
    ///     }
    ///     read => println!("{} bytes", read?),
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn dropped(&self) -> u64 {
        self.ended
            .unwrap_or(self.receiver.stream_position().dropped)
    }

    /// Waits for the next record of the stream.
    fn wait(&mut self) -> io::Result<()> {
        loop {
            // A sender that has left sends no more, but what it committed until then is there.
            let away = self.receiver.position().begun && !self.receiver.is_peer_present();
            let timeout = away.then_some(Duration::ZERO);
            match self.receiver.ring().wait(timeout).map_err(Error::from)? {
                Wakeup::Ready => return Ok(()),
                Wakeup::TimedOut if away => return Err(self.incomplete()),
                Wakeup::TimedOut | Wakeup::PeerChanged => (),
            }
        }
    }

    /// Returns the error of a stream whose sender left. The next record begins another stream.
    fn incomplete(&mut self) -> io::Error {
        *self.receiver.position() = Position::default();
        let text = "the sender left before the end of the stream";
        io::Error::new(io::ErrorKind::UnexpectedEof, text)
    }

    /// Releases the current record.
    fn release(&mut self) -> io::Result<()> {
        self.receiver.position().done = 0;
        Ok(self.receiver.ring().release().map_err(Error::from)?)
    }
}

impl Read for StreamReader<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while self.ended.is_none() && !bytes.is_empty() {
            self.wait()?;
            let mut position = *self.receiver.position();
            let (ring, numbers) = self.receiver.numbered();
            let Some(record) = ring.record() else {
                continue;
            };
            let (kind, sequence) = (record.header().kind, record.header().sequence);
            if kind == Kind::BEGIN && position.begun {
                // This is the stream of another sender, and stays for the next reader.
                return Err(self.incomplete());
            }
            if numbers.next().is_none_or(|next| sequence >= next) {
                position.done = 0;
                position.dropped = position.dropped.saturating_add(numbers.note(sequence));
            }
            position.next = numbers.next();
            if kind == Kind::DATA && position.done < record.length() {
                let read = copy_from(&record, position.done, bytes);
                position.done += read;
                position.begun = true;
                let is_read = position.done == record.length();
                *self.receiver.position() = position;
                if is_read {
                    self.release()?;
                }
                return Ok(read);
            }
            *self.receiver.position() = position;
            if kind == Kind::END {
                self.ended = Some(position.dropped);
                *self.receiver.position() = Position::default();
            }
            self.release()?;
        }
        match self.ended {
            Some(dropped @ 1..) if !bytes.is_empty() => {
                let text = format!("{dropped} records were dropped before the end of the stream");
                Err(io::Error::new(io::ErrorKind::InvalidData, text))
            }
            _ => Ok(0),
        }
    }
}
