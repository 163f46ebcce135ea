// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What a driver takes from the PCI core before it can use a device: the device enabled, and its BARs.
//!
//! Each is a value that gives back what it took when dropped. C header: `include/linux/pci.h`.

use crate::{
    iomem::IoMem,
    shim, //
};
use kernel::{
    bindings,
    device::{
        Bound,
        Core, //
    },
    error::to_result,
    io::PhysAddr,
    pci,
    prelude::*, //
};

/// The C side of a PCI device.
pub(crate) fn raw(pdev: &pci::Device<Bound>) -> *mut bindings::pci_dev {
    // `pci::Device` is a transparent wrapper of an `Opaque<pci_dev>`.
    core::ptr::from_ref(pdev).cast_mut().cast()
}

/// A device's PCI address, as in [`crate::wire::uapi::Info`].
pub(crate) fn address(pdev: &pci::Device<Bound>) -> u32 {
    // SAFETY: The device is valid, being bound.
    unsafe { shim::barlink_pci_address(raw(pdev)) }
}

/// A device with memory access and bus mastering (without which it sends no MSI-X) switched on.
pub(crate) struct Enabled<'bound>(&'bound pci::Device<Bound>);

impl<'bound> Enabled<'bound> {
    /// Enables a device; the error is the PCI core's.
    pub(crate) fn new(pdev: &'bound pci::Device<Core<'_>>) -> Result<Self> {
        pdev.enable_device_mem()?;
        pdev.set_master();
        Ok(Enabled(pdev))
    }
}

impl Drop for Enabled<'_> {
    fn drop(&mut self) {
        // SAFETY: The device is valid, being bound, and this undoes `enable_device_mem`, once.
        unsafe { bindings::pci_disable_device(raw(self.0)) }
    }
}

/// A memory BAR that this driver alone uses (`/proc/iomem` shows it).
pub(crate) struct Bar<'bound> {
    pdev: &'bound pci::Device<Bound>,
    index: c_int,
    /// Guest-physical address.
    pub(crate) address: PhysAddr,
    /// Bytes.
    pub(crate) size: u64,
}

impl<'bound> Bar<'bound> {
    /// Requests a BAR of at least `least` bytes.
    ///
    /// `ENODEV` if it is smaller or missing, `EBUSY` if somebody uses it.
    pub(crate) fn request(
        pdev: &'bound pci::Device<Bound>,
        index: u32,
        least: u64,
    ) -> Result<Self> {
        let address = pdev.resource_start(index)?;
        let size = pdev.resource_len(index)?;
        if address == 0 || size < least {
            return Err(ENODEV);
        }
        let index = c_int::try_from(index)?;
        // SAFETY: The device is valid, the index was checked by `resource_start`, and the name is static.
        to_result(unsafe {
            bindings::pci_request_region(raw(pdev), index, c"barlink".as_char_ptr())
        })?;
        Ok(Bar {
            pdev,
            index,
            address,
            size,
        })
    }

    /// Maps `size` bytes from `offset`, both multiples of 8, into the kernel.
    ///
    /// `EINVAL` if that is not inside of the BAR, `ENOMEM`. The mapping must end before the BAR is given
    /// back.
    pub(crate) fn map(&self, offset: u64, size: usize) -> Result<IoMem> {
        let end = offset.checked_add(size as u64).ok_or(EINVAL)?;
        if end > self.size || (offset | end) % 8 != 0 {
            return Err(EINVAL);
        }
        // SAFETY: The range is part of a memory BAR. BARs are aligned to their size, so that the range is
        // 8-aligned.
        unsafe { IoMem::map(self.address + offset, size) }
    }
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        // SAFETY: The device is valid, being bound, and the BAR was requested by `request`, once.
        unsafe { bindings::pci_release_region(raw(self.pdev), self.index) }
    }
}
