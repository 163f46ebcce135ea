// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The removal of a guest's device, and the loss of its region.
//!
//! After a removal an access to the device's mappings is SIGBUS, so a program that has waited looks
//! for the removal before it touches the region again. A device whose VM was taken back to a
//! snapshot is still there, but its mappings have other words than the region's, mostly zeros.

use std::fmt::Debug;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use barlink_protocol::wire::layout::MAGIC;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::time::Timespec;

use crate::event_error::EventError;
use crate::memory::RingRegion;

/// Time between two looks for the loss of the region. Nothing else wakes a program that waits.
pub(crate) const LOOK: Duration = Duration::from_secs(10);

/// Returns whether a device has lost its region: its first word is no longer the magic
/// (`docs/protocol.md`, section 6.22).
pub(crate) fn is_lost(region: &RingRegion) -> bool {
    region.load(0) != MAGIC
}

/// Checks that a device is there and has its region. `is_gone` is whether the device is gone.
pub(crate) fn check(is_gone: bool, region: &RingRegion) -> Result<(), EventError> {
    if is_gone {
        return Err(EventError::Gone);
    }
    match is_lost(region) {
        true => Err(EventError::Lost),
        false => Ok(()),
    }
}

/// Waits until a device is gone, for `timeout` at the most, `None` for no limit. Returns whether it
/// is gone. A signal can end the wait.
pub(crate) fn wait(device: impl AsFd, timeout: Option<Duration>) -> Result<bool, Errno> {
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    // The two events of a device that is gone come without being requested.
    let mut files = [PollFd::new(&device, PollFlags::empty())];
    match rustix::event::poll(&mut files, timeout.as_ref()) {
        Ok(_) => Ok(files[0]
            .revents()
            .intersects(PollFlags::HUP | PollFlags::ERR)),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A device that can go.
pub(crate) trait Removable: Debug + Send + Sync {
    /// Waits until the device is gone, for `timeout` at the most, `None` for no limit. Returns
    /// whether it is gone. A device that has lost its region is not gone. A signal can end the
    /// wait.
    fn wait(&self, timeout: Option<Duration>) -> Result<bool, Errno>;
}

/// The device behind a region, if there is one.
#[derive(Clone, Debug)]
pub struct Removal(Option<Arc<dyn Removable>>);

impl Removal {
    /// A region of a broker, which no process can take away.
    pub(crate) const NEVER: Self = Removal(None);

    /// Returns the removal of a device.
    pub(crate) fn of(device: Arc<dyn Removable>) -> Self {
        Removal(Some(device))
    }

    /// Returns whether the device is gone.
    pub(crate) fn has_come(&self) -> bool {
        let device = self.0.as_ref();
        device.is_some_and(|device| device.wait(Some(Duration::ZERO)).unwrap_or(false))
    }

    /// Returns an error if the device has lost this region. The device must be there.
    pub(crate) fn check_region(&self, region: &RingRegion) -> Result<(), EventError> {
        match self.0.is_some() && is_lost(region) {
            true => Err(EventError::Lost),
            false => Ok(()),
        }
    }

    /// Sleeps for a time, or until the device is gone.
    pub(crate) fn sleep(&self, time: Duration) {
        let slept = self.0.as_ref().map(|device| device.wait(Some(time)));
        if !matches!(slept, Some(Ok(_))) {
            std::thread::sleep(time);
        }
    }
}
