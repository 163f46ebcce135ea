// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a check and the host say to each other, and what both know of the VM.
//!
//! A check writes one [`Request`] a line to its standard output, as JSON; the host writes an [`Answer`] a line to its
//! standard input.

use barlink_protocol::wire::layout::PAGE_SIZE;
use serde::{Deserialize, Serialize};

/// An offset in every region's raw window, with a hundred pages of it behind.
pub const RAW: u64 = 512 << 10;

/// A region that the VM has, or can be given.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Region {
    /// The one that most checks use. The VM is the first on it.
    Main,
    /// The VM is the second on it, and it has as many vectors as there can be.
    Bus,
    /// A device without vectors: `ivshmem-plain`.
    Plain,
    /// A device without vectors, over memory that is no barlink region.
    Foreign,
    /// A device that is not there until [`Request::Plug`], and only where devices can be pulled out: see
    /// [`UNPLUGGING`](crate::UNPLUGGING).
    Plugged,
}

/// What is known of a [`Region`] and its device.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// The device's PCI address.
    pub pci: &'static str,
    /// Bytes in the region.
    pub size: u64,
    /// VMs that it is for.
    pub slots: u32,
    /// The VM's slot.
    pub slot: u32,
    /// Interrupt vectors of the device.
    pub vectors: u32,
    /// The region's channels, as `barlink serve --channel` takes them. Channel `i` has vector `1 + i`.
    pub channels: &'static [&'static str],
}

impl Region {
    /// All of them, in the order of their devices.
    pub const ALL: [Self; 5] = [
        Self::Main,
        Self::Bus,
        Self::Plain,
        Self::Foreign,
        Self::Plugged,
    ];

    /// Those that the driver takes as soon as it is loaded.
    pub const TAKEN: [Self; 3] = [Self::Main, Self::Bus, Self::Plain];

    /// What is known of it.
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

    /// ID of the host as a peer.
    pub const fn host(self) -> u32 {
        self.facts().slots
    }

    /// Offset of the page that the VM's driver writes.
    pub const fn driver_page(self) -> u64 {
        self.facts().size - (self.facts().slot as u64 + 1) * PAGE_SIZE
    }

    /// Bytes of it that a process can map.
    pub const fn mappable(self) -> u64 {
        self.facts().size - self.facts().slots as u64 * PAGE_SIZE
    }
}

/// What a check asks of the host.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Read words of a region.
    Load {
        /// Which.
        region: Region,
        /// Offset of the first, in bytes.
        offset: u64,
        /// How many.
        count: usize,
    },
    /// Write words of a region.
    Store {
        /// Which.
        region: Region,
        /// Offset of the first, in bytes.
        offset: u64,
        /// The words.
        words: Vec<u64>,
    },
    /// Ring a vector of the VM.
    Ring {
        /// Of the device of this region.
        region: Region,
        /// The vector.
        vector: u32,
        /// How often, all at once.
        times: u64,
    },
    /// Ring a vector of the VM many times, one by one, and write a word right before the last time.
    Burst {
        /// Of the device of this region.
        region: Region,
        /// The vector.
        vector: u32,
        /// How often.
        times: u64,
        /// Offset of the word.
        offset: u64,
        /// The word.
        word: u64,
    },
    /// Say how often a vector of another peer was rung since this was last asked.
    Rings {
        /// Of this region.
        region: Region,
        /// The peer.
        peer: u32,
        /// The vector.
        vector: u32,
        /// How long to wait for the first, in milliseconds.
        patience: u16,
    },
    /// Ring each vector of the VM once.
    RingAll {
        /// Of the device of this region.
        region: Region,
    },
    /// Say of each vector of another peer how often it was rung since this was last asked.
    AllRings {
        /// Of this region.
        region: Region,
        /// The peer.
        peer: u32,
    },
    /// Answer each ring of a vector of the host by one of the VM's, until [`Request::Calm`].
    Echo {
        /// Of this region.
        region: Region,
        /// The vector of both.
        vector: u32,
    },
    /// Ring all vectors of the VM, over and over, until [`Request::Calm`].
    Storm {
        /// Of the device of this region.
        region: Region,
    },
    /// Press a key of the VM, over and over, until [`Request::Calm`].
    Press,
    /// End the echo, the storm, or the pressing.
    Calm,
    /// Stop the broker of a region.
    Pause {
        /// Which.
        region: Region,
    },
    /// Have it go on, in a while, whatever becomes of the guest meanwhile.
    GoOn {
        /// Which.
        region: Region,
        /// When, in milliseconds.
        after: u16,
    },
    /// Wake the VM, once it sleeps.
    Wake,
    /// Say whether devices can be pulled out of the VM.
    Unplugs,
    /// Plug in the device of a region, which is not there.
    Plug {
        /// Which.
        region: Region,
    },
    /// Have the guest let go of that device, and pull it out.
    Unplug {
        /// Which.
        region: Region,
    },
    /// Show a figure that was measured.
    Show {
        /// What to print.
        figure: String,
    },
}

/// What the host answers.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It is done.
    Done,
    /// To [`Request::Load`].
    Words(Vec<u64>),
    /// To [`Request::Rings`].
    Count(u64),
    /// To [`Request::AllRings`], by vector.
    Counts(Vec<u64>),
    /// To [`Request::Unplugs`].
    Is(bool),
}
