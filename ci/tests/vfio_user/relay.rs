// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A relay between a VMM and the broker. It forwards everything and counts the VMM's messages. It
//! can withhold one message or answer, as if the broker had ended in between.

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::Result;
use barlink_service::ancillary;
use rustix::io::Errno;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// A relay for one VMM: see the module.
pub struct Relay {
    /// The socket to which the VMM connects.
    pub path: PathBuf,
    seen: Arc<Mutex<Seen>>,
}

/// The messages that have passed, and the state of [`Relay::keep`].
#[derive(Default)]
struct Seen {
    messages: Vec<Message>,
    /// The half to withhold, and the command of the message that selects the exchange.
    wanted: Option<(Half, u16)>,
    /// The half to withhold, and the ID of the selected exchange, once its message has come.
    found: Option<(Half, u16)>,
    kept: bool,
}

/// One half of an exchange.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Half {
    /// The VMM's message.
    Message,
    /// The broker's answer.
    Answer,
}

/// A message of the VMM.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Message {
    /// The number of its command.
    pub command: u16,
    /// The region that it accesses, if it is an access.
    pub region: Option<u32>,
}

/// The commands `REGION_READ` and `REGION_WRITE`.
pub const ACCESSES: [u16; 2] = [9, 10];

impl Relay {
    /// Starts a relay for one VMM, with its socket in a folder that the VMM can access.
    pub fn start(broker: &Path, folder: &Path) -> Result<Self> {
        let path = folder.join("relay.sock");
        let listener = UnixListener::bind(&path)?;
        let broker = broker.to_owned();
        let seen = Arc::<Mutex<Seen>>::default();
        let all = Arc::clone(&seen);
        thread::spawn(move || -> Result<()> {
            let (vmm, _) = listener.accept()?;
            let broker = UnixStream::connect(broker)?;
            let (from, to) = (broker.try_clone()?, vmm.try_clone()?);
            let answered = Arc::clone(&all);
            thread::spawn(move || {
                pass(&from, &to, |bytes| {
                    lock(&answered).keep(Half::Answer, bytes);
                })
            });
            let mut reader = Reader::default();
            pass(&vmm, &broker, |bytes| {
                let mut seen = lock(&all);
                reader.take_in(bytes, &mut seen);
                seen.keep(Half::Message, bytes);
            })
        });
        Ok(Self { path, seen })
    }

    /// Returns all messages so far.
    pub fn messages(&self) -> Vec<Message> {
        lock(&self.seen).messages.clone()
    }

    /// Withholds the next message with this command, or the answer to it.
    pub fn keep(&self, half: Half, command: u16) {
        let mut seen = lock(&self.seen);
        (seen.wanted, seen.kept) = (Some((half, command)), false);
    }

    /// Returns whether the message or answer has come and was withheld.
    pub fn has_kept(&self) -> bool {
        lock(&self.seen).kept
    }
}

impl Seen {
    /// Removes the message or answer to withhold from `bytes`. These are whole messages, because
    /// each is sent with one call.
    fn keep(&mut self, half: Half, bytes: &mut Vec<u8>) {
        let Some((_, id)) = self.found.filter(|(wanted, _)| *wanted == half) else {
            return;
        };
        let mut at = 0;
        while let (Some(head), Some(size)) = (word(bytes, at), word(bytes, at + 4)) {
            let end = at + size as usize;
            if head as u16 == id {
                bytes.drain(at..end);
                (self.found, self.kept) = (None, true);
                return;
            }
            at = end;
        }
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(word.try_into().ok()?))
}

/// Finds the messages in a stream of bytes.
#[derive(Default)]
struct Reader(Vec<u8>);

impl Reader {
    fn take_in(&mut self, bytes: &[u8], seen: &mut Seen) {
        self.0.extend(bytes);
        while let (Some(head), Some(size)) = (word(&self.0, 0), word(&self.0, 4)) {
            let size = size as usize;
            if self.0.len() < size {
                break;
            }
            let command = (head >> 16) as u16;
            let region = ACCESSES.contains(&command).then(|| word(&self.0, 24));
            if let Some((half, _)) = seen.wanted.take_if(|wanted| wanted.1 == command) {
                seen.found = Some((half, head as u16));
            }
            seen.messages.push(Message {
                command,
                region: region.flatten(),
            });
            self.0.drain(..size);
        }
    }
}

/// Forwards bytes and descriptors until one end closes its socket.
fn pass(from: &UnixStream, mut to: &UnixStream, mut seen: impl FnMut(&mut Vec<u8>)) -> Result<()> {
    loop {
        let mut bytes = vec![0; 64 << 10];
        let (length, descriptors) = match ancillary::receive(from, &mut bytes) {
            Ok((length, descriptors)) if length > 0 => (length, descriptors),
            // A process that is killed with unread bytes resets the connection.
            Ok(_) | Err(Errno::CONNRESET) => {
                to.shutdown(Shutdown::Both)?;
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        bytes.truncate(length);
        seen(&mut bytes);
        if bytes.is_empty() {
            continue;
        }
        let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = to.send_with_fds(&[&bytes[..]], &raw)?;
        to.write_all(&bytes[sent..])?;
    }
}
