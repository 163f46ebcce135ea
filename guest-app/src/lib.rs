// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Shared memory as a PCI device, seen from the guest: what `/dev/barlinkN` gives a program.

mod device;
mod events;

pub use barlink_protocol as protocol;
pub use device::{Device, DeviceError, Mapping, Receiver, Region, Sender};
pub use events::{EventError, Interrupts};
