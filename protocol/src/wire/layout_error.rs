// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Why a page is no superblock, or a layout is none.

use core::fmt;

use super::layout::{MAGIC, MAX_CHANNELS, MAX_SLOTS, MAX_VECTORS, VERSION};

/// Why a page is no superblock, or a layout is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// The first word is not [`MAGIC`].
    Magic {
        /// What it is.
        found: u64,
    },
    /// The version is not [`VERSION`].
    Version {
        /// What it is.
        found: u32,
    },
    /// The superblock gives another size than the region has.
    Size {
        /// Bytes, by the superblock.
        said: u64,
        /// Bytes, in fact.
        actual: u64,
    },
    /// Less of the region is mapped than its layout needs.
    Mapping {
        /// Bytes that are needed, from the region's first on.
        needed: u64,
        /// Bytes that are mapped.
        mapped: u64,
    },
    /// The region's size is no power of two, too small for its own pages, or beyond [`MAX_REGION_SIZE`](super::layout::MAX_REGION_SIZE).
    RegionSize {
        /// Bytes.
        size: u64,
    },
    /// The number of slots is not in `1..=MAX_SLOTS`.
    Slots {
        /// The number.
        count: u32,
    },
    /// The number of vectors is not in `1..=MAX_VECTORS`.
    Vectors {
        /// The number.
        count: u32,
    },
    /// There are more channels than [`MAX_CHANNELS`].
    Channels {
        /// The number.
        count: u64,
    },
    /// The raw window is not made of whole free pages.
    RawWindow,
    /// A channel's entry is wrong.
    Channel {
        /// Its index in the table.
        index: usize,
        /// The field: `name`, `capacity`, `place`, `peer` or `vector`.
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
            LayoutError::Channel { index, fault } => {
                write!(f, "channel {index} has a wrong {fault}")
            }
        }
    }
}

impl core::error::Error for LayoutError {}
