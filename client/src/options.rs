// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The options of a channel's end, and how both sides open one.

use std::time::{Duration, Instant};

use barlink_protocol::wire::layout::{End, Layout};
use barlink_protocol::{PresenceWords, Strategy};

use crate::doorbell::Doorbells;
use crate::error::{ChannelError, Error};
use crate::error_kind::ErrorKind;
use crate::receiver::{Receiver, RingReceiver};
use crate::region::Region;
use crate::sender::{RingSender, Sender};

/// Time between two tries to claim an end that another process holds.
const RETRY: Duration = Duration::from_millis(10);

/// A region in which ends of channels can be claimed: [`host::Attachment`](crate::host::Attachment)
/// and [`guest::Device`](crate::guest::Device). A function over it serves programs on both sides.
///
/// ```no_run
/// use barlink::{ChannelOptions, Error, Kind, Side, guest, host};
///
/// fn send_greeting(side: &impl Side, channel: &str) -> Result<(), Error> {
///     let mut sender = ChannelOptions::new().sender(side, channel)?;
///     sender.send(Kind::USER, b"hello").map(drop)
/// }
///
/// send_greeting(&host::connect("default")?, "down")?;
/// send_greeting(&guest::open("/dev/barlink0")?, "up")?;
/// # Ok::<(), Error>(())
/// ```
pub trait Side: sealed::Side {
    /// Returns the region's layout.
    ///
    /// ```no_run
    /// use barlink::{Side, host};
    ///
    /// /// Prints the channels that the host sends into.
    /// fn list(side: &impl Side) {
    ///     let layout = side.layout();
    ///     for channel in layout.channels() {
    ///         if channel.producer == layout.host() {
    ///             println!("{}: {} bytes", channel.name, channel.capacity);
    ///         }
    ///     }
    /// }
    ///
    /// list(&host::connect("default")?);
    /// # Ok::<(), barlink::Error>(())
    /// ```
    fn layout(&self) -> &Layout;

    /// Returns the region, as far as it is mapped.
    ///
    /// ```no_run
    /// use barlink::{RegionError, Side, guest};
    ///
    /// /// Copies the first bytes of the raw window, which belongs to the user.
    /// fn start_of_window(side: &impl Side) -> Result<[u8; 64], RegionError> {
    ///     let mut bytes = [0; 64];
    ///     side.region().copy_out(side.layout().raw_offset, &mut bytes)?;
    ///     Ok(bytes)
    /// }
    ///
    /// println!("{:?}", start_of_window(&guest::open("/dev/barlink0")?)?);
    /// # Ok::<(), barlink::Error>(())
    /// ```
    fn region(&self) -> Region;

    /// Claims an end of a channel for as long as its doorbells live, and returns the channel's
    /// index. [`ChannelOptions`] does so for programs; the bench and tests of the workspace attach
    /// the ring's own ends.
    ///
    /// # Errors
    ///
    /// There is no such channel, its end belongs elsewhere, or another process holds it.
    #[doc(hidden)]
    fn claim(&self, name: &str, end: End) -> Result<(usize, Doorbells), Error>;
}

pub(crate) mod sealed {
    use crate::error::Error;
    use crate::removal::Removal;

    /// Only this crate has sides.
    pub trait Side {
        /// The place of the host's commands: empty on the host.
        const PLACE: &'static str;

        /// Finds a channel, also one that was added since the layout was read.
        fn find(&self, name: &str) -> Result<usize, Error>;

        /// Returns the removal of the region's device.
        fn removal(&self) -> Removal;
    }
}

/// Finds the index of a channel in a layout.
pub(crate) fn find(layout: &Layout, name: &str) -> Result<usize, Error> {
    let found = layout.find(name).map(|(index, _)| index);
    found.ok_or_else(|| {
        let names = layout
            .channels()
            .iter()
            .map(|channel| channel.name.to_string());
        Error::NoChannel {
            name: name.to_owned(),
            known: names.collect::<Vec<_>>().join(", "),
        }
    })
}

/// Options for opening an end of a channel, as [`std::fs::OpenOptions`] are for files.
///
/// ```no_run
/// use std::time::Duration;
///
/// use barlink::{ChannelOptions, Strategy, host};
///
/// let broker = host::connect("default")?;
/// let receiver = ChannelOptions::new()
///     .strategy(Strategy::SLEEP)
///     .claim_timeout(Duration::from_secs(5))
///     .receiver(&broker, "up")?;
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct ChannelOptions {
    strategy: Strategy,
    drop_when_full: Option<bool>,
    claim_timeout: Duration,
}

impl Default for ChannelOptions {
    fn default() -> Self {
        ChannelOptions {
            strategy: Strategy::PROMPT,
            drop_when_full: None,
            claim_timeout: Duration::ZERO,
        }
    }
}

impl ChannelOptions {
    /// Returns the default options: [`Strategy::PROMPT`], dropping as the channel says, and no wait
    /// for a claim.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how the end waits: how long it spins and sleeps before it asks to be rung.
    ///
    /// ```no_run
    /// use barlink::{ChannelOptions, Strategy, guest};
    ///
    /// let device = guest::open("/dev/barlink0")?;
    /// // This program has a CPU for the answers alone.
    /// let options = ChannelOptions::new().strategy(Strategy::SPIN);
    /// let mut answers = options.receiver(&device, "down")?;
    /// println!("{:?}", answers.recv()?.to_vec());
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn strategy(mut self, strategy: Strategy) -> Self {
        self.strategy = strategy;
        self
    }

    /// Sets whether a sender drops records that find the channel full. Without this call, the
    /// channel's entry in the layout decides. It has no effect on a receiver, and none on a channel
    /// that overwrites, which is never full.
    ///
    /// ```no_run
    /// use barlink::{ChannelOptions, Kind, Sent, host};
    ///
    /// let broker = host::connect("default")?;
    /// // A camera that waits would show old pictures.
    /// let options = ChannelOptions::new().drop_when_full(true);
    /// let mut camera = options.sender(&broker, "camera")?;
    /// if camera.send(Kind::USER, &[0; 320 * 240])? == Sent::Dropped {
    ///     println!("frame dropped");
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn drop_when_full(mut self, drops: bool) -> Self {
        self.drop_when_full = Some(drops);
        self
    }

    /// Sets how long to wait for the end while another process holds it. The wait tries again every
    /// 10 ms.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use barlink::{ChannelOptions, host};
    ///
    /// let broker = host::connect("default")?;
    /// // The former instance of this service may still be on its way out.
    /// let options = ChannelOptions::new().claim_timeout(Duration::from_secs(10));
    /// let mut requests = options.receiver(&broker, "up")?;
    /// println!("first request: {:?}", requests.recv()?.to_vec());
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn claim_timeout(mut self, timeout: Duration) -> Self {
        self.claim_timeout = timeout;
        self
    }

    /// Claims the sending end of a channel.
    ///
    /// ```no_run
    /// use barlink::{ChannelOptions, Kind, Strategy, guest};
    ///
    /// let device = guest::open("/dev/barlink0")?;
    /// let options = ChannelOptions::new().strategy(Strategy::SLEEP);
    /// // The same options for several channels.
    /// let mut readings = options.sender(&device, "readings")?;
    /// let mut alarms = options.sender(&device, "alarms")?;
    /// readings.send(Kind::USER, &21.5_f32.to_le_bytes())?;
    /// alarms.send(Kind::USER, b"too warm")?;
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// There is no such channel ([`ErrorKind::NotFound`]), its end belongs to another peer or this
    /// process attached with [`Access::ReadOnly`](crate::Access::ReadOnly)
    /// ([`ErrorKind::InvalidInput`]), another process holds it ([`ErrorKind::InUse`]), or the
    /// channel is corrupt ([`ErrorKind::Corrupt`]). A connection to the broker, a file or a
    /// descriptor can also fail.
    pub fn sender<S: Side>(&self, side: &S, name: &str) -> Result<Sender, Error> {
        let (index, doorbells) = self.claim(side, name, End::Producer)?;
        let (region, layout) = (side.region().ring().clone(), side.layout());
        let ring = RingSender::attach(region.clone(), layout, index, doorbells);
        let mut ring = ring.map_err(|source| refused::<S>(name, End::Producer, source))?;
        ring.set_strategy(self.strategy);
        if let Some(drops) = self.drop_when_full {
            ring.set_drops(drops);
        }
        let peer = PresenceWords::find(layout, index, End::Consumer, region.size());
        Sender::new(ring, region, peer)
    }

    /// Claims the receiving end of a channel.
    ///
    /// ```no_run
    /// use barlink::{ChannelOptions, ErrorKind, Strategy, host};
    ///
    /// let broker = host::connect("default")?;
    /// let options = ChannelOptions::new().strategy(Strategy::STREAM);
    /// match options.receiver(&broker, "log") {
    ///     Ok(mut log) => println!("{:?}", log.recv()?.to_vec()),
    ///     Err(error) if error.kind() == ErrorKind::InUse => println!("already read"),
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`ChannelOptions::sender`].
    pub fn receiver<S: Side>(&self, side: &S, name: &str) -> Result<Receiver, Error> {
        let (index, doorbells) = self.claim(side, name, End::Consumer)?;
        let (region, layout) = (side.region().ring().clone(), side.layout());
        let ring = RingReceiver::attach(region.clone(), layout, index, doorbells);
        let mut ring = ring.map_err(|source| refused::<S>(name, End::Consumer, source))?;
        ring.set_strategy(self.strategy);
        let peer = PresenceWords::find(layout, index, End::Producer, region.size());
        Receiver::new(ring, region, peer)
    }

    fn claim<S: Side>(&self, side: &S, name: &str, end: End) -> Result<(usize, Doorbells), Error> {
        let start = Instant::now();
        loop {
            match side.claim(name, end) {
                Err(error)
                    if error.kind() == ErrorKind::InUse && start.elapsed() < self.claim_timeout =>
                {
                    std::thread::sleep(RETRY);
                }
                claimed => return claimed,
            }
        }
    }
}

fn refused<S: Side>(name: &str, end: End, source: ChannelError) -> Error {
    if let ChannelError::Device(_) = source {
        return source.into();
    }
    Error::TakeUp {
        name: name.to_owned(),
        end,
        place: S::PLACE,
        source,
    }
}
