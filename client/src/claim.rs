// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The reasons for which an end of a channel cannot be claimed, on both sides. The broker sends
//! them as parts of its refusals.

use std::fmt::{self, Display, Formatter};

use barlink_protocol::wire::layout::End;
use serde::{Deserialize, Serialize};

/// The names that messages have for the ends of a channel.
#[derive(Serialize, Deserialize)]
#[serde(remote = "End", rename_all = "kebab-case")]
pub(crate) enum EndName {
    Producer,
    Consumer,
}

/// Another process holds the end of a channel.
///
/// ```no_run
/// use barlink::{Error, Held, host};
///
/// let broker = host::connect("default")?;
/// let receiver = match broker.receiver("up") {
///     Err(Error::Held(Held { pid: Some(pid), .. })) => {
///         println!("process {pid} receives already");
///         return Ok(());
///     }
///     receiver => receiver?,
/// };
/// # drop(receiver);
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Held {
    /// Name of the channel.
    pub channel: String,
    /// The end.
    #[serde(with = "EndName")]
    pub end: End,
    /// Process ID of the holder on the host. A guest's driver does not name the holder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
}

/// The end of a channel belongs to another peer.
///
/// ```no_run
/// use barlink::{Error, NotHere, host};
///
/// let broker = host::connect("default")?;
/// if let Err(Error::NotHere(NotHere { peer, .. })) = broker.sender("up") {
///     println!("{} sends into `up`", peer.unwrap_or_default());
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NotHere {
    /// Name of the channel.
    pub channel: String,
    /// The end.
    #[serde(with = "EndName")]
    pub end: End,
    /// The peer that the end belongs to. A guest's driver does not name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
}

/// The channel has no receiver, because its sender overwrites the oldest records. Each reader is a
/// [`Tap`](crate::Tap).
///
/// ```no_run
/// use barlink::{Error, NoConsumer, host};
///
/// let broker = host::connect("default")?;
/// if let Err(Error::NoConsumer(NoConsumer { channel, .. })) = broker.receiver("camera") {
///     let mut tap = broker.tap(&channel)?;
///     println!("{:?}", tap.latest()?);
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NoConsumer {
    /// Name of the channel.
    pub channel: String,
}

impl NoConsumer {
    /// Describes a claim that the broker refuses.
    #[doc(hidden)]
    pub fn new(channel: String) -> Self {
        NoConsumer { channel }
    }
}

impl Held {
    /// Describes a claim that the broker refuses.
    #[doc(hidden)]
    pub fn new(channel: String, end: End, pid: Option<u32>) -> Self {
        Held { channel, end, pid }
    }
}

impl NotHere {
    /// Describes a claim that the broker refuses.
    #[doc(hidden)]
    pub fn new(channel: String, end: End, peer: Option<String>) -> Self {
        NotHere { channel, end, peer }
    }
}

impl Display for Held {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Held { channel, end, pid } = self;
        write!(f, "channel `{channel}` already has a {end}")?;
        match pid {
            Some(0) => write!(
                f,
                ", a process on the host that the broker cannot name, for example because the broker is in a container: \
                 stop that process first"
            ),
            Some(pid) => write!(f, ", process {pid} on the host: stop that process first"),
            None => write!(
                f,
                ": stop the process in this VM that claimed it, or its child that inherited it (`barlink inspect` on the \
                 host shows the number of that process)"
            ),
        }
    }
}

impl Display for NotHere {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let NotHere { channel, end, peer } = self;
        match peer {
            Some(peer) => write!(
                f,
                "the {end} of channel `{channel}` is {peer}, not the host: use it there with barlink-guest, or choose \
                 another channel (`barlink inspect` shows from where to where each goes)"
            ),
            None => write!(
                f,
                "the {end} of channel `{channel}` is not in this VM: choose another channel (`barlink-guest info` \
                 lists them)"
            ),
        }
    }
}

impl Display for NoConsumer {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let NoConsumer { channel } = self;
        write!(
            f,
            "channel `{channel}` has no consumer, because its producer overwrites: read it with a tap (`recv --tap`, \
             `tail`, or `Tap` in a program)"
        )
    }
}

impl std::error::Error for NoConsumer {}

impl std::error::Error for Held {}

impl std::error::Error for NotHere {}
