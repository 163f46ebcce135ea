// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A bound device on either bus: created from the resources that the bus driver found.

#![forbid(unsafe_code)]

use crate::{
    chardev::CharDevice,
    device::{
        Device,
        Facts, //
    },
    hardware::{
        DoorbellPath,
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

/// A bound device with its device node. Its fields are dropped in this order.
pub(crate) struct Binding {
    /// The device node. After its removal no process can open the device.
    _chardev: Pin<KBox<CharDevice>>,
    /// Makes open files see that the device is gone, and tells the host.
    _removal: Removal,
}

/// Removes a [`Device`] when dropped.
struct Removal(Arc<Device>);

impl Drop for Removal {
    fn drop(&mut self) {
        self.0.remove();
    }
}

impl Binding {
    /// Announces the driver to the host and creates a device node.
    ///
    /// `region` has the layout `layout`, and `id` is one of its slots. `vectors` are the queues
    /// that the slot's vectors wake, in order; there may be fewer than the layout has. Errors come
    /// from the kernel.
    pub(crate) fn new(
        dev: &device::Device<Bound>,
        region: &DeviceMemory,
        layout: KBox<Layout>,
        id: u32,
        doorbell: DoorbellPath,
        vectors: KVec<Arc<WaitQueue>>,
    ) -> Result<Self> {
        let page = region.map(layout.presence_page(id), PAGE_SIZE as usize)?;
        let hardware = Hardware::arrive(doorbell, page, &layout, region.address);
        let facts = Facts {
            host: layout.host(),
            peer_vectors: layout.vectors,
            region_size: layout.region_size,
            mappable_size: layout.mappable_size(),
            identity: layout.identity,
            id,
            region: region.address,
            pci: shim::pci_address(dev),
        };
        let first_page = region.first_page()?;
        let dma = shim::dma_device(dev);
        let device = Device::new(facts, layout, first_page, hardware, vectors, dma)?;
        let removal = Removal(device);
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
