// SPDX-License-Identifier: GPL-2.0 OR MIT

//! barlink's guest driver: gives the processes of a VM a device made of memory shared with the
//! host.
//!
//! The device is either a PCI device with ivshmem's ID (1af4:1110) and a barlink region behind
//! BAR2, or a virtio device with the region as its shared memory. Programs cannot tell the two
//! apart. The driver maps parts of the region into processes, delivers the device's interrupts to
//! them, rings the host for them, and records which process holds which end of which channel. The
//! driver reads no channel and copies no data, because records pass directly between the process
//! and the host.
//!
//! | file | contents |
//! |---|---|
//! | `pci.rs` | probe and removal of a PCI device |
//! | `irq.rs` | MSI-X vectors of a PCI device |
//! | `virtio.rs` | probe, removal and suspend of a virtio device |
//! | `virtqueue.rs` | a virtqueue of short messages |
//! | `doorbells.rs`, `interrupts.rs` | the two queues of a virtio device |
//! | `binding.rs` | the part of a probe that both buses share |
//! | `memory.rs`, `iomem.rs` | device memory, and the driver's own accesses to it |
//! | `hardware.rs` | the superblock, the doorbell and the driver's page of the region |
//! | `wait.rs`, `lock.rs` | the kernel's wait queues and spinlocks |
//! | `events.rs` | delivery of vectors to open files |
//! | `signals.rs` | eventfds of user space, one for each vector |
//! | `claims.rs` | the holders of the channel ends |
//! | `device.rs` | the state that open files and the driver share, and that outlives the binding |
//! | `chardev.rs`, `file.rs` | `/dev/barlinkN`, and the operations of an open file |
//! | `mapping.rs` | `mmap`, and the removal of mappings |
//! | `areas.rs` | the mapped areas and their cache mode |
//! | `registration.rs` | the kernel's record of the region's cache mode |
//! | `coherent.rs`, `buffer.rs` | DMA memory, and the file through which programs map it |
//! | `shim.rs`, `shim.c` | C macros and functions that the `kernel` crate lacks |
//! | `compat.rs` | differences between kernel series |
//!
//! [`wire::uapi`] describes the user interface, [`wire::layout`] the layout of the region. Programs
//! compile the same files.

mod areas;
mod binding;
mod buffer;
mod chardev;
mod claims;
mod coherent;
mod compat;
mod device;
mod doorbells;
mod events;
mod file;
mod hardware;
mod interrupts;
mod iomem;
mod irq;
mod lock;
mod mapping;
mod memory;
mod pci;
mod registration;
mod shim;
mod signals;
mod virtio;
mod virtqueue;
mod wait;

#[expect(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "the module is shared with programs, which need more of it, as part of a crate of its own"
)]
#[path = "../protocol/src/wire/mod.rs"]
mod wire;

// The layout counts in pages of 4096 bytes, `mmap` in pages of the machine.
const _: () = assert!(kernel::page::PAGE_SIZE as u64 == wire::layout::PAGE_SIZE);

use kernel::{
    driver,
    prelude::*, //
};

/// The loaded module. Dropping it unregisters both drivers.
#[pin_data]
struct Module {
    #[pin]
    _pci: driver::Registration<kernel::pci::Adapter<pci::Driver>>,
    _virtio: virtio::DriverRegistration,
}

impl kernel::InPlaceModule for Module {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _pci <- driver::Registration::new(<Self as kernel::ModuleMetadata>::NAME, module),
            _virtio: virtio::DriverRegistration::new()?,
        })
    }
}

module! {
    type: Module,
    name: "barlink",
    authors: ["The barlink developers"],
    description: "Memory shared with the host through a PCI BAR",
    license: "Dual MIT/GPL",
}
