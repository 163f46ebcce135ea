// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The host's connection to a broker, and the guest's device.

use std::ffi::{c_char, c_int};
use std::os::fd::AsRawFd;
use std::path::Path;

use barlink::guest::{self, Device};
use barlink::host::{AttachOptions, Attachment};
use barlink::{Access, Error, Layout, Receiver, Sender, Tap};
use barlink_protocol::cursor::Capacity;

use crate::arguments::{bytes, place, text};
use crate::failure::{Code, Failure, guard};
use crate::handles::Handles;

/// A connection of a host program to a broker, or a device in a guest. Any number of threads can
/// make ends and taps of it at a time; one thread closes it, and none uses it meanwhile or later.
#[derive(Debug)]
pub struct SideHandle {
    _private: [u8; 0],
}

/// Access for reading only, for `barlink_connect` and `barlink_open`.
pub const BARLINK_READ_ONLY: u32 = 1;

/// A channel of a region.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct PlainChannel {
    /// The name, which ends with a 0.
    pub name: [c_char; 32],
    /// The peer that sends: the number of the VM's slot, or `host`.
    pub sender: u32,
    /// The peer that receives, or UINT32_MAX if the channel overwrites and has taps alone.
    pub receiver: u32,
    /// The number of the host, which is behind those of all slots.
    pub host: u32,
    /// Most bytes of a record.
    pub max_record: u32,
    /// Bytes of the data area.
    pub capacity: u64,
}

pub(crate) enum Side {
    Host(Box<Attachment>),
    Guest(Box<Device>),
}

static SIDES: Handles<Side> = Handles::new(1, "connection or device");

impl Side {
    pub(crate) fn sender(&self, name: &str) -> Result<Sender, Error> {
        match self {
            Side::Host(host) => host.sender(name),
            Side::Guest(guest) => guest.sender(name),
        }
    }

    pub(crate) fn receiver(&self, name: &str) -> Result<Receiver, Error> {
        match self {
            Side::Host(host) => host.receiver(name),
            Side::Guest(guest) => guest.receiver(name),
        }
    }

    pub(crate) fn tap(&self, name: &str) -> Result<Tap, Error> {
        match self {
            Side::Host(host) => host.tap(name),
            Side::Guest(guest) => guest.tap(name),
        }
    }

    fn layout(&self) -> &Layout {
        match self {
            Side::Host(host) => host.layout(),
            Side::Guest(guest) => guest.layout(),
        }
    }
}

/// Returns the value of a handle.
///
/// # Safety
///
/// No other thread closes the handle during `'a`.
pub(crate) unsafe fn side<'a>(handle: *mut SideHandle) -> Result<&'a Side, Failure> {
    // SAFETY: the caller's; all uses share the value.
    unsafe { SIDES.share(handle) }
}

fn access(flags: u32) -> Result<Access, Failure> {
    match flags {
        0 => Ok(Access::ReadWrite),
        BARLINK_READ_ONLY => Ok(Access::ReadOnly),
        _ => Err(Failure::invalid(format!("there are no flags {flags:#x}"))),
    }
}

/// Connects a program of the host to the broker of this name, or to the one at this control socket
/// if the text has a `/`. NULL stands for the broker `default`. `flags` is 0 or
/// `BARLINK_READ_ONLY`, which taps need. Stores a handle, which `barlink_close` closes.
///
/// # Safety
///
/// `name` is NULL or ends with a 0; `out` has room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_connect(
    name: *const c_char,
    flags: u32,
    out: *mut *mut SideHandle,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let out = unsafe { place(out) }?;
        let options = AttachOptions::new().access(access(flags)?);
        let name = if name.is_null() {
            c"default".as_ptr()
        } else {
            name
        };
        // SAFETY: the caller's.
        let path = Path::new(unsafe { bytes(name, "the name of the broker") }?);
        let attachment = match path.as_os_str().as_encoded_bytes().contains(&b'/') {
            true => options.connect_path(path)?,
            // SAFETY: the caller's.
            false => options.connect(unsafe { text(name, "the name of the broker") }?)?,
        };
        *out = SIDES.insert(Side::Host(Box::new(attachment)))?;
        Ok(())
    })
}

/// Opens a device in a guest: the node of the driver such as `/dev/barlink0`, which NULL stands
/// for, or the broker's name, or `sysfs:0000:01:00.0` or `vfio:0000:01:00.0` without the driver.
/// `flags` is 0 or `BARLINK_READ_ONLY`. Stores a handle, which `barlink_close` closes.
///
/// # Safety
///
/// `device` is NULL or ends with a 0; `out` has room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_open(
    device: *const c_char,
    flags: u32,
    out: *mut *mut SideHandle,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let out = unsafe { place(out) }?;
        let options = guest::OpenOptions::new().access(access(flags)?);
        let device = match device.is_null() {
            true => Path::new("/dev/barlink0"),
            // SAFETY: the caller's.
            false => Path::new(unsafe { bytes(device, "the name of the device") }?),
        };
        *out = SIDES.insert(Side::Guest(Box::new(options.open(device)?)))?;
        Ok(())
    })
}

/// Closes a connection or a device. Ends and taps that were made of it go on.
///
/// # Safety
///
/// No other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_close(side: *mut SideHandle) -> Code {
    // SAFETY: the caller's.
    guard(|| unsafe { SIDES.remove(side) }.map(drop))
}

/// Stores the number of channels.
///
/// # Safety
///
/// `count` has room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_channel_count(side: *mut SideHandle, count: *mut usize) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (side, count) = unsafe { (self::side(side)?, place(count)?) };
        *count = side.layout().channels().len();
        Ok(())
    })
}

/// Describes the channel with this number, from 0 on.
///
/// # Safety
///
/// `channel` has room for a description.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_channel_at(
    side: *mut SideHandle,
    number: usize,
    channel: *mut PlainChannel,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (side, channel) = unsafe { (self::side(side)?, place(channel)?) };
        let layout = side.layout();
        let entry = layout.channels().get(number);
        let entry = entry.ok_or_else(|| {
            let count = layout.channels().len();
            Failure::invalid(format!(
                "there is no channel {number}: the region has {count}"
            ))
        })?;
        let mut name = [0; 32];
        // The last byte stays 0.
        for (to, from) in name.iter_mut().take(31).zip(entry.name.to_string().bytes()) {
            *to = c_char::from_ne_bytes([from]);
        }
        *channel = PlainChannel {
            name,
            sender: entry.producer,
            receiver: entry.consumer,
            host: layout.host(),
            max_record: Capacity::of(entry).max_record(),
            capacity: entry.capacity,
        };
        Ok(())
    })
}

/// Stores a descriptor that is readable or hung up once the broker has ended or the device is gone.
/// It belongs to the handle: do not close it.
///
/// # Safety
///
/// `descriptor` has room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_descriptor(side: *mut SideHandle, descriptor: *mut c_int) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (side, descriptor) = unsafe { (self::side(side)?, place(descriptor)?) };
        *descriptor = match side {
            Side::Host(host) => host.as_raw_fd(),
            Side::Guest(guest) => guest.as_raw_fd(),
        };
        Ok(())
    })
}
