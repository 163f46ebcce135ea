// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The error of a page that is no superblock, or of a layout that is invalid.

use core::fmt;

use super::layout::{MAGIC, MAX_CHANNELS, MAX_SLOTS, MAX_VECTORS, VERSION};

/// Reason why a page is no superblock, or why a layout is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LayoutError {
    /// The first word is not [`MAGIC`].
    Magic {
        /// Value of the word.
        found: u64,
    },
    /// The version is not [`VERSION`].
    Version {
        /// Version in the superblock.
        found: u32,
    },
    /// The region has incompatible features that this program does not know.
    Features {
        /// The unknown features, as bits.
        unknown: u64,
    },
    /// The broker's name has other characters than a name may have.
    BrokerName,
    /// The superblock states another size than the region has.
    Size {
        /// Bytes that the superblock states.
        said: u64,
        /// Bytes that the region has.
        actual: u64,
    },
    /// The mapping does not cover the part of the region that its layout uses.
    Mapping {
        /// Bytes that must be mapped, from the region's first byte.
        needed: u64,
        /// Bytes that are mapped.
        mapped: u64,
    },
    /// The region's size is not a power of two, too small for its own pages, or above
    /// [`MAX_REGION_SIZE`](super::layout::MAX_REGION_SIZE).
    RegionSize {
        /// Size of the region, in bytes.
        size: u64,
    },
    /// The number of slots is not in `1..=MAX_SLOTS`.
    Slots {
        /// Number of slots.
        count: u32,
    },
    /// The number of vectors is not in `1..=MAX_VECTORS`.
    Vectors {
        /// Number of vectors.
        count: u32,
    },
    /// There are more channels than [`MAX_CHANNELS`].
    Channels {
        /// Number of channels.
        count: u64,
    },
    /// The raw window does not consist of whole free pages.
    RawWindow,
    /// The reserve does not consist of whole free pages.
    Reserve,
    /// The channel table has fewer channels than before.
    Fewer {
        /// Number of channels.
        count: u64,
    },
    /// A channel's entry is invalid.
    Channel {
        /// Index of the channel in the table.
        index: usize,
        /// Field that is invalid: `name`, `capacity`, `place`, `peer` or `vector`.
        fault: &'static str,
    },
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            LayoutError::Magic { found } => write!(
                f,
                "no barlink region: magic {found:#018x}, not {MAGIC:#018x}"
            ),
            LayoutError::Version { found } => write!(
                f,
                "layout version {found}, where this program knows {VERSION}"
            ),
            LayoutError::Features { unknown } => {
                f.write_str("this program does not know the region's incompatible features, bits")?;
                let bits = (0..u64::BITS).filter(|bit| unknown >> bit & 1 == 1);
                for (index, bit) in bits.enumerate() {
                    let before = if index == 0 { " " } else { ", " };
                    write!(f, "{before}{bit}")?;
                }
                f.write_str(": use programs and driver of one release")
            }
            LayoutError::BrokerName => f.write_str("broker's name has a wrong character"),
            LayoutError::Size { said, actual } => {
                write!(f, "superblock says {said} bytes, the region has {actual}")
            }
            LayoutError::Mapping { needed, mapped } => write!(
                f,
                "{mapped} bytes of the region are mapped, where its layout needs {needed}"
            ),
            LayoutError::RegionSize { size } => {
                write!(
                    f,
                    "region size {size} is not a power of two that holds its own pages"
                )
            }
            LayoutError::Slots { count } => write!(f, "{count} slots, not 1 to {MAX_SLOTS}"),
            LayoutError::Vectors { count } => write!(f, "{count} vectors, not 1 to {MAX_VECTORS}"),
            LayoutError::Channels { count } => {
                write!(f, "{count} channels, more than {MAX_CHANNELS}")
            }
            LayoutError::RawWindow => {
                f.write_str("raw window is not made of free pages of the region")
            }
            LayoutError::Reserve => f.write_str("reserve is not made of free pages of the region"),
            LayoutError::Fewer { count } => write!(f, "{count} channels, fewer than before"),
            LayoutError::Channel { index, fault } => {
                write!(f, "channel {index} has a wrong {fault}")
            }
        }
    }
}

impl core::error::Error for LayoutError {}
