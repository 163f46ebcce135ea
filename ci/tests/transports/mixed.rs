// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Two VMs of one broker, one over this transport and one over another.

use anyhow::{Context, Result, ensure};
use barlink_agent::Status;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::{COMMAND_TIMEOUT, Config, Process, Vm};

use super::TRANSPORT;
use crate::support::*;

/// Channels of slot 0, which is over this transport, and slot 1, which is over another. The host
/// streams with the VM in slot 1.
const CHANNELS: [&str; 4] = [
    "--channel=across=0-1,64K",
    "--channel=back=1-0,64K",
    "--channel=down=host-1,256K",
    "--channel=up=1-host,256K",
];

fn serve() -> Result<Broker> {
    let other = Transport::ALL.into_iter().find(|other| *other != TRANSPORT);
    let slots = [TRANSPORT, other.context("there is no other")?];
    let broker = Broker::start_over(Artifacts::shared()?, &slots, &CHANNELS)?;
    let status = broker.inspect()?;
    let slots = &status["broker"]["slots"];
    ensure!(slots[0]["transport"] != slots[1]["transport"], "{slots}");
    Ok(broker)
}

/// Restores a VM in a slot, and loads the driver.
fn guest_in(broker: &Broker, slot: usize) -> Result<Vm> {
    guest_with(&Config {
        arguments: broker.arguments(slot)?,
        ..broker.vm()?
    })
}

/// Starts one end of a stream over a channel in a guest; `file` holds the arguments for its file.
fn end(vm: &Vm, what: &str, channel: &str, file: &[&str]) -> Result<Process> {
    let words = ["barlink-guest", what, "--channel", channel];
    vm.spawn(words.into_iter().chain(file.iter().copied()))
}

/// Sends bytes from each VM to the other, both ways at once.
fn exchange(vms: [&Vm; 2]) -> Result<()> {
    let ways = [
        (0, 1, "across", noise(1_000_000)),
        (1, 0, "back", noise(700_000)),
    ];
    let mut ends = Vec::new();
    for (from, to, channel, bytes) in &ways {
        vms[*from].put_file("/tmp/sent", bytes)?;
        ends.push(end(vms[*to], "recv", channel, &["-o", "/tmp/received"])?);
    }
    for (from, _, channel, _) in &ways {
        ends.push(end(vms[*from], "send", channel, &["/tmp/sent"])?);
    }
    for end in ends {
        end.wait(COMMAND_TIMEOUT)?.require_success()?;
    }
    for (_, to, channel, bytes) in &ways {
        ensure!(vms[*to].get_file("/tmp/received")? == *bytes, "{channel}");
    }
    Ok(())
}

#[test]
fn stream_survives_killed_vm_on_other_transport() -> Result<()> {
    let broker = serve()?;
    let victim = guest_in(&broker, 0)?;
    let survivor = guest_in(&broker, 1)?;
    exchange([&victim, &survivor])?;
    // The survivor is in the middle of two streams: one from the victim, and one with the host.
    let sender = end(&victim, "send", "across", &["/dev/zero"])?;
    let receiver = end(&survivor, "recv", "across", &["-o", "/dev/null"])?;
    let records = || -> Result<u64> {
        let records = &broker.inspect()?["channels"][0]["records"];
        records.as_u64().context("no count")
    };
    let before = records()?;
    wait_until("the victim streams", || Ok(records()? > before + 10))?;
    let stream = RoundTrip::start(&broker, &survivor)?;
    ensure!(!sender.has_ended());
    drop(victim);
    wait_until("the slot is free", || {
        Ok(broker.inspect()?["broker"]["slots"][0]["vm"].is_null())
    })?;
    stream.finish()?;
    // A VM is not told that another VM is gone (protocol.md, section 3). It detects that by the
    // stream of the next VM.
    ensure!(!receiver.has_ended(), "it has ended before the next VM");
    let next = guest_in(&broker, 0)?;
    let first = end(&next, "send", "across", &["/bin/busybox"])?;
    let ended = receiver.wait(COMMAND_TIMEOUT)?;
    ensure!(ended.status == Status::Code(5), "{}", ended.status);
    let whole = end(&survivor, "recv", "across", &["-o", "/tmp/received"])?;
    first.wait(COMMAND_TIMEOUT)?.require_success()?;
    whole.wait(COMMAND_TIMEOUT)?.require_success()?;
    let received = survivor.get_file("/tmp/received")?;
    ensure!(received == next.get_file("/bin/busybox")?);
    exchange([&next, &survivor])
}
