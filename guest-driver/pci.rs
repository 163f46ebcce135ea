// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The PCI driver: binds a device, creates its `/dev/barlinkN`, and undoes both at removal.
//!
//! ivshmem has other uses than barlink. Therefore the driver declines a device whose region has no
//! barlink superblock, with the reason in the kernel's log, and another driver can have the device.
//!
//! C header: `include/linux/pci.h`.

use crate::{
    binding::Binding,
    compat,
    hardware::{
        read_layout,
        DoorbellPath, //
    },
    irq::Handlers,
    memory::DeviceMemory,
    wire::{
        layout::PAGE_SIZE,
        uapi, //
    },
};
use kernel::{
    bindings,
    device::{
        Bound,
        Core, //
    },
    dma::{
        Device as _,
        DmaMask, //
    },
    pci,
    prelude::*, //
};

const VENDOR: pci::Vendor = pci::Vendor::REDHAT_QUMRANET;
const _: () = assert!(VENDOR.as_raw() == uapi::PCI_VENDOR);

compat::device_table!(
    DEVICES,
    [pci::DeviceId::from_id(VENDOR, uapi::PCI_DEVICE as u32)]
);

/// The PCI driver.
pub(crate) struct Driver;

/// The resources of a bound device. The fields are dropped in this order, so that each resource
/// outlives its users.
pub(crate) struct PciResources<'bound> {
    /// The device node and the state of open files. After its end no process uses the device.
    _binding: Binding,
    /// The interrupt handlers. No interrupt arrives after their end.
    _handlers: Handlers<'bound>,
    _bars: [DeviceMemory; 2],
    _enabled: Enabled<'bound>,
}

impl pci::Driver for Driver {
    type IdInfo = ();
    type Data<'bound> = PciResources<'bound>;

    const ID_TABLE: pci::IdTable<Self::IdInfo> = &DEVICES;

    fn probe<'bound>(
        pdev: &'bound pci::Device<Core<'_>>,
        _info: compat::IdInfo<'bound>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        let enabled = Enabled::new(pdev)?;
        let registers_bar = bar(pdev, uapi::BAR_REGISTERS, uapi::REGISTERS_SIZE as u64)?;
        let region_bar = bar(pdev, uapi::BAR_REGION, PAGE_SIZE)?;
        let registers = registers_bar.map(0, uapi::REGISTERS_SIZE)?;

        // The ID of an unplugged device reads as all ones, which `read_layout` rejects.
        let id = registers.read32(uapi::REGISTER_ID);
        let layout = read_layout(pdev.as_ref(), &region_bar, id)?;
        let handlers = Handlers::enable(pdev, layout.vectors)?;
        let binding = Binding::new(
            pdev.as_ref(),
            &region_bar,
            layout,
            id,
            DoorbellPath::Register(registers),
            handlers.queues()?,
        )?;
        Ok(PciResources {
            _binding: binding,
            _handlers: handlers,
            _bars: [registers_bar, region_bar],
            _enabled: enabled,
        })
    }
}

/// Returns the C structure of a PCI device.
pub(crate) fn raw(pdev: &pci::Device<Bound>) -> *mut bindings::pci_dev {
    // `pci::Device` is a transparent wrapper of an `Opaque<pci_dev>`.
    core::ptr::from_ref(pdev).cast_mut().cast()
}

/// Requests a BAR of at least `least` bytes.
///
/// `ENODEV` if the BAR is smaller or missing, `EBUSY` if another driver uses it.
fn bar(pdev: &pci::Device<Bound>, index: u32, least: u64) -> Result<DeviceMemory> {
    let size = pdev.resource_len(index)?;
    if size < least {
        return Err(ENODEV);
    }
    DeviceMemory::request(pdev.resource_start(index)?, size)
}

/// A device whose memory access and bus mastering are enabled. Without bus mastering it could not
/// send MSI-X interrupts.
struct Enabled<'bound>(&'bound pci::Device<Bound>);

impl<'bound> Enabled<'bound> {
    /// Enables a device. Errors come from the PCI core.
    fn new(pdev: &'bound pci::Device<Core<'_>>) -> Result<Self> {
        pdev.enable_device_mem()?;
        // SAFETY: Nothing allocates or maps DMA memory for the device before it is probed.
        unsafe { pdev.dma_set_mask_and_coherent(DmaMask::new::<64>())? };
        pdev.set_master();
        Ok(Enabled(pdev))
    }
}

impl Drop for Enabled<'_> {
    fn drop(&mut self) {
        // SAFETY: The device is bound, and therefore valid. This undoes `enable_device_mem` once.
        unsafe { bindings::pci_disable_device(raw(self.0)) }
    }
}
