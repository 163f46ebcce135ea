// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A bound device, whatever bus it is on: made from what the bus found, and ended in the right order.

#![forbid(unsafe_code)]

use crate::{
    chardev::CharDevice,
    device::{
        Device,
        Facts, //
    },
    hardware::{
        Bell,
        Hardware, //
    },
    memory::DeviceMemory,
    shim,
    wait::WaitQueue,
    wire::layout::{
        Layout,
        PAGE_SIZE, //
    },
};
use kernel::{
    device::{
        self,
        Bound, //
    },
    prelude::*,
    sync::Arc, //
};

/// A device that the guest's processes have, until dropped. Its fields are dropped in this order.
pub(crate) struct Binding {
    /// No file is opened any more.
    _chardev: Pin<KBox<CharDevice>>,
    /// Those that are open find the device gone, and the host is told.
    _removal: Removal,
}

/// Ends a [`Device`] when dropped.
struct Removal(Arc<Device>);

impl Drop for Removal {
    fn drop(&mut self) {
        self.0.remove();
    }
}

impl Binding {
    /// Tells the host of the driver, and makes a device node.
    ///
    /// `region` has this layout, `id` is one of its slots, and `vectors` are the queues that the slot's vectors wake, in order;
    /// there can be fewer than the layout has. The error is the kernel's.
    pub(crate) fn new(
        dev: &device::Device<Bound>,
        region: &DeviceMemory,
        layout: KBox<Layout>,
        id: u32,
        bell: Bell,
        vectors: KVec<Arc<WaitQueue>>,
    ) -> Result<Self> {
        let page = region.map(layout.presence_page(id), PAGE_SIZE as usize)?;
        let hardware = Hardware::arrive(bell, page, &layout, region.address);
        let facts = Facts {
            layout,
            id,
            region: region.address,
            pci: shim::pci_address(dev),
        };
        let removal = Removal(Device::new(facts, hardware, vectors, shim::dma_device(dev))?);
        let chardev = CharDevice::register(dev, removal.0.clone())?;

        let info = removal.0.info()?;
        dev_info!(
            dev,
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
        })
    }
}
