// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A host app's place at a broker: the region, and the ends of channels that it claims.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use barlink_protocol::ChannelError;
use barlink_protocol::wire::layout::{End, Layout, LayoutError};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::control::client::{Control, ControlError};
use crate::control::message::{Answer, Ask, MAX_COPY, Refusal, Status};
use crate::host::events::{Bells, EventError};
use crate::memory::{Access, Mapping, MemoryError, Region};

/// Largest channel all of whose pages are made present at its claim: the first lap through it takes a tenth of the time
/// then. A larger one would hold up an end for long, and have all of its memory for perhaps one record.
const MAX_POPULATED: u64 = 64 << 20;

/// The producer's end of a channel, on the host.
pub type Sender = barlink_protocol::Sender<Mapping, Bells>;
/// The consumer's end of a channel, on the host.
pub type Receiver = barlink_protocol::Receiver<Mapping, Bells>;

/// Why a host app cannot attach, or cannot have an end of a channel.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The broker cannot be asked, or says no.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The memory that it handed over cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The layout that it told cannot be.
    #[error("the broker at {path} tells a layout that cannot be")]
    Layout {
        /// The socket.
        path: std::path::PathBuf,
        /// What is wrong.
        source: LayoutError,
    },
    /// There is no channel of that name.
    #[error("no channel `{name}` in this region; there are: {known}")]
    NoChannel {
        /// The name.
        name: String,
        /// The names that there are.
        known: String,
    },
    /// Whoever only looks can hold no end: its words could not be written.
    #[error(
        "the {end} of channel `{name}` cannot be held by who attached for looking only: attach with `Access::ReadWrite`"
    )]
    ReadOnly {
        /// Name of the channel.
        name: String,
        /// The end.
        end: End,
    },
    /// Waiting for doorbells cannot be set up.
    #[error(transparent)]
    Events(#[from] EventError),
    /// The end was claimed, and cannot be taken up.
    #[error(
        "cannot take up the {end} of channel `{name}` (`barlink reset-channel {name}` empties it)"
    )]
    Channel {
        /// Name of the channel.
        name: String,
        /// The end.
        end: End,
        /// Why not.
        source: ChannelError<EventError>,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Attachment {
    control: Arc<Control>,
    layout: Layout,
    mapping: Mapping,
    access: Access,
}

impl Attachment {
    /// Attaches to the broker whose control socket is at `path`.
    pub fn connect(path: &Path, access: Access) -> Result<Self, AttachError> {
        let control = Control::connect(path)?;
        let (answer, descriptors) = control.ask(Ask::Attach { access })?;
        let Answer::Region(info) = answer else {
            return Err(control.not_a_broker("it answers another question").into());
        };
        // The layout is taken from the broker and not from the region, where a guest can write.
        let layout = Layout::try_from(&info).map_err(|source| AttachError::Layout {
            path: path.to_owned(),
            source,
        })?;
        let [memory] = take(&control, descriptors)?;
        let mapping = Mapping::new(memory, layout.region_size, access)?;
        Ok(Attachment {
            control: Arc::new(control),
            layout,
            mapping,
            access,
        })
    }

    /// The region's layout.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The region's words. They are mapped as was asked for: with [`Access::ReadOnly`] a store to them ends the process,
    /// by SIGSEGV.
    pub fn region(&self) -> Region {
        self.mapping.region()
    }

    /// Claims the producer's end of a channel, for as long as the sender lives.
    pub fn sender(&self, name: &str) -> Result<Sender, AttachError> {
        let (index, bells) = self.claim(name, End::Producer)?;
        Sender::attach(self.region(), &self.layout, index, bells)
            .map_err(|source| refused(name, End::Producer, source))
    }

    /// Claims the consumer's end of a channel, for as long as the receiver lives.
    pub fn receiver(&self, name: &str) -> Result<Receiver, AttachError> {
        let (index, bells) = self.claim(name, End::Consumer)?;
        Receiver::attach(self.region(), &self.layout, index, bells)
            .map_err(|source| refused(name, End::Consumer, source))
    }

    /// Asks the broker who is there.
    pub fn status(&self) -> Result<Status, AttachError> {
        match self.control.ask(Ask::Status)? {
            (Answer::Status(status), _) => Ok(status),
            _ => Err(self
                .control
                .not_a_broker("it answers another question")
                .into()),
        }
    }

    /// Copies bytes out of the own memory of a slot's guest, from a guest-physical address on; where the guest has an IOMMU, from one of
    /// the device's. The guest can change them meanwhile.
    pub fn read_guest(&self, slot: u32, address: u64, bytes: &mut [u8]) -> Result<(), AttachError> {
        self.copy(bytes, |start, length| Ask::ReadGuest {
            slot,
            address: address.saturating_add(start),
            length,
        })
    }

    /// Copies bytes out of the DMA buffer of a slot's guest, from an offset on, likewise.
    pub fn read_buffer(&self, slot: u32, offset: u64, bytes: &mut [u8]) -> Result<(), AttachError> {
        self.copy(bytes, |start, length| Ask::ReadBuffer {
            slot,
            offset: offset.saturating_add(start),
            length,
        })
    }

    /// Copies bytes, as many as fit into an answer at a time.
    fn copy(&self, bytes: &mut [u8], ask: impl Fn(u64, usize) -> Ask) -> Result<(), AttachError> {
        let mut start = 0;
        for part in bytes.chunks_mut(MAX_COPY) {
            match self.control.ask(ask(start, part.len()))? {
                (Answer::Bytes(text), _) => {
                    let copy = BASE64_STANDARD.decode(text).ok();
                    let copy = copy.filter(|copy| copy.len() == part.len());
                    let copy =
                        copy.ok_or_else(|| self.control.not_a_broker("it copies nothing"))?;
                    part.copy_from_slice(&copy);
                }
                _ => {
                    return Err(self
                        .control
                        .not_a_broker("it answers another question")
                        .into());
                }
            }
            start += part.len() as u64;
        }
        Ok(())
    }

    /// Empties a channel that nobody uses. Gives the number of its new generation.
    pub fn reset(&self, name: &str) -> Result<u64, AttachError> {
        let channel = self.find(name)?;
        match self.control.ask(Ask::Reset { channel })? {
            (Answer::Reset { generation }, _) => Ok(generation),
            _ => Err(self
                .control
                .not_a_broker("it answers another question")
                .into()),
        }
    }

    fn find(&self, name: &str) -> Result<usize, AttachError> {
        self.layout
            .find(name)
            .map(|(index, _)| index)
            .ok_or_else(|| {
                let names = self
                    .layout
                    .channels()
                    .iter()
                    .map(|channel| channel.name.to_string());
                AttachError::NoChannel {
                    name: name.to_owned(),
                    known: names.collect::<Vec<_>>().join(", "),
                }
            })
    }

    /// Claims an end of a channel for as long as its doorbells live, and gives the channel's index: for a program that
    /// waits or rings in a way of its own, and attaches a [`Sender`](barlink_protocol::Sender) or
    /// [`Receiver`](barlink_protocol::Receiver) with that.
    pub fn claim(&self, name: &str, end: End) -> Result<(usize, Bells), AttachError> {
        let channel = self.find(name)?;
        if self.access == Access::ReadOnly {
            let name = name.to_owned();
            return Err(AttachError::ReadOnly { name, end });
        }
        let (answer, descriptors) = self.control.ask(Ask::Claim {
            channel,
            end: end.into(),
        })?;
        let Answer::Claimed = answer else {
            return Err(self
                .control
                .not_a_broker("it answers another question")
                .into());
        };
        let claim = Claim {
            control: Arc::clone(&self.control),
            channel,
            end,
        };
        let [control, own, _, other] = take(&self.control, descriptors)?;
        let entry = &self.layout.channels()[channel];
        if entry.capacity <= MAX_POPULATED {
            let access = match end {
                End::Producer => Access::ReadWrite,
                End::Consumer => Access::ReadOnly,
            };
            self.mapping.populate(entry.offset..entry.end(), access);
        }
        Ok((channel, Bells::new(control, own, other, claim)?))
    }
}

fn refused(name: &str, end: End, source: ChannelError<EventError>) -> AttachError {
    AttachError::Channel {
        name: name.to_owned(),
        end,
        source,
    }
}

/// The descriptors that came with an answer, which are so many and no more.
fn take<const N: usize>(
    control: &Control,
    descriptors: Vec<OwnedFd>,
) -> Result<[OwnedFd; N], ControlError> {
    let count = descriptors.len();
    descriptors
        .try_into()
        .map_err(|_| control.not_a_broker(&format!("it sent {count} descriptors, and not {N}")))
}

/// A claim; dropping it gives the end back.
#[derive(Debug)]
pub struct Claim {
    control: Arc<Control>,
    channel: usize,
    end: End,
}

impl Drop for Claim {
    fn drop(&mut self) {
        // A broker that is gone, or that already saw us go, has nothing to release.
        match self.control.ask(Ask::Release {
            channel: self.channel,
            end: self.end.into(),
        }) {
            Ok(_)
            | Err(ControlError::Refused(Refusal::NotHeld) | ControlError::TurnedAway { .. }) => (),
            Err(error) => log::debug!("a claim is not given back: {error}"),
        }
    }
}
