// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Channels that are added while a VM and host apps use the region.

use anyhow::{Result, ensure};
use barlink_vm::COMMAND_TIMEOUT;
use serde_json::Value;

use super::TRANSPORT;
use crate::support::*;

/// Channels of the usual names, and room for one more of 64 KiB.
const ARGUMENTS: [&str; 4] = [
    "--size=1M",
    "--channel=up=up,128K",
    "--channel=down=down,128K",
    "--reserve=68K,1",
];

#[test]
fn added_channel_carries_stream_beside_others() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &ARGUMENTS)?;
    let stream = RoundTrip::start(&broker, &vm)?;
    broker.run(["channel", "add", "extra=0-host,64K"])?;
    // The driver takes the channel when a program asks for it.
    let bytes = noise(1_000_000);
    vm.put_file("/tmp/sent", &bytes)?;
    let receiver = receive(&broker, "extra")?;
    let sender = vm.spawn(["barlink-guest", "send", "--channel", "extra", "/tmp/sent"])?;
    ensure!(receiver.bytes()? == bytes);
    sender.wait(COMMAND_TIMEOUT)?.require_success()?;
    stream.finish()?;
    let info = vm.run(["barlink-guest", "info", "--json"])?.success()?;
    let info: Value = serde_json::from_str(&info)?;
    ensure!(info["channels"][2]["name"] == "extra", "{info}");
    // The new channel has a vector of its own, by which its ends wake.
    let list: Value = serde_json::from_slice(&broker.run(["channel", "list", "--json"])?)?;
    ensure!(
        list["channels"][2]["vector"] == 3 && list["room"] == 0,
        "{list}"
    );
    ensure!(broker.run(["channel", "add", "more=up,4K"]).is_err());
    let unknown = vm.run(["barlink-guest", "send", "--channel", "more", "/tmp/sent"])?;
    ensure!(unknown.require_success().is_err());

    // A driver that is bound anew finds it, too.
    vm.run(["rmmod", "barlink"])?.require_success()?;
    load(&vm)?;
    let receiver = receive(&broker, "extra")?;
    let sender = vm.spawn(["barlink-guest", "send", "--channel", "extra", "/tmp/sent"])?;
    ensure!(receiver.bytes()? == bytes);
    sender.wait(COMMAND_TIMEOUT)?.require_success()
}
