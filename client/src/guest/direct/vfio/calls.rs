// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The calls of VFIO (`include/uapi/linux/vfio.h`). The crate `vfio-ioctls` has them as well, but
//! knows no device without an IOMMU, and takes a kernel that has too few vectors for success.
#![expect(unsafe_code, reason = "calls VFIO")]

use std::ffi::{CStr, c_void};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_TYPE,
    vfio_group_status, vfio_irq_info, vfio_irq_set, vfio_region_info,
};

/// Numbers of the calls, from `VFIO_BASE` on. The bindings lack them, because they are macros in C.
const GET_API_VERSION: u32 = 0;
const CHECK_EXTENSION: u32 = 1;
const SET_IOMMU: u32 = 2;
const GROUP_GET_STATUS: u32 = 3;
const GROUP_SET_CONTAINER: u32 = 4;
const GROUP_GET_DEVICE_FD: u32 = 6;
const DEVICE_GET_REGION_INFO: u32 = 8;
const DEVICE_GET_IRQ_INFO: u32 = 9;
const DEVICE_SET_IRQS: u32 = 10;

/// A call, whose result is a number of the kernel's, such as that of a descriptor.
struct Call {
    number: u32,
    argument: *mut c_void,
}

// SAFETY: the call has this number and argument, and its result is a number.
unsafe impl Ioctl for Call {
    type Output = i32;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::none(VFIO_TYPE, (VFIO_BASE + self.number) as u8)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> Result<i32, Errno> {
        Ok(output)
    }
}

/// Makes a call whose argument is a number.
fn with_number(file: impl AsFd, number: u32, argument: u32) -> Result<i32, Errno> {
    let argument = std::ptr::without_provenance_mut(argument as usize);
    // SAFETY: the calls that are made this way take no pointer.
    unsafe { ioctl(file, Call { number, argument }) }
}

/// Makes a call that reads and writes a value.
///
/// # Safety
///
/// The call takes a pointer to a `T`, uses no more than that, and leaves a valid `T`.
unsafe fn with_value<T>(file: impl AsFd, number: u32, value: &mut T) -> Result<i32, Errno> {
    let argument = std::ptr::from_mut(value).cast();
    // SAFETY: the caller guarantees it.
    unsafe { ioctl(file, Call { number, argument }) }
}

/// Returns the version of VFIO.
pub(super) fn version(container: impl AsFd) -> Result<i32, Errno> {
    with_number(container, GET_API_VERSION, 0)
}

/// Returns whether the kernel has a kind of IOMMU.
pub(super) fn has_iommu(container: impl AsFd, kind: u32) -> Result<bool, Errno> {
    Ok(with_number(container, CHECK_EXTENSION, kind)? != 0)
}

/// Chooses the kind of IOMMU of a container, which has a group.
pub(super) fn set_iommu(container: impl AsFd, kind: u32) -> Result<(), Errno> {
    with_number(container, SET_IOMMU, kind).map(drop)
}

/// Returns the flags of a group.
pub(super) fn group_flags(group: impl AsFd) -> Result<u32, Errno> {
    let mut status = vfio_group_status {
        argsz: size_of::<vfio_group_status>() as u32,
        ..vfio_group_status::default()
    };
    // SAFETY: the call fills a `vfio_group_status`, which any bits are valid for.
    unsafe { with_value(group, GROUP_GET_STATUS, &mut status) }?;
    Ok(status.flags)
}

/// Puts a group into a container.
pub(super) fn set_container(group: impl AsFd, container: impl AsFd) -> Result<(), Errno> {
    let mut descriptor = container.as_fd().as_raw_fd();
    // SAFETY: the call reads the number of a descriptor.
    unsafe { with_value(group, GROUP_SET_CONTAINER, &mut descriptor) }.map(drop)
}

/// Opens a device of a group by its name, its address.
pub(super) fn open_device(group: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let call = Call {
        number: GROUP_GET_DEVICE_FD,
        argument: name.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the call reads a text that ends with zero.
    let descriptor = unsafe { ioctl(group, call) }?;
    // SAFETY: the result of the call is a new descriptor, which nothing else has.
    let device = unsafe { OwnedFd::from_raw_fd(descriptor) };
    // The kernel sets it already since VFIO is there, but promises nothing.
    rustix::io::fcntl_setfd(&device, rustix::io::FdFlags::CLOEXEC)?;
    Ok(device)
}

/// Returns size, flags, and offset in the device's file of a region of the device.
pub(super) fn region(device: impl AsFd, index: u32) -> Result<vfio_region_info, Errno> {
    let mut info = vfio_region_info {
        argsz: size_of::<vfio_region_info>() as u32,
        index,
        ..vfio_region_info::default()
    };
    // SAFETY: the call fills a `vfio_region_info`, which any bits are valid for, and nothing behind
    // it, as `argsz` says.
    unsafe { with_value(device, DEVICE_GET_REGION_INFO, &mut info) }?;
    Ok(info)
}

/// Returns how many interrupts of a kind the device has.
pub(super) fn interrupts(device: impl AsFd, index: u32) -> Result<u32, Errno> {
    let mut info = vfio_irq_info {
        argsz: size_of::<vfio_irq_info>() as u32,
        index,
        ..vfio_irq_info::default()
    };
    // SAFETY: the call fills a `vfio_irq_info`, which any bits are valid for.
    unsafe { with_value(device, DEVICE_GET_IRQ_INFO, &mut info) }?;
    Ok(info.count)
}

/// Makes the kernel write an eventfd at each interrupt of a kind, the first one for the first
/// interrupt and so on. Returns the number of interrupts that the kernel has if that is fewer. It
/// then writes none.
pub(super) fn set_eventfds(
    device: impl AsFd,
    index: u32,
    eventfds: &[OwnedFd],
) -> Result<Option<usize>, Errno> {
    let (size, count) = (size_of::<vfio_irq_set>(), eventfds.len());
    let mut words = vec![
        (size + size_of::<i32>() * count) as u32,
        VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
        index,
        0,
        count as u32,
    ];
    debug_assert_eq!(size_of_val(&words[..]), size);
    let descriptors = eventfds.iter().map(|eventfd| eventfd.as_raw_fd());
    words.extend(descriptors.map(i32::cast_unsigned));
    let call = Call {
        number: DEVICE_SET_IRQS,
        argument: words.as_mut_ptr().cast(),
    };
    // SAFETY: the call reads a `vfio_irq_set` with as many numbers of descriptors behind it, which
    // the words are.
    let fewer = unsafe { ioctl(device, call) }?;
    Ok(usize::try_from(fewer).ok().filter(|fewer| *fewer > 0))
}
