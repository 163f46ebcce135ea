//! Stands between a VMM and the broker, passes everything on, and counts the VMM's messages.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::Result;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// Most descriptors that come at once.
const DESCRIPTORS: usize = 16;

/// See the module.
pub struct Relay {
    /// Where the VMM connects.
    pub path: PathBuf,
    messages: Arc<Mutex<Vec<Message>>>,
}

/// A message of the VMM.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Message {
    /// Its command.
    pub command: u16,
    /// Which region it accesses, if it is an access.
    pub region: Option<u32>,
}

/// `REGION_READ` and `REGION_WRITE`.
pub const ACCESSES: [u16; 2] = [9, 10];

impl Relay {
    /// Waits for one VMM, in a folder that it sees.
    pub fn start(broker: &Path, folder: &Path) -> Result<Self> {
        let path = folder.join("relay.sock");
        let listener = UnixListener::bind(&path)?;
        let broker = broker.to_owned();
        let messages = Arc::<Mutex<Vec<Message>>>::default();
        let counted = Arc::clone(&messages);
        thread::spawn(move || -> Result<()> {
            let (vmm, _) = listener.accept()?;
            let broker = UnixStream::connect(broker)?;
            let (from, to) = (broker.try_clone()?, vmm.try_clone()?);
            thread::spawn(move || pass(&from, &to, |_| ()));
            let mut reader = Reader::default();
            pass(&vmm, &broker, |bytes| {
                let mut counted = counted.lock().unwrap_or_else(PoisonError::into_inner);
                reader.take_in(bytes, &mut counted);
            })
        });
        Ok(Self { path, messages })
    }

    /// All messages so far.
    pub fn messages(&self) -> Vec<Message> {
        let messages = self.messages.lock();
        messages.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Finds the messages in a stream of bytes.
#[derive(Default)]
struct Reader(Vec<u8>);

impl Reader {
    fn take_in(&mut self, bytes: &[u8], messages: &mut Vec<Message>) {
        self.0.extend(bytes);
        let word = |bytes: &[u8], at: usize| {
            let word = bytes.get(at..at + 4)?;
            Some(u32::from_ne_bytes(word.try_into().ok()?))
        };
        while let (Some(head), Some(size)) = (word(&self.0, 0), word(&self.0, 4)) {
            let size = size as usize;
            if self.0.len() < size {
                break;
            }
            let command = (head >> 16) as u16;
            let region = ACCESSES.contains(&command).then(|| word(&self.0, 24));
            messages.push(Message {
                command,
                region: region.flatten(),
            });
            self.0.drain(..size);
        }
    }
}

/// Passes bytes and descriptors on until one side closes.
fn pass(from: &UnixStream, to: &UnixStream, mut seen: impl FnMut(&[u8])) -> Result<()> {
    let mut bytes = vec![0; 64 << 10];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = match rustix::net::recvmsg(from, parts, &mut ancillary, flags) {
            Ok(received) if received.bytes > 0 => received,
            // Who is killed with something unread closes so.
            Ok(_) | Err(Errno::CONNRESET) => {
                to.shutdown(Shutdown::Both)?;
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let mut descriptors: Vec<OwnedFd> = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        seen(&bytes[..received.bytes]);
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&borrowed));
        }
        let mut rest = &bytes[..received.bytes];
        while !rest.is_empty() {
            let flags = SendFlags::NOSIGNAL;
            let sent = rustix::net::sendmsg(to, &[IoSlice::new(rest)], &mut ancillary, flags)?;
            ancillary.clear();
            rest = &rest[sent..];
        }
    }
}
