// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What differs between the kernel series that the driver builds for, in one place.
//!
//! `Kbuild` sets `linux_7_2` for the older one. Where the two series' abstractions differ in more than a
//! name (interrupts, memory-mapped registers), the driver calls the C functions beneath them, which do not.

#![forbid(unsafe_code)]

use kernel::bindings;

/// What `pci::Driver::probe` gets of the device table's entry; the driver has nothing to say in it.
#[cfg(linux_7_2)]
pub(crate) type IdInfo<'a> = &'a ();
/// What `pci::Driver::probe` gets of the device table's entry; the driver has nothing to say in it.
#[cfg(not(linux_7_2))]
pub(crate) type IdInfo<'a> = Option<&'a ()>;

/// Makes a device table of entries without data, with the aliases that modprobe goes by.
#[cfg(linux_7_2)]
macro_rules! device_table {
    ($table:ident, [$($id:expr),*]) => {
        kernel::pci_device_table!($table, MODULE_TABLE, (), [$(($id, ())),*]);
    };
}
/// Makes a device table of entries without data, with the aliases that modprobe goes by.
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
