//! What stock QEMU does with the broker: it is let in, or turned away, and never wedged.

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::tools::Qemu;
use barlink_vm::broker::Broker;
use barlink_vm::{Config, FREE_PORT, Vm};
use serde_json::{Value, json};

/// Far longer than QEMU needs to start or to fail.
const PATIENCE: Duration = Duration::from_secs(30);

/// A QEMU with the broker's device, and no guest: it stops before the first instruction.
fn qemu(broker: &Broker, arguments: &[String]) -> Result<Child> {
    let mut command = match &Artifacts::shared()?.tools.qemu {
        Qemu::Sandboxed(sandbox) => sandbox
            .enter()
            .bind(broker.folder(), broker.folder())
            .run("qemu-system-x86_64"),
        Qemu::Own(path) => Command::new(path),
    };
    command
        .args([
            "-nodefaults",
            "-machine",
            "q35",
            "-accel",
            "tcg",
            "-display",
            "none",
            "-S",
        ])
        .args(arguments);
    Ok(command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?)
}

/// Waits for a QEMU that must fail: what it wrote.
fn fails(mut qemu: Child) -> Result<String> {
    let start = Instant::now();
    while qemu.try_wait()?.is_none() {
        if start.elapsed() > PATIENCE {
            qemu.kill()?;
            anyhow::bail!("QEMU hangs");
        }
        thread::sleep(Duration::from_millis(20));
    }
    let output = qemu.wait_with_output()?;
    ensure!(
        output.status.code() == Some(1),
        "QEMU ended with {}",
        output.status
    );
    Ok(String::from_utf8(output.stderr)?)
}

fn vm_of(broker: &Broker) -> Result<Value> {
    Ok(broker.inspect()?["broker"]["slots"][0]["vm"].clone())
}

fn wait_for_vm(broker: &Broker, there: bool) -> Result<()> {
    let start = Instant::now();
    while vm_of(broker)?.is_null() == there {
        ensure!(start.elapsed() < PATIENCE, "the slot stays as it is");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn qemu_that_is_refused_ends_with_an_error() -> Result<()> {
    let broker = Broker::start(Artifacts::shared()?, &[])?;
    let arguments = broker.arguments(0)?;
    let mut first = qemu(&broker, &arguments)?;
    wait_for_vm(&broker, true)?;
    for _ in 0..3 {
        let text = fails(qemu(&broker, &arguments)?)?;
        assert!(
            text.contains("server sent version 1, expecting 0"),
            "{text}"
        );
    }
    assert!(first.try_wait()?.is_none(), "the first QEMU is disturbed");
    assert_eq!(vm_of(&broker)?["connection"], 1);
    first.kill()?;
    first.wait()?;
    wait_for_vm(&broker, false)
}

#[test]
fn hot_plug_that_is_refused_fails_alone() -> Result<()> {
    let broker = Broker::start(Artifacts::shared()?, &[])?;
    let mut first = qemu(&broker, &broker.arguments(0)?)?;
    wait_for_vm(&broker, true)?;
    let vm = Vm::restore(&Config {
        arguments: Vec::new(),
        ..broker.vm()?
    })?;
    vm.qmp("chardev-add", &chardev(&broker))?;
    // QEMU makes the device some time later: what it was told must still be there.
    thread::sleep(Duration::from_millis(300));
    let device = json!({
        "driver": "ivshmem-doorbell", "id": "late", "bus": FREE_PORT, "chardev": "late-socket", "vectors": 3,
    });
    let error = vm.plug(&device).expect_err("the slot is taken");
    ensure!(
        format!("{error:#}").contains("server sent version 1"),
        "{error:#}"
    );
    vm.run(["true"])?.require_success()?;
    // With another connection it goes once there is room.
    first.kill()?;
    first.wait()?;
    // QEMU itself ends some time after what it runs in.
    wait_for_vm(&broker, false)?;
    vm.qmp("chardev-remove", &json!({ "id": "late-socket" }))?;
    vm.qmp("chardev-add", &chardev(&broker))?;
    vm.plug(&device)?;
    wait_for_vm(&broker, true)
}

/// A connection to the broker, as `chardev-add` takes it.
fn chardev(broker: &Broker) -> Value {
    let address = json!({ "type": "unix", "data": { "path": broker.socket(0) } });
    let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
    json!({ "id": "late-socket", "backend": backend })
}

#[test]
fn qemu_with_too_few_vectors_fails_alone() -> Result<()> {
    let broker = Broker::start(Artifacts::shared()?, &["--vectors", "8"])?;
    let fewer: Vec<_> = broker
        .arguments(0)?
        .iter()
        .map(|word| word.replace("vectors=8", "vectors=2"))
        .collect();
    // QEMU says so and goes on without the rest; what counts is that the broker, and the next VM, do not suffer.
    let mut first = qemu(&broker, &fewer)?;
    thread::sleep(Duration::from_secs(1));
    first.kill()?;
    first.wait()?;
    wait_for_vm(&broker, false)?;
    let mut second = qemu(&broker, &broker.arguments(0)?)?;
    wait_for_vm(&broker, true)?;
    second.kill()?;
    second.wait()?;
    Ok(())
}

#[test]
fn qemu_comes_and_goes_without_a_trace() -> Result<()> {
    let broker = Broker::start(Artifacts::shared()?, &[])?;
    let arguments = broker.arguments(0)?;
    for round in 1..=5 {
        let mut qemu = qemu(&broker, &arguments)?;
        wait_for_vm(&broker, true)?;
        assert_eq!(vm_of(&broker)?["connection"], round);
        qemu.kill()?;
        qemu.wait()?;
        wait_for_vm(&broker, false)?;
    }
    Ok(())
}

#[test]
fn arguments_put_the_region_above_4_gib_whatever_its_size() -> Result<()> {
    let sizes = ["1M", "64M", "1G"];
    let mut config = Config::default();
    let mut brokers = Vec::new();
    for (index, size) in sizes.iter().enumerate() {
        let broker = Broker::start(Artifacts::shared()?, &["--size", size])?;
        let arguments = broker.arguments_with(0, &format!("device{index}"), 64 + index)?;
        config.arguments.extend(arguments);
        config.paths.push(broker.folder().to_owned());
        brokers.push(broker);
    }
    let vm = Vm::boot(&config)?;
    vm.run(["insmod", "/lib/barlink.ko"])?.require_success()?;
    for (index, size) in sizes.iter().enumerate() {
        let device = format!("/dev/barlink{index}");
        let info = vm.run(["barlink-guest", "--device", &device, "info", "--json"])?;
        let info: Value = serde_json::from_str(&info.success()?)?;
        let address = info["region_address"].as_u64().context("no address")?;
        assert!(address >= 4 << 30, "{size} at {address:#x}");
        assert_eq!(info["cache_mode"], "uncached-minus");
    }
    Ok(())
}
