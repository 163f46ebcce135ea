// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Senders in a guest that live while the PCI function of their device is reset. The host receives
//! no record again, and the error of a sender that ends names the cause. `channels.rs` shows the
//! same for a suspend, and `unplugged.rs` for a device that is unplugged.

use anyhow::{Result, ensure};
use barlink_vm::broker::Transport;

use super::TRANSPORT;
use crate::support::*;

/// A shell command that resets the PCI function of the first device. It prints a command that binds
/// the device to the driver anew.
const RESET_FUNCTION: &str = "\
cd -P /sys/class/misc/barlink0/device && name=${PWD##*/} && \
echo \"cd $(readlink -f driver) && echo $name >unbind && echo $name >bind\" && \
if [ ! -e reset ]; then cd ..; fi && \
echo 1 >reset";

#[test]
fn function_reset_repeats_no_record() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let sender = LivingSender::start(&broker, &vm)?;
    let rebind = vm.run(["sh", "-c", RESET_FUNCTION])?.success()?;
    if TRANSPORT == Transport::VhostUser {
        // Region and queues go with the reset. The driver has taken the mappings away before, so
        // that no force is needed.
        sender.ends_with("the device is gone")?;
        broker.run(["reset-channel", "up"])?;
    } else {
        sender.keeps_its_end()?;
        sender.sends_on()?;
        sender.ends_by_force()?;
    }
    vm.run(["sh", "-c", rebind.trim_end()])?.require_success()?;
    sends_anew(&broker, &vm)?;
    let log = vm.run(["dmesg"])?.success()?;
    ensure!(!log.contains("Call Trace"), "{log}");
    Ok(())
}
