// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The PCI driver: takes a device, makes a `/dev/barlinkN` of it, and gives all of it back.
//!
//! ivshmem is used for other things than barlink, too. So a device whose region bears no barlink superblock
//! is declined, with one line in the log that says why; another driver can have it.

#![forbid(unsafe_code)]

use crate::{
    bar::{
        address,
        Bar,
        Enabled, //
    },
    chardev::CharDevice,
    compat,
    device::{
        Device,
        Facts, //
    },
    hardware::{
        read_layout,
        Hardware,
        Registers, //
    },
    irq::Handlers,
    wire::{
        layout::PAGE_SIZE,
        uapi, //
    },
};
use kernel::{
    device::Core,
    pci,
    prelude::*,
    sync::Arc, //
};

const VENDOR: pci::Vendor = pci::Vendor::REDHAT_QUMRANET;
const _: () = assert!(VENDOR.as_raw() == uapi::PCI_VENDOR);

compat::device_table!(
    DEVICES,
    [pci::DeviceId::from_id(VENDOR, uapi::PCI_DEVICE as u32)]
);

/// The driver.
pub(crate) struct Driver;

/// A bound device. Its fields are dropped in this order, each while what it needs is still there.
pub(crate) struct Binding<'bound> {
    /// No file is opened any more.
    _chardev: Pin<KBox<CharDevice>>,
    /// Those that are open find the device gone, and the host is told.
    _removal: Removal,
    /// No interrupt comes any more.
    _handlers: Handlers<'bound>,
    _bars: [Bar<'bound>; 2],
    _enabled: Enabled<'bound>,
}

/// Ends a [`Device`] when dropped.
struct Removal(Arc<Device>);

impl Drop for Removal {
    fn drop(&mut self) {
        self.0.remove();
    }
}

impl pci::Driver for Driver {
    type IdInfo = ();
    type Data<'bound> = Binding<'bound>;

    const ID_TABLE: pci::IdTable<Self::IdInfo> = &DEVICES;

    fn probe<'bound>(
        pdev: &'bound pci::Device<Core<'_>>,
        _info: compat::IdInfo<'bound>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        let enabled = Enabled::new(pdev)?;
        let registers_bar = Bar::request(pdev, uapi::BAR_REGISTERS, uapi::REGISTERS_SIZE as u64)?;
        let region_bar = Bar::request(pdev, uapi::BAR_REGION, PAGE_SIZE)?;

        let layout = read_layout(pdev, &region_bar)?;
        let registers = Registers::map(&registers_bar)?;
        let id = registers.id();
        if id >= layout.slots {
            dev_info!(
                pdev,
                "declined: its ID is {}, of {} slots\n",
                id,
                layout.slots
            );
            return Err(ENODEV);
        }

        let handlers = Handlers::enable(pdev, layout.vectors)?;
        let page = region_bar.map(layout.presence_page(id), PAGE_SIZE as usize)?;
        let hardware = Hardware::arrive(registers, page, &layout);
        let facts = Facts {
            layout,
            id,
            region: region_bar.address,
            pci: address(pdev),
        };
        let removal = Removal(Device::new(facts, hardware, handlers.queues()?)?);
        let chardev = CharDevice::register(pdev, removal.0.clone())?;

        let info = removal.0.info()?;
        dev_info!(
            pdev,
            "{}: region of {} bytes, slot {}, {} vectors, epoch {}\n",
            chardev.name(),
            info.region_size,
            info.id,
            info.vectors,
            info.epoch
        );
        Ok(Binding {
            _chardev: chardev,
            _removal: removal,
            _handlers: handlers,
            _bars: [registers_bar, region_bar],
            _enabled: enabled,
        })
    }
}
