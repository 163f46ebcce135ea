// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A host app's connection to a broker: the region, and the ends of channels that it claims.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use barlink_protocol::wire::layout::{End, Layout};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::control::client::{Control, ControlError};
use crate::control::message::{Answer, Ask, MAX_COPY, Refusal, Status};
use crate::doorbell::Doorbells;
use crate::error::Error;
use crate::host::claim::Claim;
use crate::host::events::Eventfds;
use crate::memory::{Access, Mapping, Region};
use crate::options::{ChannelOptions, Side, find, sealed};
use crate::receiver::Receiver;
use crate::sender::Sender;

/// Largest channel whose pages are all made present at its claim: then the first lap through it
/// takes a tenth of the time. A larger channel would delay its end for long, and use all of its
/// memory for perhaps one record.
const MAX_POPULATED: u64 = 64 << 20;

/// A host app's connection to a broker. Ends of channels outlive it.
#[derive(Debug)]
pub struct Attachment {
    control: Arc<Control>,
    layout: Layout,
    mapping: Mapping,
    access: Access,
}

impl Attachment {
    /// Attaches to the broker whose control socket is at `path`.
    ///
    /// # Errors
    ///
    /// There is no broker, it refuses, or its region cannot be mapped.
    pub fn connect(path: &Path, access: Access) -> Result<Self, Error> {
        let control = Control::connect(path)?;
        let (answer, descriptors) = control.ask(Ask::Attach { access })?;
        let Answer::Region(info) = answer else {
            return Err(control.not_a_broker("it answers another question").into());
        };
        // The layout is taken from the broker and not from the region, where a guest can write.
        let layout = Layout::try_from(&info).map_err(|source| Error::Layout {
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

    /// Claims the sending end of a channel, with the default [`ChannelOptions`].
    ///
    /// # Errors
    ///
    /// There is no such channel, its end belongs elsewhere, another process holds it, or its state
    /// is not valid.
    pub fn sender(&self, name: &str) -> Result<Sender, Error> {
        ChannelOptions::new().sender(self, name)
    }

    /// Claims the receiving end of a channel, with the default [`ChannelOptions`].
    ///
    /// # Errors
    ///
    /// Those of [`Attachment::sender`].
    pub fn receiver(&self, name: &str) -> Result<Receiver, Error> {
        ChannelOptions::new().receiver(self, name)
    }

    /// Returns the region's layout.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns the region's words. With [`Access::ReadOnly`] a store to them ends the process by
    /// SIGSEGV.
    pub fn region(&self) -> Region {
        self.mapping.region()
    }

    /// Asks the broker for its slots and claims.
    pub fn status(&self) -> Result<Status, Error> {
        match self.control.ask(Ask::Status)? {
            (Answer::Status(status), _) => Ok(status),
            _ => Err(self
                .control
                .not_a_broker("it answers another question")
                .into()),
        }
    }

    /// Copies bytes out of the own memory of a slot's guest, from a guest-physical address on.
    /// Where the guest has an IOMMU, the address is one of the device's. The guest can change the
    /// bytes meanwhile.
    pub fn read_guest(&self, slot: u32, address: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.copy(bytes, |start, length| Ask::ReadGuest {
            slot,
            address: address.saturating_add(start),
            length,
        })
    }

    /// Copies bytes out of the DMA buffer of a slot's guest, from an offset on. The guest can
    /// change them meanwhile.
    pub fn read_buffer(&self, slot: u32, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.copy(bytes, |start, length| Ask::ReadBuffer {
            slot,
            offset: offset.saturating_add(start),
            length,
        })
    }

    /// Copies bytes, as many as fit into an answer at a time.
    fn copy(&self, bytes: &mut [u8], ask: impl Fn(u64, usize) -> Ask) -> Result<(), Error> {
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

    /// Empties a channel whose ends are free. Returns the number of its new generation.
    pub fn reset(&self, name: &str) -> Result<u64, Error> {
        let channel = find(&self.layout, name)?;
        match self.control.ask(Ask::Reset { channel })? {
            (Answer::Reset { generation }, _) => Ok(generation),
            _ => Err(self
                .control
                .not_a_broker("it answers another question")
                .into()),
        }
    }
}

impl sealed::Side for Attachment {
    const PLACE: &'static str = "";
}

impl Side for Attachment {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn region(&self) -> Region {
        self.mapping.region()
    }

    fn claim(&self, name: &str, end: End) -> Result<(usize, Doorbells), Error> {
        let channel = find(&self.layout, name)?;
        if self.access == Access::ReadOnly {
            let name = name.to_owned();
            return Err(Error::ReadOnly { name, end });
        }
        let asked = self.control.ask(Ask::Claim { channel, end });
        let (answer, descriptors) = asked.map_err(|error| match error {
            ControlError::Refused(Refusal::Held(held)) => Error::Held(held),
            ControlError::Refused(Refusal::NotHost(not_here)) => Error::NotHere(not_here),
            error => Error::Control(error),
        })?;
        let Answer::Claimed = answer else {
            return Err(self
                .control
                .not_a_broker("it answers another question")
                .into());
        };
        let claim = Claim::new(Arc::clone(&self.control), channel, end);
        let [control, own, _, other] = take(&self.control, descriptors)?;
        let entry = &self.layout.channels()[channel];
        if entry.capacity <= MAX_POPULATED {
            let access = match end {
                End::Producer => Access::ReadWrite,
                End::Consumer => Access::ReadOnly,
            };
            self.mapping.populate(entry.offset..entry.end(), access);
        }
        let eventfds = Eventfds::new(control, own, other, claim)?;
        Ok((channel, eventfds.into()))
    }
}

/// Returns the descriptors that came with an answer, if their number is right.
fn take<const N: usize>(
    control: &Control,
    descriptors: Vec<OwnedFd>,
) -> Result<[OwnedFd; N], ControlError> {
    let count = descriptors.len();
    descriptors
        .try_into()
        .map_err(|_| control.not_a_broker(&format!("it sent {count} descriptors, and not {N}")))
}
