// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Senders in a guest whose device is unplugged. QEMU 11.1 ends when a vfio-user device is
//! unplugged (`vfio_user_device_allows_plugging_not_unplugging`), so these tests do not run over
//! vfio-user.

use anyhow::Result;

use super::TRANSPORT;
use crate::support::*;

#[test]
fn unplugged_sender_repeats_no_record() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let sender = LivingSender::start(&broker, &vm)?;
    vm.unplug("barlink0")?;
    sender.ends_with("the device is gone")?;
    // No process of the guest has the region any more, so that no force is needed.
    broker.run(["reset-channel", "up"])?;
    drop(vm);
    sends_anew(&broker, &guest(&broker)?)
}
