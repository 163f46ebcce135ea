// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Channels between a real guest and host apps: streams both ways, killed ends, and guests that are
//! reset or replaced.

use std::fs;
use std::io::Write;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use barlink_agent::Status;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::{COMMAND_TIMEOUT, Config, Vm};
use barlink_vm_tests::{kill, wait_for_end};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::TRANSPORT;
use crate::support::*;

/// Returns the guest's device whose region has this size in bytes.
fn device(vm: &Vm, size: u64) -> Result<String> {
    for number in 0..2 {
        let device = format!("/dev/barlink{number}");
        let info = vm.run(["barlink-guest", "--device", &device, "info", "--json"])?;
        let info: Value = serde_json::from_str(&info.success()?)?;
        if info["region_size"] == size {
            return Ok(device);
        }
    }
    bail!("no device with a region of {size} bytes");
}

/// Counts the context switches of a process. A process that wakes up has one more when it sleeps
/// again.
fn switches(pid: u32) -> Result<u64> {
    let mut count = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
        for line in lines {
            let number = line.split_whitespace().nth(1).context("no number")?;
            count += number.parse::<u64>()?;
        }
    }
    Ok(count)
}

/// Returns the number of the VM's connection.
fn connection(broker: &Broker) -> Result<u64> {
    let vm = &broker.inspect()?["broker"]["slots"][0]["vm"];
    vm["connection"].as_u64().context("no VM")
}

/// Shows that a program in a guest of 256 MiB pays for the memory that it uses, and not for the
/// size of the region: entries of 4 KiB for 16 GiB would take 32 MiB.
#[test]
fn large_region_takes_few_page_tables() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &["--size", "16G"])?;
    let trip = RoundTrip::start(&broker, &vm)?;
    wait_until("the channel has 8 MiB of records behind it", || {
        let channels = broker.inspect()?["channels"].clone();
        let up = channels.as_array().context("no channels")?;
        let up = up.iter().find(|channel| channel["name"] == "up");
        Ok(up.context("no such channel")?["written"].as_u64() >= Some(8 << 20))
    })?;
    let status = "cat /proc/$(pidof barlink-guest)/status";
    let status = vm.run(["sh", "-c", status])?.success()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    let kib: u64 = kib.context("no such figure")?.parse()?;
    println!("page tables of a program with 16 GiB: {kib} KiB");
    ensure!(kib <= 256, "{kib} KiB of page tables");
    trip.finish()
}

#[test]
fn streams_run_in_both_directions_at_once() -> Result<()> {
    let (broker, vm) = start(
        TRANSPORT,
        &["--channel", "down=down,256K", "--channel", "up=up,256K"],
    )?;
    // Lengths around those of a record, a page and the ring.
    for length in [0, 1, 7, 4096, 131_048, 131_049, 262_144, 20_000_003] {
        let echo = vm.spawn(["barlink-guest", "echo"])?;
        let receiver = receive(&broker, "up")?;
        let bytes = noise(length);
        send(&broker, "down", &bytes)?;
        assert!(receiver.bytes()? == bytes, "{length} bytes");
        echo.wait(COMMAND_TIMEOUT)?.require_success()?;
    }
    Ok(())
}

#[test]
fn example_of_a_sensor_sends_lines() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let receiver = receive(&broker, "up")?;
    let sensor = vm.run(["guest_sensor", "/dev/barlink0", "5"])?;
    sensor.require_success()?;
    let lines = String::from_utf8(receiver.bytes()?)?;
    ensure!(lines.lines().count() == 5, "{lines}");
    for line in lines.lines() {
        // `proc(5)`: three averages, counts of processes, the last process ID.
        let average = line.split(' ').next().context("an empty line")?;
        average.parse::<f64>().with_context(|| line.to_owned())?;
    }
    Ok(())
}

#[test]
fn guest_with_few_cpus_uses_available_vectors() -> Result<()> {
    let broker = Broker::start_over(Artifacts::shared()?, &[TRANSPORT], &["--vectors", "256"])?;
    let vm = Vm::boot(&Config {
        cpus: 1,
        ..broker.vm()?
    })?;
    load(&vm)?;
    let info = vm.run(["barlink-guest", "info", "--json"])?.success()?;
    let info: Value = serde_json::from_str(&info)?;
    let vectors = info["vectors"].as_u64().context("no vectors")?;
    // x86 has some 200 interrupt vectors for each CPU. A device over vhost-user uses one of them
    // for all its own vectors.
    let all = TRANSPORT == Transport::VhostUser;
    ensure!(
        (1..=256).contains(&vectors) && (vectors == 256) == all,
        "{vectors} of 256 vectors"
    );
    let receiver = receive(&broker, "up")?;
    let sender = vm.spawn(["barlink-guest", "send"])?;
    sender.write(&noise(1_000_000))?;
    sender.close_stdin()?;
    sender.wait(COMMAND_TIMEOUT)?.require_success()?;
    ensure!(receiver.bytes()? == noise(1_000_000));
    Ok(())
}

#[test]
fn successors_continue_after_killed_ends() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    // The guest's producer is killed in the middle of a stream.
    let producer = vm.spawn(["barlink-guest", "send"])?;
    producer.write(b"half")?;
    let receiver = receive(&broker, "up")?;
    wait_until("the first bytes arrive", || {
        Ok(broker.inspect()?["channels"][0]["records"] == 1)
    })?;
    wait_until("they are released", || {
        Ok(broker.inspect()?["channels"][0]["fill"] == 0)
    })?;
    producer.kill(Signal::KILL)?;
    assert_eq!(receiver.end()?, (Some(5), b"half".to_vec()));
    // The successor of the producer starts a new stream.
    let receiver = receive(&broker, "up")?;
    vm.run(["sh", "-c", "echo whole | barlink-guest send"])?
        .require_success()?;
    assert_eq!(receiver.bytes()?, b"whole\n");

    // The host's producer is killed in the middle of a stream.
    let mut producer = App::start(broker.app(["send"]).stdin(Stdio::piped()))?;
    producer
        .stdin
        .as_mut()
        .context("no input")?
        .write_all(b"half")?;
    let receiver = vm.spawn(["barlink-guest", "recv"])?;
    receiver.wait_for("half", COMMAND_TIMEOUT)?;
    kill(&mut producer)?;
    let ended = receiver.wait(COMMAND_TIMEOUT)?;
    assert_eq!(
        ended.status,
        Status::Code(5),
        "{}",
        String::from_utf8_lossy(&ended.stderr)
    );

    // The host's producer is killed again, and the consumer comes only after that.
    let mut producer = App::start(broker.app(["send"]).stdin(Stdio::piped()))?;
    let mut input = producer.stdin.take().context("no input")?;
    input.write_all(b"half")?;
    wait_until("all is committed", || {
        Ok(broker.inspect()?["channels"][1]["records"] == 2)
    })?;
    kill(&mut producer)?;
    wait_for_holder(&broker, "down", "producer", false)?;
    let ended = vm.run(["barlink-guest", "recv"])?;
    assert_eq!(
        (ended.status, &ended.stdout[..]),
        (Status::Code(5), &b"half"[..])
    );

    // A consumer in the guest is killed. The stream waits for the next consumer.
    let receiver = vm.spawn(["barlink-guest", "recv"])?;
    wait_for_holder(&broker, "down", "consumer", true)?;
    receiver.kill(Signal::KILL)?;
    wait_for_holder(&broker, "down", "consumer", false)?;
    let bytes = noise(3_000_000);
    send(&broker, "down", &bytes)?;
    assert!(vm.run(["barlink-guest", "recv"])?.stdout == bytes);
    Ok(())
}

#[test]
fn idle_stream_uses_no_processor_time() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let receiver = receive(&broker, "up")?;
    let producer = vm.spawn(["barlink-guest", "send"])?;
    let mut count = 0_usize;
    // Once a doorbell has woken the receiver, it sleeps without a limit (docs/protocol.md, 5.5).
    // Before that, a receiver on a busy host may find several records by fallback polls.
    wait_until("the receiver sleeps for two seconds", || {
        count += 1;
        producer.write(b"tick")?;
        wait_until("the record arrives", || {
            let channel = &broker.inspect()?["channels"][0];
            Ok(channel["records"] == count && channel["fill"] == 0)
        })?;
        let before = switches(receiver.app.id())?;
        thread::sleep(Duration::from_secs(2));
        Ok(switches(receiver.app.id())? == before)
    })?;
    producer.close_stdin()?;
    producer.wait(COMMAND_TIMEOUT)?.require_success()?;
    assert_eq!(receiver.bytes()?, b"tick".repeat(count));
    Ok(())
}

#[test]
fn reset_guest_continues_with_new_epoch() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let epoch = |broker: &Broker| -> Result<Value> {
        let guest = &broker.inspect()?["guests"][0];
        Ok(json!({"epoch": guest["epoch"], "present": guest["present"]}))
    };
    assert_eq!(epoch(&broker)?, json!({"epoch": 1, "present": true}));
    sleeping_guest_keeps_its_end(&broker, &vm)?;
    let Some(slept) = broker.inspect()?["guests"][0]["epoch"].as_u64() else {
        bail!("no epoch");
    };
    assert_eq!(slept % 2, 1);
    // These bytes are committed before the reset and received after it.
    send(&broker, "down", b"from before")?;
    vm.run(["sh", "-c", "echo from before | barlink-guest send"])?
        .require_success()?;
    vm.reset()?;
    load(&vm)?;
    assert_eq!(
        epoch(&broker)?,
        json!({"epoch": slept + 2, "present": true})
    );
    assert_eq!(vm.run(["barlink-guest", "recv"])?.success()?, "from before");
    assert_eq!(receive(&broker, "up")?.bytes()?, b"from before\n");
    vm.run(["rmmod", "barlink"])?.require_success()?;
    assert_eq!(
        epoch(&broker)?,
        json!({"epoch": slept + 3, "present": false})
    );
    Ok(())
}

/// Suspends the guest to memory while one of its processes sends. The host cannot reset the
/// channel, whether the guest sleeps or is awake again, because that process still has its mapping.
/// A reset by force ends the process, and repeats no record.
fn sleeping_guest_keeps_its_end(broker: &Broker, vm: &Vm) -> Result<()> {
    let sender = LivingSender::start(broker, vm)?;
    let refused = || {
        let text = sender.keeps_its_end()?;
        ensure!(text.contains("slot 0's VM"), "{text}");
        Ok(())
    };
    vm.suspend_during(refused)?;
    refused()?;
    sender.sends_on()?;
    sender.ends_by_force()?;
    sends_anew(broker, vm)
}

#[test]
fn next_qemu_continues_after_killed_one() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let stream = receive(&broker, "up")?;
    let producer = vm.spawn(["barlink-guest", "send"])?;
    producer.write(b"half")?;
    wait_until("the first bytes are released", || {
        let channel = &broker.inspect()?["channels"][0];
        Ok(channel["records"] == 1 && channel["fill"] == 0)
    })?;
    send(&broker, "down", b"for the next VM")?;
    let before = connection(&broker)?;
    drop(vm);
    assert_eq!(
        stream.end()?.0,
        Some(5),
        "the host app detects that its peer is gone"
    );
    wait_until("the slot is free", || {
        Ok(broker.inspect()?["broker"]["slots"][0]["vm"].is_null())
    })?;
    let vm = guest(&broker)?;
    // Resets increase the number as well where the broker sees them, and a machine begins with a
    // reset.
    ensure!(
        connection(&broker)? > before,
        "the connections have the same number"
    );
    assert_eq!(
        vm.run(["barlink-guest", "recv"])?.success()?,
        "for the next VM"
    );
    let receiver = receive(&broker, "up")?;
    vm.run(["sh", "-c", "echo again | barlink-guest send"])?
        .require_success()?;
    assert_eq!(receiver.bytes()?, b"again\n");
    Ok(())
}

#[test]
fn unbound_device_ends_guest_apps_with_error() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    send(&broker, "down", b"first")?;
    vm.run(["barlink-guest", "recv"])?.require_success()?;
    let tap = vm.spawn(["barlink-guest", "tail", "down", "--latest"])?;
    let line = tap.next_line(COMMAND_TIMEOUT)?;
    ensure!(line.is_some_and(|line| line.trim_end().ends_with(" end 2 0")));
    // The receiver sleeps in a call; the sender mostly writes to the memory.
    let apps = [
        vm.spawn(["barlink-guest", "recv"])?,
        vm.spawn(["barlink-guest", "send", "/dev/zero"])?,
    ];
    let mut receiver = App::start(&mut broker.app(["recv", "-o", "/dev/null"]))?;
    wait_for_holder(&broker, "down", "consumer", true)?;
    wait_for_holder(&broker, "up", "producer", true)?;
    vm.run(["sh", "-c", UNBIND])?.require_success()?;
    for app in apps {
        let ended = app.wait(COMMAND_TIMEOUT)?;
        let errors = String::from_utf8(ended.stderr)?;
        assert_eq!(ended.status, Status::Code(3), "{errors}");
        assert!(errors.contains("the device is gone"), "{errors}");
    }
    // The tap waits for a record. So it notices the removal before it looks into the memory again,
    // and is not ended by a signal.
    let ended = tap.wait(COMMAND_TIMEOUT)?;
    let errors = String::from_utf8(ended.stderr)?;
    assert_eq!(ended.status, Status::Code(3), "{errors}");
    assert!(errors.contains("copying from channel `down`"), "{errors}");
    // The sender left in the middle of a stream.
    assert_eq!(wait_for_end(&mut receiver, "the receiver")?.code(), Some(5));
    wait_for_holder(&broker, "down", "consumer", false)
}

#[test]
fn two_vms_on_one_region_exchange_records() -> Result<()> {
    let channels = [
        "--size",
        "4M",
        "--channel",
        "across=0-1,64K",
        "--channel",
        "back=1-0,64K",
    ];
    let broker = Broker::start_over(Artifacts::shared()?, &[TRANSPORT; 2], &channels)?;
    let config = |slot| -> Result<Config> {
        Ok(Config {
            arguments: broker.arguments(slot)?,
            ..broker.vm()?
        })
    };
    let vms = [guest_with(&config(0)?)?, guest_with(&config(1)?)?];
    let bytes = noise(1_000_000);
    vms[0].put_file("/tmp/file", &bytes)?;
    for (from, to, channel) in [(0, 1, "across"), (1, 0, "back")] {
        let receiver = vms[to].spawn([
            "barlink-guest",
            "recv",
            "--channel",
            channel,
            "-o",
            "/tmp/file",
        ])?;
        let sender =
            vms[from].spawn(["barlink-guest", "send", "--channel", channel, "/tmp/file"])?;
        sender.wait(COMMAND_TIMEOUT)?.require_success()?;
        receiver.wait(COMMAND_TIMEOUT)?.require_success()?;
        assert!(vms[to].get_file("/tmp/file")? == bytes, "{channel}");
    }
    Ok(())
}

#[test]
fn vm_uses_two_devices_independently() -> Result<()> {
    let brokers = [
        Broker::start_over(Artifacts::shared()?, &[TRANSPORT], &["--size", "1M"])?,
        Broker::start(Artifacts::shared()?, &["--size", "2M"])?,
    ];
    let mut config = brokers[0].vm()?;
    let second = brokers[1].arguments_with(0, "second", 99)?;
    config.arguments.extend(second);
    config.paths.push(brokers[1].folder().to_owned());
    let vm = guest_with(&config)?;
    for (index, (broker, size)) in brokers.iter().zip([1 << 20, 2 << 20]).enumerate() {
        let device = device(&vm, size)?;
        let text = format!("device {index}");
        vm.run(["barlink-guest", "--device", &device, "poke", &text])?
            .require_success()?;
        assert_eq!(
            broker.run(["peek", "--raw", "--length", "8"])?,
            text.as_bytes()
        );
        let receiver = receive(broker, "up")?;
        let script = format!("echo {text} | barlink-guest --device {device} send");
        vm.run(["sh", "-c", &script])?.require_success()?;
        assert_eq!(receiver.bytes()?, format!("{text}\n").as_bytes());
    }
    Ok(())
}

#[test]
fn dropping_channel_counts_drops_without_waiting() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &["--channel", "camera=up,64K,drop"])?;
    vm.put_file("/tmp/file", &noise(1 << 20))?;
    let send = [
        "barlink-guest",
        "send",
        "--json",
        "--channel",
        "camera",
        "--record-size",
        "4K",
        "/tmp/file",
    ];
    // The end of the stream is short, so it finds room behind the last record that does.
    let sender = vm.spawn(send)?;
    wait_until("the channel overflows", || {
        Ok(broker.inspect()?["channels"][0]["dropped"].as_u64() > Some(200))
    })?;
    let (code, received) = receive(&broker, "camera")?.end()?;
    assert_eq!(code, Some(6), "the receiver detects the gap");
    let ended = sender.wait(COMMAND_TIMEOUT)?;
    let errors = String::from_utf8(ended.stderr)?;
    assert_eq!(
        ended.status,
        Status::Code(6),
        "the sender says so: {errors}"
    );
    let summary: Value = serde_json::from_str(errors.lines().next().context("no summary")?)?;
    let count = |name: &str| summary[name].as_u64().context("no count");
    assert_eq!(count("records")? + count("dropped")?, 256);
    assert_eq!(received.len() as u64, count("records")? * 4096);
    assert_eq!(
        broker.inspect()?["channels"][0]["dropped"],
        summary["dropped"]
    );
    Ok(())
}

#[test]
fn interrupted_host_app_leaves_the_vm_alone() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    for _ in 0..5 {
        let receiver = receive(&broker, "up")?;
        wait_for_holder(&broker, "up", "consumer", true)?;
        kill_process(Pid::from_child(&receiver.app), Signal::INT)?;
        receiver.end()?;
        wait_for_holder(&broker, "up", "consumer", false)?;
    }
    let receiver = receive(&broker, "up")?;
    vm.run(["sh", "-c", "echo still here | barlink-guest send"])?
        .require_success()?;
    assert_eq!(receiver.bytes()?, b"still here\n");
    Ok(())
}
