// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A device without its driver. What the driver does for all programs of the guest, each program
//! does for itself: it checks the superblock, and writes the presence page of the slot
//! (`session.rs`) and the claims (`claim.rs`). The kernel's interface to the device is [sysfs] or
//! [VFIO](vfio).

mod address;
mod claim;
mod find;
mod folder;
mod locks;
mod session;
mod superblock;
pub(crate) mod sysfs;
pub(crate) mod vfio;

pub(crate) use self::address::PciAddress;
pub(crate) use self::claim::{Claim, ClaimFault};
pub(crate) use self::find::{Opened, choose, named, open};
pub(crate) use self::locks::{LOCK_TIMEOUT, stalled};
pub(crate) use self::session::Session;
