// SPDX-License-Identifier: GPL-2.0 OR MIT

//! barlink's guest driver: gives the processes of a VM a PCI device that is made of memory shared with the
//! host.
//!
//! The device is ivshmem's (1af4:1110), with a barlink region behind BAR2. The driver maps parts of that
//! region into processes, hands them the device's interrupts, rings the host for them, and keeps the book
//! of who holds which end of which channel. It looks at no channel and copies no data: all of that is
//! between the process and the host.
//!
//! | file | its one job |
//! |---|---|
//! | `driver.rs` | binds a PCI device and lets go of it, in the right order |
//! | `bar.rs`, `iomem.rs` | BARs, and the few bytes of them that the driver itself reads and writes |
//! | `hardware.rs` | the device's registers and the driver's page of the region |
//! | `irq.rs` | MSI-X vectors |
//! | `wait.rs` | the kernel's wait queues |
//! | `events.rs` | which open file hears of which vector |
//! | `claims.rs` | who holds which end of which channel |
//! | `device.rs` | what outlives the binding: the state that open files and the driver share |
//! | `chardev.rs`, `file.rs` | `/dev/barlinkN`, and what can be done with it once it is open |
//! | `mapping.rs` | `mmap`, and taking it back |
//! | `shim.rs`, `shim.c` | C macros and functions that the `kernel` crate does not carry |
//! | `compat.rs` | what differs between kernel series |
//!
//! The user interface is [`wire::uapi`], the region's layout [`wire::layout`]; programs compile the same
//! files.

mod bar;
mod chardev;
mod claims;
mod compat;
mod device;
mod driver;
mod events;
mod file;
mod hardware;
mod iomem;
mod irq;
mod mapping;
mod shim;
mod wait;

#[expect(
    dead_code,
    unreachable_pub,
    reason = "the module is shared with programs, which need more of it, as part of a crate of its own"
)]
#[path = "../protocol/src/wire/mod.rs"]
mod wire;

// The region's layout counts in pages of 4096 bytes, and `mmap` counts in those of the machine.
const _: () = assert!(kernel::page::PAGE_SIZE as u64 == wire::layout::PAGE_SIZE);

kernel::module_pci_driver! {
    type: driver::Driver,
    name: "barlink",
    authors: ["The barlink developers"],
    description: "Memory shared with the host through a PCI BAR",
    license: "Dual MIT/GPL",
}
