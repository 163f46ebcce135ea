// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Byte streams through a channel, as `barlink send` and `barlink recv` use them.
//!
//! A stream is records of [`Kind::DATA`] between one of [`Kind::BEGIN`] and one of [`Kind::END`].
//! [`StreamWriter`] and [`StreamReader`] are for programs with bytes in memory. For files there are
//! [`send`] and [`receive`]: the kernel copies between the file and the shared memory. The files
//! can be non-blocking.
//!
//! A receiver takes up a stream at its beginning only. A record that is not of the stream stays in
//! the channel, and is an error. Dropped records are an error too, at the stream's end. A program
//! that wants such a stream asks for it by [`Accept`].

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use barlink_protocol::aligned::AlignedBuffer;
use barlink_protocol::cursor::Kind;
/// Streams that [`receive_with`] accepts although they are not whole.
///
/// ```no_run
/// use std::fs::File;
///
/// use barlink::host;
/// use barlink::stream::{self, Accept};
///
/// let mut receiver = host::connect("default")?.receiver("up")?;
/// // The program that received the first part of the stream was killed.
/// let rest = File::options().append(true).open("film.mp4")?;
/// let accept = Accept::default().partial(true);
/// let received = stream::receive_with(&mut receiver, rest, accept, &mut ())?;
/// println!("{} more bytes, {} records lost", received.bytes, received.dropped);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub use barlink_protocol::stream::Accept;
/// The reason why the next record belongs to no stream that a receiver can take up.
///
/// ```no_run
/// use std::fs::File;
///
/// use barlink::host;
/// use barlink::stream::{self, Misplaced, StreamError};
///
/// let mut receiver = host::connect("default")?.receiver("up")?;
/// match stream::receive(&mut receiver, File::create("photo.jpg")?, &mut ()) {
///     Err(StreamError::Misplaced(Misplaced::OtherKind { kind, .. })) => {
///         println!("a command of kind {kind}: {:?}", receiver.recv()?.to_vec());
///     }
///     received => println!("{} bytes", received?.bytes),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub use barlink_protocol::stream::Misplaced;
use barlink_protocol::stream::Part;
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
/// println!("{} records at {:.0} MiB/s", sent.records, speed / f64::from(1 << 20));
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
pub use crate::error::StreamError;
use crate::receiver::{Numbers, Receiver, copy_from};
use crate::sender::Sender;

/// Most bytes that a writer puts into one record: larger ones are no faster.
const RECORD_SIZE: usize = 1 << 20;

/// Sends all bytes of a file as one stream, in records of at most `record_size` bytes. A size of 0
/// counts as 1, and a size above [`Sender::max_record`] as that. `watch` sees the progress;
/// `&mut ()` ignores it. Sets [`Strategy::STREAM`], which remains set afterwards.
///
/// A regular file is sent up to the size that it has when it is first read, and `watch` is told if
/// it has become longer by then ([`Watch::source_has_grown`]).
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
/// The source cannot be read, or the channel stopped working. Up to 4 KiB of a pipe can have been
/// read and not sent then, if records are smaller. [`StreamError::Shrunk`]: the source is a regular
/// file that became shorter, so that the stream has no end. [`StreamError::EndDropped`]: the sender
/// drops, and the channel had no room for the end of the stream for a second.
/// [`StreamError::BeginDropped`]: it had none for the beginning either.
///
/// [`StreamError::BeginDropped`]: stream::StreamError::BeginDropped
/// [`StreamError::EndDropped`]: stream::StreamError::EndDropped
/// [`StreamError::Shrunk`]: stream::StreamError::Shrunk
pub fn send(
    sender: &mut Sender,
    source: impl AsFd,
    record_size: usize,
    watch: &mut impl Watch,
) -> Result<Progress, StreamError> {
    let size = record_size.clamp(1, sender.max_record());
    let mut record = AlignedBuffer::new(size).map_err(StreamError::Read)?;
    let source = source.as_fd().as_raw_fd();
    stream::send(sender.ring(), source, record.bytes(), watch)
}

/// Receives one stream, and writes its bytes to a file. `watch` sees the progress; `&mut ()`
/// ignores it. Sets [`Strategy::STREAM`], which remains set afterwards.
///
/// ```no_run
/// use std::fs::File;
///
/// use barlink::{host, stream};
///
/// let broker = host::connect("default")?;
/// let mut receiver = broker.receiver("up")?;
/// let received = stream::receive(&mut receiver, File::create("photo.jpg")?, &mut ())?;
/// println!("{} bytes", received.bytes);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// The target cannot be written, the sender left before the end of the stream, or the channel
/// stopped working. [`StreamError::Misplaced`]: the next record is not of a stream, or not its
/// beginning. It stays in the channel. [`StreamError::Missing`]: the stream was received to its
/// end, and records were dropped, which leave gaps in the numbers of the others.
/// [`StreamError::Close`]: the target reported a write error when a copy of its descriptor was
/// closed, which also gives back the locks by `fcntl(2)` that this process has of the file.
///
/// [`StreamError::Close`]: stream::StreamError::Close
/// [`StreamError::Misplaced`]: stream::StreamError::Misplaced
/// [`StreamError::Missing`]: stream::StreamError::Missing
pub fn receive(
    receiver: &mut Receiver,
    target: impl AsFd,
    watch: &mut impl Watch,
) -> Result<Progress, StreamError> {
    receive_with(receiver, target, Accept::default(), watch)
}

/// Receives one stream as [`receive`] does, also one that is not whole, if `accept` permits that.
///
/// ```no_run
/// use std::fs::File;
///
/// use barlink::host;
/// use barlink::stream::{self, Accept};
///
/// let mut receiver = host::connect("default")?.receiver("up")?;
/// // All records, of whatever kind, one behind the other.
/// let dump = File::create("records.bin")?;
/// stream::receive_with(&mut receiver, dump, Accept::default().raw(true), &mut ())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// As for [`receive`], but for the faults that are accepted.
pub fn receive_with(
    receiver: &mut Receiver,
    target: impl AsFd,
    accept: Accept,
    watch: &mut impl Watch,
) -> Result<Progress, StreamError> {
    let target = target.as_fd().as_raw_fd();
    let (ring, numbers, position) = receiver.streaming();
    let mut watch = Noting { watch, numbers };
    stream::receive(ring, target, accept, position, &mut watch)
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

    fn record(&mut self, sequence: u64) -> io::Result<()> {
        self.watch.record(sequence)?;
        self.numbers.note(sequence);
        Ok(())
    }

    fn report_after(&self) -> Option<Duration> {
        self.watch.report_after()
    }

    fn waits(&mut self, is_away: bool) {
        self.watch.waits(is_away);
    }

    fn broker_ended(&mut self) {
        self.watch.broker_ended();
    }

    fn timeout(&self) -> Option<Duration> {
        self.watch.timeout()
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
#[must_use = "a stream that is not finished is incomplete"]
pub struct StreamWriter<'a> {
    sender: &'a mut Sender,
    begun: bool,
    dropped: u64,
}

impl Sender {
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
}

impl<'a> StreamWriter<'a> {
    fn new(sender: &'a mut Sender) -> Self {
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

    /// Ends the stream. Waits for room; a sender that drops waits for a second at most.
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
    /// The channel stopped working. [`Error::Full`]: the sender drops, and the channel had no room
    /// for the end of the stream. The receiver finds the stream incomplete.
    pub fn finish(self) -> Result<(), Error> {
        if !self.begun {
            mark(self.sender, Kind::BEGIN)?;
        }
        mark(self.sender, Kind::END)
    }
}

/// Sends the beginning or the end of a stream, as [`StreamWriter::finish`] does, for programs that
/// send its data themselves.
#[doc(hidden)]
pub fn mark(sender: &mut Sender, kind: Kind) -> Result<(), Error> {
    match stream::mark(sender.ring(), kind)? {
        Sent::Committed => Ok(()),
        _ => Err(Error::Full),
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

/// A reader of one byte stream. It ends with the stream, and then another reader can receive the
/// next stream. A sender that leaves before the end is [`io::ErrorKind::UnexpectedEof`].
///
/// A gap in the numbers of the records stands for dropped records, and is counted
/// ([`StreamReader::dropped`]). A reader that has found one returns the bytes that came, and then
/// [`io::ErrorKind::InvalidData`] instead of the end. A gap before the stream's beginning counts as
/// well, because the reader cannot tell whether the dropped records belong to the stream.
///
/// A record that is not of the stream, or a stream without its beginning, is
/// [`io::ErrorKind::InvalidData`] as well. The record stays in the channel.
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
    accept: Accept,
    /// The stream has ended, after so many dropped records.
    ended: Option<u64>,
}

impl Receiver {
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
}

impl<'a> StreamReader<'a> {
    fn new(receiver: &'a mut Receiver) -> Self {
        receiver.set_strategy(Strategy::STREAM);
        receiver.streaming();
        StreamReader {
            receiver,
            accept: Accept::default(),
            ended: None,
        }
    }

    /// Sets whether the reader accepts a stream whose beginning is missing, or whose records have
    /// gaps in their numbers. Such a stream then ends without an error. The default is `false`.
    ///
    /// ```no_run
    /// use std::io::Read;
    ///
    /// use barlink::host;
    ///
    /// let mut receiver = host::connect("default")?.receiver("log")?;
    /// let mut rest = String::new();
    /// receiver.stream().partial(true).read_to_string(&mut rest)?;
    /// println!("{rest}");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn partial(mut self, accepts: bool) -> Self {
        self.accept = self.accept.partial(accepts);
        self
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
            // A sender that has left sends no more, but its committed records are still there. Its
            // presence is looked at only while there is no record, because each look goes over the
            // bus in a guest. The look is stored, so that the wait notices a sender that leaves
            // after it.
            let begun = self.receiver.stream_position().begun;
            let ring = self.receiver.ring();
            let is_idle = begun && !ring.poll().map_err(Error::from)?;
            let away = is_idle && ring.look_at_peer().map_err(Error::from)?;
            let timeout = away.then_some(Duration::ZERO);
            match ring.wait(timeout).map_err(Error::from)? {
                Wakeup::Ready => return Ok(()),
                Wakeup::TimedOut if away => return Err(self.incomplete()),
                Wakeup::TimedOut | Wakeup::PeerChanged => (),
            }
        }
    }

    /// Returns the error of a stream whose sender left. The next record begins another stream.
    fn incomplete(&mut self) -> io::Error {
        self.receiver.streaming().2.end();
        let text = "the sender left before the end of the stream";
        io::Error::new(io::ErrorKind::UnexpectedEof, text)
    }
}

impl Read for StreamReader<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while self.ended.is_none() && !bytes.is_empty() {
            self.wait()?;
            let accept = self.accept;
            let (ring, numbers, position) = self.receiver.streaming();
            let Some(record) = ring.record() else {
                continue;
            };
            let header = *record.header();
            let before = position.next();
            let part = position
                .take_up(&header, accept)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            if part == Part::NextBegin {
                // This is the stream of another sender, and stays for the next reader.
                return Err(self.incomplete());
            }
            if position.next() != before {
                numbers.note(header.sequence);
            }
            if part == Part::Data && position.done < record.length() {
                let read = copy_from(&record, position.done, bytes);
                position.done += read;
                if position.done == record.length() {
                    position.release();
                    ring.release().map_err(Error::from)?;
                }
                return Ok(read);
            }
            position.release();
            if part == Part::End {
                self.ended = Some(position.dropped);
                position.end();
            }
            ring.release().map_err(Error::from)?;
        }
        match self.ended {
            Some(dropped @ 1..) if !bytes.is_empty() && !self.accept.is_partial() => {
                let text = format!("{dropped} records were dropped before the end of the stream");
                Err(io::Error::new(io::ErrorKind::InvalidData, text))
            }
            _ => Ok(0),
        }
    }
}
