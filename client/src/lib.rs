// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Shared memory as a PCI device, for programs on both of its sides.
//!
//! A broker on the host owns a region of memory. A VM sees it as a device, and host apps attach to
//! the broker. Both sides send and receive records in the shared memory itself, over channels that
//! have one [`Sender`] and one [`Receiver`].
//!
//! | for | see |
//! |---|---|
//! | a program on the host | [`host::connect`] |
//! | a program in the guest | [`guest::open`] |
//! | options of a channel's end | [`ChannelOptions`] |
//! | byte streams and files | [`Sender::stream`], [`Receiver::stream`], [`stream`] |
//! | several channels at once | the descriptors of [`Sender`] and [`Receiver`] |
//! | a look at the records that other programs exchange | [`Tap`] |
//! | errors | [`Error::kind`] |
//!
//! ```no_run
//! use barlink::host;
//!
//! let broker = host::connect("default")?;
//! for record in broker.receiver("up")?.iter() {
//!     println!("{:?}", record?.bytes);
//! }
//! # Ok::<(), barlink::Error>(())
//! ```

mod claim;
// Public because the broker answers the same messages, and its tests send them.
#[doc(hidden)]
pub mod control;
// Public because the broker passes descriptors to VMs by the same calls.
#[doc(hidden)]
pub mod descriptors;
mod doorbell;
mod error;
mod error_kind;
mod event_error;
pub mod guest;
pub mod host;
// Public because the broker stores the layout of its region in the same way.
#[doc(hidden)]
pub mod layouts;
// Public because the broker maps the same memory.
#[doc(hidden)]
pub mod memory;
// Public because the broker rings the same eventfds.
#[doc(hidden)]
pub mod notifier;
mod options;
mod owned;
mod peer;
mod process;
mod readiness;
mod receiver;
mod region;
mod removal;
mod sender;
pub mod stream;
mod tap;
mod timer;
mod vectors;

/// The time that an end polls before it arms a wake-up and sleeps.
///
/// ```
/// use std::time::Duration;
///
/// use barlink::{ChannelOptions, Strategy};
///
/// // Requests at 1 kHz: spin over the gap between two of them, and then sleep.
/// let strategy = Strategy {
///     most_spin: Duration::from_millis(1),
///     ..Strategy::PROMPT
/// };
/// let options = ChannelOptions::new().strategy(strategy);
/// ```
pub use barlink_protocol::Strategy;
/// A time stamp that a program gives a record, and the clock that it is from.
///
/// ```
/// use barlink::{Clock, Stamp};
///
/// let stamp = Stamp::new(1_764_633_600_000_000_000, Clock::REALTIME);
/// assert_eq!((stamp.clock.to_string().as_str(), stamp.clock.number()), ("realtime", 1));
/// // Numbers from 128 on are the user's own.
/// assert_eq!(Clock::new(128), Clock::USER);
/// ```
pub use barlink_protocol::cursor::{Clock, Stamp};
/// The reason why a channel cannot be used: a part of [`ChannelError`].
///
/// ```no_run
/// use barlink::{ChannelError, Error, host};
///
/// let broker = host::connect("default")?;
/// let mut receiver = broker.receiver("up")?;
/// match receiver.recv() {
///     Err(Error::Channel(ChannelError::Corrupt(fault))) => println!("empty the channel: {fault}"),
///     Err(Error::Channel(ChannelError::Reset(reset))) => println!("claim the end anew: {reset}"),
///     record => println!("{} bytes", record?.len()),
/// }
/// # Ok::<(), Error>(())
/// ```
pub use barlink_protocol::cursor::{Corrupt, Reset};
/// The type of a record's content.
///
/// ```
/// use barlink::Kind;
///
/// const FRAME: Kind = Kind::USER;
/// const AUDIO: Kind = Kind::new(FRAME.number() + 1).expect("below 65535");
///
/// assert_eq!((FRAME.number(), AUDIO.number()), (256, 257));
/// assert_eq!(Kind::new(0), None, "no record has kind 0");
/// let error = Kind::try_from(65535).unwrap_err().to_string();
/// assert_eq!(error, "invalid kind 65535 of a record: kinds are 1 to 65534");
/// ```
pub use barlink_protocol::cursor::{InvalidKind, Kind};
/// A range that is not in the mapping ([`RegionError::Outside`]).
///
/// ```no_run
/// use barlink::{OutOfRegion, RegionError, host};
///
/// let region = host::connect("default")?.region();
/// let mut bytes = vec![0; 1 << 20];
/// if let Err(RegionError::Outside(range)) = region.peek(region.size() - 4096, &mut bytes) {
///     let range: OutOfRegion = range;
///     bytes.truncate((range.size() - range.offset()) as usize);
///     region.peek(range.offset(), &mut bytes)?;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub use barlink_protocol::region::OutOfRegion;
/// A channel of a region, as its [`Layout`] has it.
///
/// ```no_run
/// use barlink::{Channel, End, host};
///
/// fn describe(channel: &Channel, host: u32) -> String {
///     let place = |end| match channel.peer(end) {
///         _ if end == End::Consumer && !channel.has_consumer() => "the taps".to_owned(),
///         peer if peer == host => "the host".to_owned(),
///         slot => format!("the VM in slot {slot}"),
///     };
///     let (from, to) = (place(End::Producer), place(End::Consumer));
///     format!("{} goes from {from} to {to}", channel.name)
/// }
///
/// let broker = host::connect("default")?;
/// let layout = broker.layout();
/// for channel in layout.channels() {
///     println!("{}", describe(channel, layout.host()));
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
pub use barlink_protocol::wire::layout::Channel;
/// An end of a channel.
///
/// ```
/// use barlink::End;
///
/// assert_eq!(End::Producer.other(), End::Consumer);
/// assert_eq!(End::Producer.to_string(), "producer");
/// ```
pub use barlink_protocol::wire::layout::End;
/// The error of a text that is no [`Name`].
///
/// ```
/// use barlink::{InvalidName, Name};
///
/// let error: InvalidName = "Camera 0".parse::<Name>().unwrap_err();
/// println!("{error}");
/// ```
pub use barlink_protocol::wire::layout::InvalidName;
/// The layout of a region. [`host::Attachment::layout`] and [`guest::Device::layout`] return it.
///
/// ```no_run
/// use barlink::guest;
///
/// let device = guest::open("/dev/barlink0")?;
/// let layout = device.layout();
/// if let Some((index, camera)) = layout.find("camera") {
///     println!("channel {index} holds {} bytes", camera.capacity);
/// }
/// println!("{} bytes belong to no channel", layout.raw_size);
/// # Ok::<(), barlink::Error>(())
/// ```
pub use barlink_protocol::wire::layout::Layout;
pub use barlink_protocol::wire::layout::LayoutError;
/// The name of a channel.
///
/// ```
/// use barlink::Name;
///
/// let name: Name = "camera-0".parse()?;
/// assert_eq!(name.as_str(), "camera-0");
/// assert!("Camera 0".parse::<Name>().is_err());
/// # Ok::<(), barlink::InvalidName>(())
/// ```
pub use barlink_protocol::wire::layout::Name;
/// The treatment of records that find a channel full.
///
/// ```no_run
/// use barlink::{Policy, host};
///
/// let broker = host::connect("default")?;
/// for channel in broker.layout().channels() {
///     match channel.policy {
///         Policy::Overwrite => println!("{}: use a tap", channel.name),
///         policy => println!("{}: {policy}", channel.name),
///     }
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
pub use barlink_protocol::wire::layout::Policy;
pub use barlink_protocol::wire::layout::{BrokerName, Identity, Instance};
pub use claim::{Held, NoConsumer, NotHere};
// Public because the bench, and tests of the broker, use the ring without the library around it.
#[doc(hidden)]
pub use doorbell::Doorbells;
pub use error::{ChannelError, Error};
pub use error_kind::ErrorKind;
pub use event_error::EventError;
pub use memory::{Access, MemoryError};
pub use options::{ChannelOptions, Side};
#[doc(hidden)]
pub use receiver::RingReceiver;
pub use receiver::{Iter, OwnedRecord, Receiver, Record};
pub use region::{Region, RegionError};
#[doc(hidden)]
pub use sender::RingSender;
pub use sender::{Reservation, Sender, Sent};
pub use tap::Tap;
