// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The region's memory and eventfds as a VM gets them from its broker, for tests on the host.

#![expect(unsafe_code, reason = "a process of its own connects to a slot")]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::broker::Broker;

/// Timeout of each wait for the broker.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The memory of a region, and the eventfds of all its peers.
#[derive(Debug)]
pub struct Tap {
    memory: File,
    /// Eventfds by peer and vector. Empty if the memory has no broker.
    eventfds: Vec<Vec<OwnedFd>>,
}

impl Tap {
    /// Connects to an ivshmem slot before its VM does, takes the memory and the eventfds, and
    /// disconnects. A process that has ended makes the connection, because a slot stays taken until
    /// the process of its former VMM has ended. All VMs of the region have the same memory and
    /// eventfds, also over other transports. `slots` and `vectors` are the broker's numbers of
    /// slots and of vectors per peer.
    pub fn before_the_vm(broker: &Broker, slot: usize, slots: u32, vectors: u32) -> Result<Self> {
        let socket = connect(&broker.socket(slot))?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        let (version, id) = (message(&socket)?.0, message(&socket)?.0);
        ensure!((version, id) == (0, i64::try_from(slot)?), "a strange slot");
        let memory = message(&socket)?.1.context("no memory")?;
        let mut eventfds: Vec<_> = (0..=slots).map(|_| Vec::new()).collect();
        for _ in 0..(slots + 1) * vectors {
            let (peer, eventfd) = message(&socket)?;
            let eventfds = eventfds
                .get_mut(usize::try_from(peer)?)
                .context("no peer")?;
            eventfds.push(eventfd.context("no eventfd")?.into());
        }
        drop(socket);
        let start = Instant::now();
        while !broker.inspect()?["broker"]["slots"][slot]["vm"].is_null() {
            ensure!(start.elapsed() < TIMEOUT, "the slot is not free again");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(Self { memory, eventfds })
    }

    /// Makes a tap of memory alone, without eventfds.
    pub fn of_memory(memory: File) -> Self {
        let eventfds = Vec::new();
        Self { memory, eventfds }
    }

    /// Reads `count` words from a byte offset.
    pub fn load(&self, offset: u64, count: usize) -> Result<Vec<u64>> {
        let mut bytes = vec![0; 8 * count];
        self.memory.read_exact_at(&mut bytes, offset)?;
        let (words, _) = bytes.as_chunks();
        Ok(words.iter().copied().map(u64::from_le_bytes).collect())
    }

    /// Writes words at a byte offset.
    pub fn store(&self, offset: u64, words: &[u64]) -> Result<()> {
        let bytes: Vec<_> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Ok(self.memory.write_all_at(&bytes, offset)?)
    }

    /// Rings a vector of a peer `times` times, by one write.
    pub fn ring(&self, peer: u32, vector: u32, times: u64) -> Result<()> {
        rustix::io::write(self.eventfd(peer, vector)?, &times.to_ne_bytes())?;
        Ok(())
    }

    /// Returns how often a vector of a peer was rung since the last call.
    pub fn rings(&self, peer: u32, vector: u32) -> Result<u64> {
        self.wait(peer, vector, Duration::ZERO)
    }

    /// Returns peer, vector and number of rings of each vector that was rung since the last call.
    pub fn all_rings(&self) -> Result<Vec<(u32, u32, u64)>> {
        let mut all = Vec::new();
        for (peer, eventfds) in (0..).zip(&self.eventfds) {
            for (vector, _) in (0..).zip(eventfds) {
                let times = self.rings(peer, vector)?;
                all.extend((times != 0).then_some((peer, vector, times)));
            }
        }
        Ok(all)
    }

    /// Waits until a vector of a peer is rung, and returns how often. Returns 0 after the timeout.
    pub fn wait(&self, peer: u32, vector: u32, timeout: Duration) -> Result<u64> {
        let eventfd = self.eventfd(peer, vector)?;
        let timeout = Timespec::try_from(timeout)?;
        rustix::event::poll(&mut [PollFd::new(eventfd, PollFlags::IN)], Some(&timeout))?;
        let mut count = [0; 8];
        match rustix::io::read(eventfd, &mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    fn eventfd(&self, peer: u32, vector: u32) -> Result<&OwnedFd> {
        let eventfds = self.eventfds.get(peer as usize);
        let eventfd = eventfds.and_then(|eventfds| eventfds.get(vector as usize));
        eventfd.with_context(|| format!("peer {peer} has no vector {vector}"))
    }
}

/// Returns a connection to a socket that a process of its own has made, which has ended.
fn connect(path: &Path) -> Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    // SAFETY: the forked process connects, sends and ends. These calls take no lock that another
    // thread of this process may hold, and no destructor runs.
    let process = match unsafe { libc::fork() } {
        0 => {
            let sent = UnixStream::connect(path)
                .is_ok_and(|socket| theirs.send_with_fd(&b"c"[..], socket.as_raw_fd()).is_ok());
            // SAFETY: it ends the process.
            unsafe { libc::_exit(i32::from(!sent)) }
        }
        process => process,
    };
    ensure!(process > 0, "cannot fork");
    let mut status = 0;
    // SAFETY: `status` is written before the call returns.
    let reaped = unsafe { libc::waitpid(process, &raw mut status, 0) };
    ensure!(
        reaped == process && status == 0,
        "cannot connect to {}",
        path.display()
    );
    let (_, socket) = ours.recv_with_fd(&mut [0])?;
    Ok(OwnedFd::from(socket.context("no connection")?).into())
}

/// Receives a message of ivshmem's protocol: a number, and a descriptor with some messages.
fn message(socket: &UnixStream) -> Result<(i64, Option<File>)> {
    let mut bytes = [0; 8];
    let (length, file) = socket.recv_with_fd(&mut bytes)?;
    ensure!(length == bytes.len(), "a message of {length} bytes");
    Ok((i64::from_le_bytes(bytes), file))
}
