// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a VM gets of its broker, for a test on the host to read and write.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::broker::Broker;

/// How long the broker may take for whatever it does.
const PATIENCE: Duration = Duration::from_secs(60);

/// A region's memory, and the eventfds of all its peers.
#[derive(Debug)]
pub struct Tap {
    memory: File,
    /// For each peer, those of its vectors.
    bells: Vec<Vec<OwnedFd>>,
}

impl Tap {
    /// Takes a slot of ivshmem while no VM has it, and leaves with what all VMs of the region are given, each over its own
    /// transport: memory and eventfds are always the same.
    /// `slots` and `vectors` are the broker's.
    pub fn before_the_vm(broker: &Broker, slot: usize, slots: u32, vectors: u32) -> Result<Self> {
        let socket = UnixStream::connect(broker.socket(slot))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let (version, id) = (message(&socket)?.0, message(&socket)?.0);
        ensure!((version, id) == (0, i64::try_from(slot)?), "a strange slot");
        let memory = message(&socket)?.1.context("no memory")?;
        let mut bells: Vec<_> = (0..=slots).map(|_| Vec::new()).collect();
        for _ in 0..(slots + 1) * vectors {
            let (peer, bell) = message(&socket)?;
            let bells = bells.get_mut(usize::try_from(peer)?).context("no peer")?;
            bells.push(bell.context("no eventfd")?.into());
        }
        drop(socket);
        let start = Instant::now();
        while !broker.inspect()?["broker"]["slots"][slot]["vm"].is_null() {
            ensure!(start.elapsed() < PATIENCE, "the slot is not free again");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(Self { memory, bells })
    }

    /// Nothing but memory.
    pub fn of_memory(memory: File) -> Self {
        let bells = Vec::new();
        Self { memory, bells }
    }

    /// Words from an offset.
    pub fn load(&self, offset: u64, count: usize) -> Result<Vec<u64>> {
        let mut bytes = vec![0; 8 * count];
        self.memory.read_exact_at(&mut bytes, offset)?;
        let (words, _) = bytes.as_chunks();
        Ok(words.iter().copied().map(u64::from_le_bytes).collect())
    }

    /// Writes words at an offset.
    pub fn store(&self, offset: u64, words: &[u64]) -> Result<()> {
        let bytes: Vec<_> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Ok(self.memory.write_all_at(&bytes, offset)?)
    }

    /// Rings a vector of a peer, so often at once.
    pub fn ring(&self, peer: u32, vector: u32, times: u64) -> Result<()> {
        rustix::io::write(self.bell(peer, vector)?, &times.to_ne_bytes())?;
        Ok(())
    }

    /// How often a vector of a peer was rung since this was last asked.
    pub fn rings(&self, peer: u32, vector: u32) -> Result<u64> {
        self.wait(peer, vector, Duration::ZERO)
    }

    /// The same of all vectors: those that were rung, as peer, vector and how often.
    pub fn all_rings(&self) -> Result<Vec<(u32, u32, u64)>> {
        let mut all = Vec::new();
        for (peer, bells) in (0..).zip(&self.bells) {
            for (vector, _) in (0..).zip(bells) {
                let times = self.rings(peer, vector)?;
                all.extend((times != 0).then_some((peer, vector, times)));
            }
        }
        Ok(all)
    }

    /// Waits until a vector of a peer is rung, and gives how often; 0 if it is not.
    pub fn wait(&self, peer: u32, vector: u32, patience: Duration) -> Result<u64> {
        let bell = self.bell(peer, vector)?;
        let timeout = Timespec::try_from(patience)?;
        rustix::event::poll(&mut [PollFd::new(bell, PollFlags::IN)], Some(&timeout))?;
        let mut count = [0; 8];
        match rustix::io::read(bell, &mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    fn bell(&self, peer: u32, vector: u32) -> Result<&OwnedFd> {
        let bells = self.bells.get(peer as usize);
        let bell = bells.and_then(|bells| bells.get(vector as usize));
        bell.with_context(|| format!("peer {peer} has no vector {vector}"))
    }
}

/// A message of ivshmem's protocol: a number, and a descriptor with some.
fn message(socket: &UnixStream) -> Result<(i64, Option<File>)> {
    let mut bytes = [0; 8];
    let (length, file) = socket.recv_with_fd(&mut bytes)?;
    ensure!(length == bytes.len(), "a message of {length} bytes");
    Ok((i64::from_le_bytes(bytes), file))
}
