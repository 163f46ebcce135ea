// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Stock QEMU as a client of the broker: the broker admits or rejects it, and QEMU never hangs.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::tools::Qemu as Program;
use barlink_vm::broker::Broker;
use barlink_vm::{Config, FREE_PORT, Vm};
use barlink_vm_tests::{LIMIT, kill, wait_for_end, wait_until};
use serde_json::{Value, json};

/// A QEMU with the broker's device. It stops before the guest's first instruction, and dropping it
/// kills it.
struct Qemu {
    child: Child,
    errors: File,
}

impl Qemu {
    fn start(broker: &Broker, arguments: &[String]) -> Result<Self> {
        let mut command = match &Artifacts::shared()?.tools.qemu {
            Program::Sandboxed(sandbox) => sandbox
                .enter()
                .bind(broker.folder(), broker.folder())
                .run("qemu-system-x86_64"),
            Program::Own(path) => Command::new(path),
        };
        command
            .args(["-nodefaults", "-machine", "q35", "-accel", "tcg"])
            .args(["-display", "none", "-S"])
            .args(arguments);
        let errors = tempfile::tempfile()?;
        command.stdin(Stdio::null()).stderr(errors.try_clone()?);
        let child = command.spawn()?;
        Ok(Self { child, errors })
    }

    /// Reads all that QEMU has written to its standard error so far.
    fn errors(&self) -> Result<String> {
        let mut bytes = vec![0; usize::try_from(self.errors.metadata()?.len())?];
        self.errors.read_exact_at(&mut bytes, 0)?;
        Ok(String::from_utf8(bytes)?)
    }

    /// Waits until QEMU has failed with exit code 1, and returns its error text.
    fn fails(mut self) -> Result<String> {
        let status = wait_for_end(&mut self.child, "QEMU")?;
        ensure!(status.code() == Some(1), "QEMU ended with {status}");
        self.errors()
    }

    fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    fn kill(mut self) -> Result<()> {
        kill(&mut self.child)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // QEMU may have ended already.
        let _ = kill(&mut self.child);
    }
}

fn vm_of(broker: &Broker) -> Result<Value> {
    Ok(broker.inspect()?["broker"]["slots"][0]["vm"].clone())
}

/// Waits until the slot has a VM (`there`), or has none.
fn wait_for_vm(broker: &Broker, there: bool) -> Result<()> {
    let what = match there {
        true => "the slot has a VM",
        false => "the slot has no VM any more",
    };
    wait_until(what, || Ok(vm_of(broker)?.is_null() != there))
}

/// Connects to the taken slot, and waits until the broker has rejected the connection. By then the
/// broker has rejected all earlier connections, because it accepts one after the other.
fn wait_for_rejection(broker: &Broker) -> Result<()> {
    let mut socket = UnixStream::connect(broker.socket(0))?;
    socket.set_read_timeout(Some(LIMIT))?;
    let mut version = [0; 8];
    let read = socket.read_exact(&mut version);
    read.context("the broker does not answer a second VM")?;
    ensure!(i64::from_le_bytes(version) == 1, "the slot is not taken");
    Ok(())
}

#[test]
fn rejected_qemu_ends_with_error() -> Result<()> {
    let broker = Broker::start(Artifacts::shared()?, &[])?;
    let arguments = broker.arguments(0)?;
    let mut first = Qemu::start(&broker, &arguments)?;
    wait_for_vm(&broker, true)?;
    for _ in 0..3 {
        let text = Qemu::start(&broker, &arguments)?.fails()?;
        assert!(
            text.contains("server sent version 1, expecting 0"),
            "{text}"
        );
    }
    assert!(first.is_running()?, "the first QEMU is disturbed");
    assert_eq!(vm_of(&broker)?["connection"], 1);
    first.kill()?;
    wait_for_vm(&broker, false)
}

#[test]
fn rejected_hot_plug_fails_alone() -> Result<()> {
    let broker = Broker::start(Artifacts::shared()?, &[])?;
    let first = Qemu::start(&broker, &broker.arguments(0)?)?;
    wait_for_vm(&broker, true)?;
    let vm = Vm::restore(&Config {
        arguments: Vec::new(),
        ..broker.vm()?
    })?;
    vm.qmp("chardev-add", &chardev(&broker))?;
    // QEMU creates the device later. The broker must not have closed the rejected connection by
    // then.
    wait_for_rejection(&broker)?;
    let device = json!({
        "driver": "ivshmem-doorbell", "id": "late", "bus": FREE_PORT, "chardev": "late-socket", "vectors": 3,
    });
    let error = vm.plug(&device).expect_err("the slot is taken");
    ensure!(
        format!("{error:#}").contains("server sent version 1"),
        "{error:#}"
    );
    vm.run(["true"])?.require_success()?;
    // A new connection succeeds once the slot is free.
    first.kill()?;
    // QEMU itself ends some time after the sandbox in which it runs.
    wait_for_vm(&broker, false)?;
    vm.qmp("chardev-remove", &json!({ "id": "late-socket" }))?;
    vm.qmp("chardev-add", &chardev(&broker))?;
    vm.plug(&device)?;
    wait_for_vm(&broker, true)
}

/// Returns the arguments of `chardev-add` for a connection to the broker.
fn chardev(broker: &Broker) -> Value {
    let address = json!({ "type": "unix", "data": { "path": broker.socket(0) } });
    let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
    json!({ "id": "late-socket", "backend": backend })
}

#[test]
fn broker_survives_qemu_with_few_vectors() -> Result<()> {
    let broker = Broker::start(Artifacts::shared()?, &["--vectors", "8"])?;
    let fewer: Vec<_> = broker
        .arguments(0)?
        .iter()
        .map(|word| word.replace("vectors=8", "vectors=2"))
        .collect();
    // QEMU reports the surplus eventfds as errors and goes on. The broker and the next VM must not
    // suffer.
    let first = Qemu::start(&broker, &fewer)?;
    wait_until("QEMU complains", || Ok(first.errors()?.contains("eventfd")))?;
    wait_for_vm(&broker, true)?;
    first.kill()?;
    wait_for_vm(&broker, false)?;
    let second = Qemu::start(&broker, &broker.arguments(0)?)?;
    wait_for_vm(&broker, true)?;
    second.kill()
}

#[test]
fn slot_serves_one_qemu_after_another() -> Result<()> {
    let broker = Broker::start(Artifacts::shared()?, &[])?;
    let arguments = broker.arguments(0)?;
    for round in 1..=5 {
        let qemu = Qemu::start(&broker, &arguments)?;
        wait_for_vm(&broker, true)?;
        assert_eq!(vm_of(&broker)?["connection"], round);
        qemu.kill()?;
        wait_for_vm(&broker, false)?;
    }
    Ok(())
}

#[test]
fn qemu_args_put_regions_above_4_gib() -> Result<()> {
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
