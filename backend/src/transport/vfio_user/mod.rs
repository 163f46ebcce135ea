// SPDX-License-Identifier: Apache-2.0 OR MIT

//! vfio-user: barlink's own PCI device, on a QEMU that runs it as a client of this server (`docs/protocol.md`, section 9).

pub mod request;
pub mod stream;
pub mod version;
pub mod wire;
