// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A broker that is killed and started again, or replaced, while a VM and host apps stream.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use barlink_sandbox::builds::Artifacts;
use barlink_vm::broker::Broker;
use barlink_vm::{COMMAND_TIMEOUT, Vm};
use barlink_vm_tests::{kill, lengthen_timeout};
use rustix::process::Signal;
use serde_json::Value;

use super::TRANSPORT;
use crate::support::*;

/// Changes the broker five times while bytes go down to the guest and come back. Records arrive
/// between two changes.
fn stream_through(
    broker: &mut Broker,
    vm: &Vm,
    change: fn(&mut Broker) -> Result<()>,
) -> Result<()> {
    let stream = RoundTrip::start(broker, vm)?;
    let before = status(broker)?;
    for _ in 0..5 {
        let records = records(broker)?;
        wait_until("the stream goes on", || {
            Ok(self::records(broker)? > records + 3)
        })?;
        change(broker)?;
    }
    let after = status(broker)?;
    for part in ["slots", "claims"] {
        ensure!(
            before[part] == after[part],
            "{part} changed: {before} and {after}"
        );
    }
    stream.finish()?;
    // A program that attaches now finds the region as it was.
    ensure!(!vm_of(broker)?.is_null());
    vm.run(["barlink-guest", "poke", "written before"])?
        .require_success()?;
    let read = broker.run(["peek", "--length", "14", "--raw"])?;
    ensure!(read == b"written before");
    Ok(())
}

#[test]
fn killed_broker_loses_no_record() -> Result<()> {
    let mut broker = Broker::start_managed(Artifacts::shared()?, TRANSPORT, &[])?;
    let vm = guest(&broker)?;
    stream_through(&mut broker, &vm, |broker| {
        let before = kept(broker)?;
        broker.kill()?;
        broker.start_again()?;
        // A thread of the broker writes its log, and the next kill could come before that.
        wait_until("the broker logs that the VM is still here", || {
            Ok(kept(broker)? > before)
        })
    })?;
    // The slot belongs to this VM until it leaves, and is then free for another VM.
    drop(vm);
    wait_until("the slot is free", || Ok(vm_of(&broker)?.is_null()))?;
    guest(&broker)?;
    Ok(())
}

#[test]
fn replaced_broker_loses_no_record() -> Result<()> {
    let mut broker = Broker::start_over(Artifacts::shared()?, &[TRANSPORT], &[])?;
    // On a busy host a replacement can take longer than QEMU waits by default.
    let mut config = broker.vm()?;
    lengthen_timeout(&mut config);
    let vm = guest_with(&config)?;
    stream_through(&mut broker, &vm, Broker::replace)
}

#[test]
fn restarted_broker_removes_departed_vm_and_app() -> Result<()> {
    let mut broker = Broker::start_managed(Artifacts::shared()?, TRANSPORT, &[])?;
    let vm = guest(&broker)?;
    let mut app = receive(&broker, "up")?;
    wait_for_holder(&broker, "up", "consumer", true)?;
    let process = format!("/proc/{}", vm_of(&broker)?["pid"]);
    ensure!(Path::new(&process).exists(), "no {process}");
    broker.kill()?;
    drop(vm);
    ensure!(!Path::new(&process).exists(), "QEMU outlives its VM");
    kill(&mut app.app)?;
    broker.start_again()?;
    wait_for_holder(&broker, "up", "consumer", false)?;
    ensure!(vm_of(&broker)?.is_null(), "the VM is not gone");
    let vm = guest(&broker)?;
    // The end and the slot can be taken again, and the new consumer receives the new VM's stream.
    let receiver = receive(&broker, "up")?;
    let sender = vm.spawn(["barlink-guest", "send"])?;
    sender.write(b"again")?;
    sender.close_stdin()?;
    sender.wait(COMMAND_TIMEOUT)?.require_success()?;
    ensure!(receiver.bytes()? == b"again");
    Ok(())
}

#[test]
fn service_manager_stores_only_current_clients() -> Result<()> {
    let broker = Broker::start_managed(Artifacts::shared()?, TRANSPORT, &[])?;
    let manager = broker.manager().context("no manager")?;
    // A thread of the manager takes the broker's messages, those about `inspect` included.
    let has_client = |stored: &[String]| stored.iter().any(|name| name.starts_with("client-"));
    let mut before = Vec::new();
    wait_until("no host app is stored", || {
        before = manager.stored();
        Ok(!has_client(&before))
    })?;
    ensure!(before.contains(&"memory".to_owned()), "{before:?}");
    let mut app = receive(&broker, "up")?.app;
    wait_for_holder(&broker, "up", "consumer", true)?;
    wait_until("the host app is stored", || {
        Ok(has_client(&manager.stored()))
    })?;
    kill(&mut app)?;
    for _ in 0..10 {
        broker.inspect()?;
    }
    wait_until("the same is stored as before", || {
        Ok(manager.stored() == before)
    })
}

/// Counts the brokers so far that have logged that they found their VM.
fn kept(broker: &Broker) -> Result<usize> {
    Ok(broker.log()?.matches("is still here").count())
}

/// Over vfio-user no doorbell reaches the other end from then on, so both ends poll.
#[test]
fn stream_with_guest_outlives_stopped_broker() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let receiver = receive(&broker, "up")?;
    let producer = vm.spawn(["barlink-guest", "send"])?;
    wait_for_holder(&broker, "up", "producer", true)?;
    wait_for_holder(&broker, "up", "consumer", true)?;
    producer.write(&noise(1000))?;
    wait_until("the stream has begun", || Ok(records(&broker)? > 0))?;
    broker.signal(Signal::TERM)?;
    wait_until("the broker has ended", || Ok(!broker.control().exists()))?;
    for part in noise(1_000_000)[1000..].chunks(333_000) {
        producer.write(part)?;
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    producer.close_stdin()?;
    producer.wait(COMMAND_TIMEOUT)?.require_success()?;
    ensure!(receiver.bytes()? == noise(1_000_000));
    vm.run(["true"])?.require_success()
}

/// Returns the number of records that the guest has sent to the host.
fn records(broker: &Broker) -> Result<u64> {
    let snapshot = broker.inspect()?;
    let channels = snapshot["channels"].as_array().context("no channels")?;
    let up = channels.iter().find(|channel| channel["name"] == "up");
    let records = up.and_then(|up| up["records"].as_u64());
    records.context("no count")
}

/// Returns the slots and claims as the broker itself reports them.
fn status(broker: &Broker) -> Result<Value> {
    let status = broker.inspect()?["broker"].clone();
    ensure!(status["slots"].is_array() && status["claims"].is_array());
    Ok(status)
}

fn vm_of(broker: &Broker) -> Result<Value> {
    Ok(status(broker)?["slots"][0]["vm"].clone())
}
