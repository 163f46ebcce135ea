// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A host app's connection to a broker: the region, and the ends of channels that it claims.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use barlink_protocol::wire::layout::{Channel, End, Layout};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::control::client::{Control, ControlError};
use crate::control::message::{Added, Answer, Ask, Entry, MAX_COPY, Refusal, Status};
use crate::control::packet::PacketSocket;
use crate::doorbell::Doorbells;
use crate::error::Error;
use crate::host::claim::Claim;
use crate::host::events::Eventfds;
use crate::layouts::Layouts;
use crate::memory::{Access, Mapping};
use crate::options::{ChannelOptions, Side, find, sealed};
use crate::receiver::Receiver;
use crate::region::Region;
use crate::removal::Removal;
use crate::sender::Sender;
use crate::tap::Tap;

/// Largest channel whose pages are all made present at its claim: then the first lap through it
/// takes a tenth of the time. A larger channel would delay its end for long, and use all of its
/// memory for perhaps one record.
const MAX_POPULATED: u64 = 64 << 20;

/// A host app's connection to a broker. Ends of channels outlive it. Threads can share it: each
/// request waits for the answer to the one before it.
///
/// After `fork(2)`, the connection, its ends and its taps belong to the process that made them. The
/// copies in the forked process hold nothing: their calls fail with
/// [`ErrorKind::Inherited`](crate::ErrorKind::Inherited), and dropping them changes nothing. The
/// forked process attaches for itself. A claim ends with the process that made it, even if a forked
/// process goes on.
///
/// ```no_run
/// use barlink::Kind;
/// use barlink::host::{self, Attachment};
///
/// let broker: Attachment = host::connect("default")?;
/// let (mut sender, mut receiver) = (broker.sender("down")?, broker.receiver("up")?);
/// // The ends work on without it.
/// drop(broker);
/// sender.send(Kind::USER, b"ping")?;
/// println!("{:?}", receiver.recv()?.to_vec());
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Debug)]
pub struct Attachment {
    control: Arc<Control>,
    /// The socket of the connection, which stays the same once the broker has answered.
    socket: Arc<PacketSocket>,
    layouts: Layouts,
    mapping: Mapping,
    access: Access,
}

impl Attachment {
    /// Attaches to the broker whose control socket is at `path`.
    pub(super) fn connect(path: &Path, access: Access) -> Result<Self, Error> {
        let (control, answer, descriptors) = Control::open(path, Ask::Attach { access })?;
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
            socket: control.socket(),
            control: Arc::new(control),
            layouts: Layouts::new(layout),
            mapping,
            access,
        })
    }

    /// Claims the sending end of a channel, with the default [`ChannelOptions`].
    ///
    /// ```no_run
    /// use barlink::{Kind, host};
    ///
    /// let broker = host::connect("default")?;
    /// let mut commands = broker.sender("down")?;
    /// commands.send(Kind::USER, b"restart")?;
    /// // The end is free again for another process.
    /// drop(commands);
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`ChannelOptions::sender`].
    pub fn sender(&self, name: &str) -> Result<Sender, Error> {
        ChannelOptions::new().sender(self, name)
    }

    /// Claims the receiving end of a channel, with the default [`ChannelOptions`].
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let broker = host::connect("default")?;
    /// for mut receiver in [broker.receiver("up")?, broker.receiver("camera")?] {
    ///     std::thread::spawn(move || {
    ///         while let Ok(record) = receiver.recv() {
    ///             println!("{} bytes", record.len());
    ///         }
    ///     });
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`ChannelOptions::sender`].
    pub fn receiver(&self, name: &str) -> Result<Receiver, Error> {
        ChannelOptions::new().receiver(self, name)
    }

    /// Returns a tap of a channel, which begins behind the newest record. It needs no claim, and
    /// works with [`Access::ReadOnly`].
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let mut camera = host::connect("default")?.tap("camera")?;
    /// while let Ok(frame) = camera.recv() {
    ///     println!("{} bytes, {} missed", frame.bytes.len(), camera.missed());
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// There is no such channel.
    pub fn tap(&self, name: &str) -> Result<Tap, Error> {
        Tap::new(self, name)
    }

    /// Returns the region's layout: its size, channels and raw window, as the broker last reported.
    /// The broker can add channels: see [`Attachment::refresh`].
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// for channel in host::connect("default")?.layout().channels() {
    ///     println!(
    ///         "{}: {} to {}",
    ///         channel.name, channel.producer, channel.consumer
    ///     );
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn layout(&self) -> &Layout {
        self.layouts.latest()
    }

    /// Asks the broker for the channels that were added since this process attached, and returns
    /// the layout with them. To claim an end of a channel that the layout does not have asks as
    /// well.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let broker = host::connect("default")?;
    /// for channel in broker.refresh()?.channels() {
    ///     println!("{}", channel.name);
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The broker is gone, or answers with another region.
    pub fn refresh(&self) -> Result<&Layout, Error> {
        let access = self.access;
        let (Answer::Region(info), _) = self.control.ask(Ask::Attach { access })? else {
            return Err(self.other_answer());
        };
        let layout = Layout::try_from(&info).map_err(|source| Error::Layout {
            path: self.control.path().to_owned(),
            source,
        })?;
        if !self.layouts.extend(layout) {
            return Err(self.control.not_a_broker("it has another region").into());
        }
        Ok(self.layouts.latest())
    }

    /// Adds a channel to the region, in the room that the broker keeps for this purpose (option
    /// `--reserve` of `barlink serve`). The broker chooses the offset and the vector; those of
    /// `channel` have no effect. Programs that are attached, and VMs, go on.
    ///
    /// ```no_run
    /// use barlink::{Channel, Name, host};
    ///
    /// let broker = host::connect("default")?;
    /// let added = broker.add_channel(Channel {
    ///     name: "lidar".parse::<Name>()?,
    ///     producer: 0,
    ///     consumer: broker.layout().host(),
    ///     capacity: 1 << 20,
    ///     ..broker.layout().channels()[0]
    /// })?;
    /// println!("{} bytes are left", added.room);
    /// let mut lidar = broker.receiver("lidar")?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// There is too little room, the channel is invalid, another channel has the name, or this
    /// process attached with [`Access::ReadOnly`]
    /// ([`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput)); or the broker is gone.
    pub fn add_channel(&self, channel: Channel) -> Result<Added, Error> {
        match self.control.ask(Ask::AddChannel(Entry(channel)))? {
            (Answer::Added(added), _) => {
                // The channel is there, so an error now comes with the next question.
                let _ = self.refresh();
                Ok(added)
            }
            _ => Err(self.other_answer()),
        }
    }

    fn other_answer(&self) -> Error {
        self.control
            .not_a_broker("it answers another question")
            .into()
    }

    /// Returns the region. With [`Access::ReadOnly`] its methods that write return an error.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let broker = host::connect("default")?;
    /// let (layout, region) = (broker.layout(), broker.region());
    /// // A table that guests read at any time, in the raw window.
    /// region.poke(layout.raw_offset, &std::fs::read("table.bin")?)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn region(&self) -> Region {
        Region::new(self.mapping.region(), self.mapping.writable())
    }

    /// Asks the broker for its slots and for the ends that host apps hold.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let broker = host::connect("default")?;
    /// let status = broker.status()?;
    /// for vm in status.slots.iter().filter_map(|slot| slot.vm.as_ref()) {
    ///     println!("VMM {} of user {}", vm.pid, vm.uid);
    /// }
    /// for claim in &status.claims {
    ///     let channel = &broker.layout().channels()[claim.channel];
    ///     println!("process {} holds an end of {}", claim.pid, channel.name);
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The broker is gone, or does not answer.
    pub fn status(&self) -> Result<Status, Error> {
        match self.control.ask(Ask::Status)? {
            (Answer::Status(status), _) => Ok(status),
            _ => Err(self
                .control
                .not_a_broker("it answers another question")
                .into()),
        }
    }

    /// Copies bytes of the memory of the guest in a slot, from a guest-physical address on. If the
    /// guest has an IOMMU, the address is a DMA address of the device. The broker must have been
    /// started with `--guest-memory`.
    ///
    /// The broker copies 32 KiB at a time, and the guest can change the bytes meanwhile. After an
    /// error, `bytes` can have a part of them.
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let mut page = [0; 4096];
    /// // A guest sent this address over a channel.
    /// host::connect("default")?.read_guest(0, 0x1234_5000, &mut page)?;
    /// println!("{:x?}", &page[..16]);
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// There is no such slot, VM or shared memory at these addresses
    /// ([`ErrorKind::NotFound`](crate::ErrorKind::NotFound)), this process belongs to another user
    /// than the broker's own or root
    /// ([`ErrorKind::PermissionDenied`](crate::ErrorKind::PermissionDenied)), too many reads wait
    /// for that VM ([`ErrorKind::InUse`](crate::ErrorKind::InUse)), or the broker is gone.
    pub fn read_guest(&self, slot: u32, address: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.copy(bytes, |start, length| Ask::ReadGuest {
            slot,
            address: address.saturating_add(start),
            length,
        })
    }

    /// Copies bytes out of the DMA buffer of a slot's guest
    /// ([`guest::Device::buffer`](crate::guest::Device::buffer)), from an offset in bytes on. The
    /// broker copies as for [`Attachment::read_guest`].
    ///
    /// ```no_run
    /// use barlink::host;
    ///
    /// let broker = host::connect("default")?;
    /// let vm = &broker.status()?.slots[0].vm;
    /// if let Some(buffer) = vm.as_ref().and_then(|vm| vm.buffer) {
    ///     let mut picture = vec![0; buffer.size as usize];
    ///     broker.read_buffer(0, 0, &mut picture)?;
    ///     std::fs::write("picture.raw", picture)?;
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The guest has no buffer ([`ErrorKind::NotFound`](crate::ErrorKind::NotFound)), the bytes
    /// reach beyond its end ([`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput)), and
    /// those of [`Attachment::read_guest`].
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

    /// Empties a channel whose ends are free, also if it is corrupt. Returns how often the channel
    /// was reset, this time included.
    ///
    /// ```no_run
    /// use barlink::{ErrorKind, host};
    ///
    /// let broker = host::connect("default")?;
    /// let receiver = match broker.receiver("up") {
    ///     Err(error) if error.kind() == ErrorKind::Corrupt => {
    ///         eprintln!("reset {}", broker.reset("up")?);
    ///         broker.receiver("up")?
    ///     }
    ///     receiver => receiver?,
    /// };
    /// # drop(receiver);
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// There is no such channel ([`ErrorKind::NotFound`](crate::ErrorKind::NotFound)), this process
    /// attached with [`Access::ReadOnly`]
    /// ([`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput)), a process holds one of its
    /// ends, or the VMM of a guest that held one and did not give it back lives
    /// ([`ErrorKind::InUse`](crate::ErrorKind::InUse)), or the broker is gone.
    pub fn reset(&self, name: &str) -> Result<u64, Error> {
        let channel = self.resettable(name)?;
        let mut pauses = VMM_ENDS.into_iter();
        loop {
            match (self.ask_reset(channel, false), pauses.next()) {
                // A VMM that was killed ends a moment after its connection.
                (Err(ControlError::Refused(Refusal::VmmLives { .. })), Some(pause)) => {
                    std::thread::sleep(pause);
                }
                (Err(ControlError::Refused(refusal)), _) => {
                    return Err(ControlError::Refused(refusal.with_process_name()).into());
                }
                (reset, _) => return Ok(reset?.generation),
            }
        }
    }

    /// Empties a channel, even if processes hold its ends. Programs that hold one get an error at
    /// their next call ([`ErrorKind::Reset`](crate::ErrorKind::Reset)), and hold the end until they
    /// release it. A producer that is stopped while it fills a record can write the rest of it into
    /// the next records.
    ///
    /// ```no_run
    /// use barlink::host::{self, ForcedReset};
    ///
    /// let ForcedReset { broken, .. } = host::connect("default")?.force_reset("up")?;
    /// for end in broken {
    ///     println!("broke {end}");
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Attachment::reset`], except that the ends need not be free.
    pub fn force_reset(&self, name: &str) -> Result<ForcedReset, Error> {
        let channel = self.resettable(name)?;
        Ok(self.ask_reset(channel, true)?)
    }

    /// Finds a channel that this attachment can reset.
    fn resettable(&self, name: &str) -> Result<usize, Error> {
        let channel = sealed::Side::find(self, name)?;
        if self.access == Access::ReadOnly {
            let name = name.to_owned();
            return Err(Error::ReadOnlyReset { name });
        }
        Ok(channel)
    }

    fn ask_reset(&self, channel: usize, force: bool) -> Result<ForcedReset, ControlError> {
        match self.control.ask(Ask::Reset { channel, force })? {
            (Answer::Reset { generation, broken }, _) => Ok(ForcedReset { generation, broken }),
            _ => Err(self.control.not_a_broker("it answers another question")),
        }
    }
}

/// The pauses between the tries of a reset while a VMM lives.
const VMM_ENDS: [Duration; 3] = [
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_millis(400),
];

/// The result of [`Attachment::force_reset`].
///
/// ```no_run
/// use barlink::host::{self, ForcedReset};
///
/// let reset: ForcedReset = host::connect("default")?.force_reset("up")?;
/// println!("reset {} broke {} ends", reset.generation, reset.broken.len());
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForcedReset {
    /// Number of resets of the channel, this one included.
    pub generation: u64,
    /// The ends that were not free, with the processes that hold or held them, as texts.
    pub broken: Vec<String>,
}

impl AsFd for Attachment {
    /// Returns the descriptor of the connection to the broker, for a program that waits for several
    /// things. `POLLHUP` says that the connection is closed, because the broker ended or closed it.
    /// It comes without being requested, so the program requests no events; `POLLIN` is an answer
    /// that another thread waits for. A broker that is replaced, or that its service manager
    /// restarts, keeps the connection. Ends of channels work on without a broker.
    ///
    /// ```no_run
    /// use barlink::host;
    /// use rustix::event::{PollFd, PollFlags, poll};
    ///
    /// let broker = host::connect("default")?;
    /// let mut receiver = broker.receiver("up")?;
    /// loop {
    ///     let mut files = [
    ///         PollFd::new(&broker, PollFlags::empty()),
    ///         PollFd::new(&receiver, PollFlags::IN),
    ///     ];
    ///     poll(&mut files, None)?;
    ///     if files[0].revents().contains(PollFlags::HUP) {
    ///         println!("the broker has ended, so no further VM can come");
    ///         break;
    ///     }
    ///     while let Some(record) = receiver.try_recv()? {
    ///         println!("{:?}", record.to_vec());
    ///     }
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Attachment {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl sealed::Side for Attachment {
    const PLACE: &'static str = "";

    fn find(&self, name: &str) -> Result<usize, Error> {
        find(self.layouts.latest(), name).or_else(|_| find(self.refresh()?, name))
    }

    fn removal(&self) -> Removal {
        Removal::NEVER
    }
}

impl Side for Attachment {
    fn layout(&self) -> &Layout {
        self.layouts.latest()
    }

    fn region(&self) -> Region {
        Region::new(self.mapping.region(), self.mapping.writable())
    }

    fn claim(&self, name: &str, end: End) -> Result<(usize, Doorbells), Error> {
        let channel = sealed::Side::find(self, name)?;
        if self.access == Access::ReadOnly {
            let name = name.to_owned();
            return Err(Error::ReadOnly { name, end });
        }
        let asked = self.control.ask(Ask::Claim { channel, end });
        let (answer, descriptors) = asked.map_err(|error| match error {
            ControlError::Refused(Refusal::Held(held)) => Error::Held(held),
            ControlError::Refused(Refusal::NotHere(not_here)) => Error::NotHere(not_here),
            ControlError::Refused(Refusal::NoConsumer(none)) => Error::NoConsumer(none),
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
        let entry = &self.layouts.latest().channels()[channel];
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
