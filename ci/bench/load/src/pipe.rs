// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Peers of barlink: a stream of records through a pipe of bytes. The sender writes a record with
//! one `write`, and the receiver reads every byte. The last record carries a mark, because not
//! every pipe has an end of file.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

use crate::files::{CAPACITY, DOWN, Files, UP};
use crate::{Flow, Measured};

/// First word of the last record.
pub const LAST: u64 = u64::MAX;
/// Time to wait for the other end.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The address of a pipe.
#[derive(Clone, Debug)]
pub enum Endpoint {
    /// `tcp:ADDRESS`: connects.
    Tcp(String),
    /// `tcp-listen:ADDRESS`: waits for a connection.
    TcpListen(String),
    /// `unix:PATH`: connects.
    Unix(PathBuf),
    /// `unix-listen:PATH`: waits for a connection.
    UnixListen(PathBuf),
    /// `vsock:PORT`: connects to the host.
    Vsock(u32),
    /// `port:NAME`: a port of virtio-serial.
    Port(String),
    /// `guest-files:FOLDER` and `host-files:FOLDER`: the two files of [`crate::FILES`] in a shared
    /// folder. Each side writes one of them.
    Files(PathBuf, [&'static str; 2]),
}

impl FromStr for Endpoint {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (kind, rest) = text.split_once(':').context("an endpoint is KIND:WHERE")?;
        Ok(match kind {
            "tcp" => Endpoint::Tcp(rest.to_owned()),
            "tcp-listen" => Endpoint::TcpListen(rest.to_owned()),
            "unix" => Endpoint::Unix(rest.into()),
            "unix-listen" => Endpoint::UnixListen(rest.into()),
            "vsock" => Endpoint::Vsock(rest.parse()?),
            "port" => Endpoint::Port(rest.to_owned()),
            "guest-files" => Endpoint::Files(rest.into(), [UP, DOWN]),
            "host-files" => Endpoint::Files(rest.into(), [DOWN, UP]),
            _ => bail!("there is no kind of endpoint `{kind}`"),
        })
    }
}

/// Both directions of a pipe.
pub(crate) trait Pipe: Read + Write {}
impl<P: Read + Write> Pipe for P {}

impl Endpoint {
    pub(crate) fn open(&self) -> Result<Box<dyn Pipe>> {
        Ok(match self {
            Endpoint::Tcp(address) => {
                let stream = insist(|| TcpStream::connect(address))?;
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
            Endpoint::TcpListen(address) => {
                let (stream, _) = TcpListener::bind(address)?.accept()?;
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
            Endpoint::Unix(path) => Box::new(insist(|| UnixStream::connect(path))?),
            Endpoint::UnixListen(path) => Box::new(UnixListener::bind(path)?.accept()?.0),
            Endpoint::Vsock(port) => Box::new(insist(|| connect_to_host(*port))?),
            Endpoint::Port(name) => Box::new(open_port(name)?),
            Endpoint::Files(folder, names) => {
                Box::new(Files::open(names.map(|name| folder.join(name)))?)
            }
        })
    }

    /// Returns the number of bytes that the pipe can carry in total.
    fn capacity(&self) -> u64 {
        match self {
            Endpoint::Files(..) => CAPACITY,
            _ => u64::MAX,
        }
    }
}

/// Connects, and repeats that for up to [`TIMEOUT`] while it fails.
fn insist<T>(connect: impl Fn() -> io::Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match connect() {
            Err(_) if start.elapsed() < TIMEOUT => std::thread::sleep(Duration::from_millis(1)),
            connected => return Ok(connected?),
        }
    }
}

fn connect_to_host(port: u32) -> io::Result<File> {
    const HOST: u32 = 2;
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &VsockAddr::new(HOST, port))?;
    Ok(File::from(socket))
}

/// Finds a port of virtio-serial by its name, as udev would.
fn open_port(name: &str) -> Result<File> {
    for port in fs::read_dir("/sys/class/virtio-ports")? {
        let port = port?;
        let found = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if found.trim_end() == name {
            let path = PathBuf::from("/dev").join(port.file_name());
            return Ok(File::options().read(true).write(true).open(path)?);
        }
    }
    Err(anyhow!("there is no port {name}"))
}

/// The options of both ends.
#[derive(Args, Debug)]
struct Shape {
    /// tcp:ADDRESS, tcp-listen:ADDRESS, unix:PATH, unix-listen:PATH, vsock:PORT, port:NAME,
    /// guest-files:FOLDER or host-files:FOLDER
    endpoint: Endpoint,
    /// Bytes of a record, a multiple of 8
    #[arg(long)]
    record_size: usize,
}

/// Writes records to a pipe.
#[derive(Args, Debug)]
pub struct PipeSend {
    #[command(flatten)]
    shape: Shape,
    /// Length of the timed part of the stream, in milliseconds
    #[arg(long)]
    time: u64,
}

/// Reads records from a pipe until the last record.
#[derive(Args, Debug)]
pub struct PipeReceive {
    #[command(flatten)]
    shape: Shape,
}

impl PipeSend {
    /// Writes the same record again and again, and last a record that carries a mark.
    pub fn run(&self) -> Result<Measured> {
        let mut pipe = self.shape.endpoint.open()?;
        let words = 0..self.shape.record_size as u64 / 8;
        let mut record: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        let sum = sum_of(&record);
        let most = self.shape.endpoint.capacity() / self.shape.record_size.max(1) as u64;
        let mut flow = Flow::begin();
        while flow.lasts(self.time) && flow.records() < most {
            pipe.write_all(&record)?;
            flow.add(1, record.len() as u64, sum);
        }
        record[..8].copy_from_slice(&LAST.to_le_bytes());
        pipe.write_all(&record)?;
        flow.add(1, record.len() as u64, sum_of(&record));
        let measured = flow.end();
        // The receiver sends a byte once it has the last record, so that the pipe is not closed
        // before.
        pipe.read_exact(&mut record[..1])?;
        Ok(measured)
    }
}

impl PipeReceive {
    /// Reads records and adds up all words. Timing starts with the first record.
    pub fn run(&self) -> Result<Measured> {
        let mut pipe = self.shape.endpoint.open()?;
        let mut record = vec![0; self.shape.record_size];
        ensure!(record.len() >= 8, "a record has at least a word");
        pipe.read_exact(&mut record)?;
        let mut flow = Flow::begin();
        loop {
            flow.add(1, record.len() as u64, sum_of(&record));
            if record[..8] == LAST.to_le_bytes() {
                let measured = flow.end();
                pipe.write_all(&[0])?;
                return Ok(measured);
            }
            pipe.read_exact(&mut record)?;
        }
    }
}

/// Returns the wrapping sum of a record's words.
fn sum_of(record: &[u8]) -> u64 {
    let (words, _) = record.as_chunks();
    let words = words.iter().copied().map(u64::from_le_bytes);
    words.fold(0, u64::wrapping_add)
}
