// SPDX-License-Identifier: GPL-2.0 OR MIT

//! barlink's guest driver: gives the processes of a VM a device that is made of memory shared with the host.
//!
//! The device is on the PCI bus, and ivshmem's (1af4:1110), with a barlink region behind BAR2; or it is on the virtio
//! bus, with the region as its shared memory. Programs cannot tell the two apart. The driver maps parts of the
//! region into processes, hands them the device's interrupts, rings the host for them, and keeps the book
//! of who holds which end of which channel. It looks at no channel and copies no data: all of that is
//! between the process and the host.
//!
//! | file | its one job |
//! |---|---|
//! | `pci.rs` | binds a PCI device and lets go of it, in the right order |
//! | `irq.rs` | its MSI-X vectors |
//! | `virtio.rs` | binds a virtio device and lets go of it, likewise |
//! | `virtqueue.rs` | a virtqueue of short messages |
//! | `doorbells.rs`, `interrupts.rs` | what a virtio device has queues for |
//! | `binding.rs` | what is the same on both buses |
//! | `memory.rs`, `iomem.rs` | device memory, and the few bytes of it that the driver itself reads and writes |
//! | `hardware.rs` | the superblock, the doorbell and the driver's page of the region |
//! | `wait.rs`, `lock.rs` | the kernel's wait queues and spinlocks |
//! | `events.rs` | which open file hears of which vector |
//! | `signals.rs` | which eventfds of user space are written for which vector |
//! | `claims.rs` | who holds which end of which channel |
//! | `device.rs` | what outlives the binding: the state that open files and the driver share |
//! | `chardev.rs`, `file.rs` | `/dev/barlinkN`, and what can be done with it once it is open |
//! | `mapping.rs` | `mmap`, and taking it back |
//! | `areas.rs` | what is mapped, and in which cache mode |
//! | `coherent.rs`, `buffer.rs` | memory that the device can reach, and the file that a program maps it with |
//! | `shim.rs`, `shim.c` | C macros and functions that the `kernel` crate does not carry |
//! | `compat.rs` | what differs between kernel series |
//!
//! The user interface is [`wire::uapi`], the region's layout [`wire::layout`]; programs compile the same
//! files.

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

// The region's layout counts in pages of 4096 bytes, and `mmap` counts in those of the machine.
const _: () = assert!(kernel::page::PAGE_SIZE as u64 == wire::layout::PAGE_SIZE);

use kernel::{
    driver,
    prelude::*, //
};

/// The module, until it is unloaded.
#[pin_data]
struct Module {
    #[pin]
    _pci: driver::Registration<kernel::pci::Adapter<pci::Driver>>,
    _virtio: virtio::Registration,
}

impl kernel::InPlaceModule for Module {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _pci <- driver::Registration::new(<Self as kernel::ModuleMetadata>::NAME, module),
            _virtio: virtio::Registration::new()?,
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
