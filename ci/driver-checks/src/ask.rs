// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Requests of a check, answers of the host, and the facts about the VM that both use.
//!
//! A check writes each [`Request`] to its standard output as a line of JSON. The host writes the
//! [`Answer`] to the check's standard input as a line of JSON.

use barlink_protocol::wire::layout::PAGE_SIZE;
use serde::{Deserialize, Serialize};

/// Offset in bytes that lies in the raw window of every region. At least a hundred pages of the
/// window follow it.
pub const RAW: u64 = 512 << 10;

/// A region that the VM has from the start, or can be given.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Region {
    /// The region that most checks use. The VM has slot 0.
    Main,
    /// A region in which the VM has slot 1, with the maximum of 256 vectors.
    Bus,
    /// A region behind a device without vectors: `ivshmem-plain`.
    Plain,
    /// Memory that is no barlink region, behind a device without vectors.
    Foreign,
    /// A region whose device is absent until [`Request::Plug`]. Only VMs whose devices can be
    /// unplugged have it: see [`UNPLUGGING`](crate::UNPLUGGING).
    Plugged,
}

/// The properties of a [`Region`] and its device.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// PCI address of the device.
    pub pci: &'static str,
    /// Size of the region, in bytes.
    pub size: u64,
    /// Number of VMs that the region has slots for.
    pub slots: u32,
    /// Slot of the VM that runs the checks.
    pub slot: u32,
    /// Number of interrupt vectors of the device.
    pub vectors: u32,
    /// Channels of the region, in the form of `barlink serve --channel`. The vector of channel `i`
    /// is `1 + i`.
    pub channels: &'static [&'static str],
}

impl Region {
    /// All regions, in the order of their devices.
    pub const ALL: [Self; 5] = [
        Self::Main,
        Self::Bus,
        Self::Plain,
        Self::Foreign,
        Self::Plugged,
    ];

    /// The regions whose devices the driver binds as soon as it is loaded.
    pub const TAKEN: [Self; 3] = [Self::Main, Self::Bus, Self::Plain];

    /// Returns the properties of the region and its device.
    pub const fn facts(self) -> Facts {
        let main = Facts {
            pci: "0000:01:00.0",
            size: 128 << 20,
            slots: 2,
            slot: 0,
            vectors: 4,
            channels: &["up=0-host,64K", "down=host-0,64K"],
        };
        match self {
            Self::Main => main,
            Self::Bus => Facts {
                pci: "0000:02:00.0",
                size: 16 << 20,
                slot: 1,
                vectors: 256,
                channels: &[
                    "up=0-host,64K",
                    "down=host-0,64K",
                    "side=0-1,64K",
                    "up1=1-host,64K",
                    "frames=1-taps,64K,overwrite",
                ],
                ..main
            },
            Self::Plain => Facts {
                pci: "0000:03:00.0",
                size: 1 << 20,
                slots: 1,
                vectors: 0,
                ..main
            },
            Self::Foreign => Facts {
                pci: "0000:04:00.0",
                size: 1 << 20,
                slots: 1,
                vectors: 0,
                channels: &[],
                ..main
            },
            Self::Plugged => Facts {
                pci: "0000:05:00.0",
                size: 4 << 20,
                ..main
            },
        }
    }

    /// Returns the peer ID of the host.
    pub const fn host(self) -> u32 {
        self.facts().slots
    }

    /// Returns the offset of the page that the VM's driver writes, in bytes.
    pub const fn driver_page(self) -> u64 {
        self.facts().size - (self.facts().slot as u64 + 1) * PAGE_SIZE
    }

    /// Returns the number of bytes of the region that a process can map.
    pub const fn mappable(self) -> u64 {
        self.facts().size - self.facts().slots as u64 * PAGE_SIZE
    }
}

/// A request of a check to the host.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Read words of a region.
    Load {
        /// The region.
        region: Region,
        /// Offset of the first word, in bytes.
        offset: u64,
        /// Number of words.
        count: usize,
    },
    /// Write words of a region.
    Store {
        /// The region.
        region: Region,
        /// Offset of the first word, in bytes.
        offset: u64,
        /// The words.
        words: Vec<u64>,
    },
    /// Ring a vector of the VM.
    Ring {
        /// The region of the device.
        region: Region,
        /// The vector.
        vector: u32,
        /// Number of rings, all of them by one write.
        times: u64,
    },
    /// Ring a vector of the VM many times, one by one, and write a word right before the last ring.
    Burst {
        /// The region of the device.
        region: Region,
        /// The vector.
        vector: u32,
        /// Number of rings.
        times: u64,
        /// Offset of the word, in bytes.
        offset: u64,
        /// The word.
        word: u64,
    },
    /// Return how often a vector of another peer was rung since the last such request.
    Rings {
        /// The region.
        region: Region,
        /// The peer.
        peer: u32,
        /// The vector.
        vector: u32,
        /// Timeout of the wait for the first ring, in milliseconds.
        timeout: u16,
    },
    /// Ring each vector of the VM once.
    RingAll {
        /// The region of the device.
        region: Region,
    },
    /// Return for each vector of another peer how often it was rung since the last such request.
    AllRings {
        /// The region.
        region: Region,
        /// The peer.
        peer: u32,
    },
    /// Answer each ring of a vector of the host by a ring of the VM's vector, until
    /// [`Request::Calm`].
    Echo {
        /// The region.
        region: Region,
        /// The vector, of the host and of the VM.
        vector: u32,
    },
    /// Ring all vectors of the VM again and again, until [`Request::Calm`].
    Storm {
        /// The region of the device.
        region: Region,
    },
    /// Press a key of the VM again and again, until [`Request::Calm`].
    Press,
    /// End the echo, the storm or the key presses.
    Calm,
    /// Stop the broker of a region.
    Pause {
        /// The region.
        region: Region,
    },
    /// Continue a stopped broker after a delay, even if the guest is stopped by then.
    GoOn {
        /// The region.
        region: Region,
        /// The delay, in milliseconds.
        after: u16,
    },
    /// Wake the VM once it is suspended.
    Wake,
    /// Return whether devices can be unplugged from the VM.
    Unplugs,
    /// Plug in the device of a region, which is absent.
    Plug {
        /// The region.
        region: Region,
    },
    /// Ask the guest to release the device of a region, and unplug the device.
    Unplug {
        /// The region.
        region: Region,
    },
    /// Show a measured figure in the test's output.
    Show {
        /// The text to print.
        figure: String,
    },
}

/// An answer of the host to a [`Request`].
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The request was carried out.
    Done,
    /// The words for [`Request::Load`].
    Words(Vec<u64>),
    /// The number of rings for [`Request::Rings`].
    Count(u64),
    /// The number of rings of each vector, in the order of vectors, for [`Request::AllRings`].
    Counts(Vec<u64>),
    /// The answer to [`Request::Unplugs`].
    Is(bool),
}
