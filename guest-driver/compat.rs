// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The differences between the kernel series that the driver supports.
//!
//! `Kbuild` sets `linux_7_2` for 7.2. Where the two series differ in more than a name (interrupts,
//! memory-mapped registers), the driver calls the underlying C functions, which are the same in
//! both.

#![forbid(unsafe_code)]

use kernel::bindings;

/// Argument of `pci::Driver::probe`: the data of the device table's entry, which this driver leaves
/// empty.
#[cfg(linux_7_2)]
pub(crate) type IdInfo<'a> = &'a ();
/// Argument of `pci::Driver::probe`: the data of the device table's entry, which this driver leaves
/// empty.
#[cfg(not(linux_7_2))]
pub(crate) type IdInfo<'a> = Option<&'a ()>;

/// Defines a device table of entries without data, and the module aliases that modprobe uses.
#[cfg(linux_7_2)]
macro_rules! device_table {
    ($table:ident, [$($id:expr),*]) => {
        kernel::pci_device_table!($table, MODULE_TABLE, (), [$(($id, ())),*]);
    };
}
/// Defines a device table of entries without data, and the module aliases that modprobe uses.
#[cfg(not(linux_7_2))]
macro_rules! device_table {
    ($table:ident, [$($id:expr),*]) => {
        kernel::pci_device_table!($table, (), [$(($id, ())),*]);
    };
}
pub(crate) use device_table;

/// `THIS_MODULE` (`include/linux/init.h`).
#[cfg(linux_7_2)]
pub(crate) const THIS_MODULE: *mut bindings::module = crate::THIS_MODULE.as_ptr();
/// `THIS_MODULE` (`include/linux/init.h`).
#[cfg(not(linux_7_2))]
pub(crate) const THIS_MODULE: *mut bindings::module =
    <crate::LocalModule as kernel::ModuleMetadata>::THIS_MODULE.as_ptr();

/// `IRQ_HANDLED` (`include/linux/irqreturn.h`).
#[cfg(linux_7_2)]
pub(crate) const IRQ_HANDLED: bindings::irqreturn_t = bindings::irqreturn_IRQ_HANDLED;
/// `IRQ_HANDLED` (`include/linux/irqreturn.h`).
#[cfg(not(linux_7_2))]
pub(crate) const IRQ_HANDLED: bindings::irqreturn_t = bindings::irqreturn::IRQ_HANDLED;
