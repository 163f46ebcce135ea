// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device over vhost-user on stock QEMU, without a kernel: the test's own driver shows how QEMU
//! presents the device, and the events that end QEMU. QEMU itself executes the driver's accesses,
//! or the bare guest under KVM.

mod driver;
#[path = "../executors.rs"]
mod executors;

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use barlink_protocol::wire::virtio::MAGIC;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::tap::Tap;
use barlink_vm::{Bare, Config, Executor, FREE_PORT, Iommu, Vm};
use barlink_vm_tests::wait_until;
use rustix::process::Signal;
use serde_json::json;

use self::driver::Driver;
use self::executors::{EACH, QTEST, Test};

const TESTS: &[Test] = &[
    test!(EACH, region_appears_after_each_driver_start),
    test!(EACH, queues_carry_doorbells_and_interrupts),
    test!(QTEST, broker_sees_machine_reset_but_no_pause),
    test!(EACH, rejected_vhost_user_qemu_ends_immediately),
    test!(EACH, vm_outlives_broker_until_device_access),
    test!(EACH, vm_without_driver_ends_with_broker),
    test!(EACH, qemu_without_shared_memory_has_no_region),
    test!(EACH, broker_rejects_plain_file_as_memory),
    test!(EACH, qemu_rejects_iommu_platform_option),
    test!(EACH, qemu_refuses_to_migrate),
    test!(QTEST, device_reset_during_mapping_ends_qemu),
    test!(QTEST, vhost_user_device_plugs_in_and_out),
];

fn main() -> ExitCode {
    executors::run("vhost_user", TESTS)
}

/// A broker with slot 0 over vhost-user and slot 1 over ivshmem, from which the test takes its tap.
struct Setting {
    executor: Executor,
    broker: Broker,
    tap: Tap,
}

/// The host's ID as a peer.
const HOST: u32 = 2;
const VECTORS: u32 = 5;

impl Setting {
    fn new(executor: Executor, size: &str) -> Result<Self> {
        let slots = [Transport::VhostUser, Transport::Ivshmem];
        let broker = Broker::start_over(Artifacts::shared()?, &slots, &["--size", size])?;
        let tap = Tap::before_the_vm(&broker, 1, HOST, VECTORS)?;
        Ok(Self {
            executor,
            broker,
            tap,
        })
    }

    fn config(&self) -> Result<Config> {
        Ok(Config {
            memory_mib: 128,
            arguments: self.broker.arguments(0)?,
            paths: vec![self.broker.folder().to_owned()],
            shared_memory: true,
            ..Config::default()
        })
    }

    fn start(&self, config: &Config) -> Result<Bare> {
        Bare::start_by(self.executor, Artifacts::shared()?, config)
    }

    fn machine(&self) -> Result<(Bare, Driver)> {
        let mut machine = self.start(&self.config()?)?;
        let device = machine.device("barlink0")?;
        let driver = Driver::find(&mut machine, device)?;
        Ok((machine, driver))
    }

    fn connection(&self) -> Result<u64> {
        let vm = &self.broker.inspect()?["broker"]["slots"][0]["vm"];
        vm["connection"].as_u64().context("no VM")
    }
}

/// Waits until QEMU has handled all that the broker sent before: QEMU serves all its sockets
/// between two answers.
fn pass_main_loop(machine: &Bare) -> Result<()> {
    for _ in 0..3 {
        machine.qmp("query-status", &json!({}))?;
    }
    Ok(())
}

/// Waits until the broker has answered a read of the device's configuration, and QEMU has handled
/// all that the broker sent before. While the device is stopped, the broker takes this read for a
/// reset of the device.
fn pass_broker(machine: &mut Bare, driver: &Driver) -> Result<()> {
    machine.read(driver.config.address)?;
    pass_main_loop(machine)
}

fn region_appears_after_each_driver_start(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "64M")?;
    let (mut machine, mut driver) = setting.machine()?;
    assert_eq!(machine.read(driver.device.config)?, 0x1046_1af4);
    assert_eq!((driver.region_id, driver.region.length), (0, 64 << 20));
    let config = driver.config.address;
    let mut words = Vec::new();
    for place in (0..64).step_by(4) {
        words.push(machine.read(config + place)?);
    }
    let (vectors, connection) = (VECTORS, setting.connection()? as u32);
    let expected = [MAGIC, 1, 0, 3, vectors, 1, connection, 0, 64 << 20, 0, 0];
    assert_eq!(words[..11], expected);
    for round in 1..=3 {
        driver.prepare(&mut machine)?;
        // If the broker's request to map the region came even later, QEMU would report that it
        // overlaps with the second request.
        pass_broker(&mut machine, &driver)?;
        assert_eq!(driver.first_word(&mut machine)?, 0, "too early");
        driver.start(&mut machine)?;
        driver.wait_until_mapped(&mut machine)?;
        // The superblock holds the offset of the raw window at byte 40.
        let window = u64::from(machine.read(driver.region.address + 40)?);
        machine.write(driver.region.address + window, 0x1234_0000 + round)?;
        let seen = setting.broker.run(["peek", "--raw", "--length", "4"])?;
        assert_eq!(seen, (0x1234_0000 + round).to_le_bytes());
        driver.reset(&mut machine)?;
        assert_eq!(driver.first_word(&mut machine)?, 0, "mapped still");
    }
    assert_eq!(machine.errors()?, "");
    Ok(())
}

fn queues_carry_doorbells_and_interrupts(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    let (mut machine, mut driver) = setting.machine()?;
    driver.prepare(&mut machine)?;
    driver.start(&mut machine)?;
    driver.wait_until_mapped(&mut machine)?;
    setting.tap.all_rings()?;
    for (count, (peer, vector)) in (1..).zip([(HOST, 3), (1, 2), (HOST, 0)]) {
        driver.put(&mut machine, 0, peer << 16 | vector, false)?;
        wait_until("the doorbell is returned", || {
            Ok(driver.returned(&mut machine, 0)?.len() == count)
        })?;
        assert_eq!(setting.tap.all_rings()?, [(peer, vector, 1)]);
    }
    for (count, vector) in (1..).zip(0..VECTORS) {
        driver.put(&mut machine, 1, u32::MAX, true)?;
        setting.tap.ring(0, vector, 1)?;
        wait_until("the interrupt comes", || {
            Ok(driver.returned(&mut machine, 1)?.len() == count)
        })?;
        let last = driver.returned(&mut machine, 1)?.pop();
        assert_eq!(last, Some((4, vector)));
        wait_until("the device asserts its interrupt", || {
            driver.interrupted(&mut machine)
        })?;
    }
    assert_eq!(machine.errors()?, "");
    Ok(())
}

fn broker_sees_machine_reset_but_no_pause(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    let (mut machine, mut driver) = setting.machine()?;
    driver.prepare(&mut machine)?;
    driver.start(&mut machine)?;
    driver.wait_until_mapped(&mut machine)?;
    let before = setting.connection()?;
    // Before the first doorbell the broker cannot tell a pause from a reset, and requests the
    // mapping again. QEMU refuses the request with an error message, and goes on.
    for (count, complaint) in [(1, "mapping overlap"), (2, ""), (3, "")] {
        let complaints = machine.errors()?.len();
        // QEMU answers once the broker has stopped its queues.
        machine.qmp("stop", &json!({}))?;
        pass_main_loop(&machine)?;
        assert_eq!(driver.first_word(&mut machine)?, MAGIC, "unmapped");
        machine.qmp("cont", &json!({}))?;
        // The broker handles the start of its queues before their buffers.
        driver.put(&mut machine, 0, HOST << 16, false)?;
        wait_until("the doorbell is returned", || {
            Ok(driver.returned(&mut machine, 0)?.len() == count)
        })?;
        pass_main_loop(&machine)?;
        assert_eq!(driver.first_word(&mut machine)?, MAGIC);
        let complaints = machine.errors()?.split_off(complaints);
        assert!(complaints.contains(complaint), "{complaints}");
        assert_eq!(complaints.is_empty(), complaint.is_empty(), "{complaints}");
    }
    assert_eq!(setting.connection()?, before);
    machine.wait_for_firmware(1)?;
    machine.qmp("system_reset", &json!({}))?;
    machine.wait_for_firmware(2)?;
    let device = machine.device("barlink0")?;
    let mut driver = Driver::find(&mut machine, device)?;
    assert_eq!(driver.first_word(&mut machine)?, 0, "mapped still");
    driver.prepare(&mut machine)?;
    let seen = machine.read(driver.config.address + 24)?;
    assert_eq!(u64::from(seen), before + 1);
    assert_eq!(setting.connection()?, before + 1);
    driver.start(&mut machine)?;
    driver.wait_until_mapped(&mut machine)?;
    Ok(())
}

fn rejected_vhost_user_qemu_ends_immediately(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    let (first, _) = setting.machine()?;
    let refused = setting.start(&setting.config()?);
    let error = format!("{:#}", refused.expect_err("the slot is taken"));
    assert!(error.contains("vhost_backend_init failed"), "{error}");
    ensure!(first.qmp("query-status", &json!({}))?["running"] == true);
    // A new connection succeeds once the slot is free.
    drop(first);
    wait_until("the slot is free", || {
        Ok(setting.broker.inspect()?["broker"]["slots"][0]["vm"].is_null())
    })?;
    setting.machine()?;
    Ok(())
}

/// Shows a limit that `docs/transports.md` warns users of.
fn vm_outlives_broker_until_device_access(executor: Executor) -> Result<()> {
    let mut setting = Setting::new(executor, "1M")?;
    let (mut machine, mut driver) = setting.machine()?;
    driver.prepare(&mut machine)?;
    driver.start(&mut machine)?;
    driver.wait_until_mapped(&mut machine)?;
    setting.broker.kill()?;
    pass_main_loop(&machine)?;
    let region = driver.region.address;
    machine.write(region + 4096, 0x600d_600d)?;
    assert_eq!(machine.read(region + 4096)?, 0x600d_600d);
    machine.qmp("query-status", &json!({}))?;
    // Until QEMU has noticed the end of the connection, it only reports that it cannot read.
    wait_until("QEMU ends", || {
        Ok(machine.read(driver.config.address).is_err())
    })?;
    let status = machine.end()?;
    assert!(!status.success());
    let errors = machine.errors()?;
    assert!(
        errors.contains("vhost_dev_get_config: Assertion"),
        "{errors}"
    );
    Ok(())
}

/// Shows a limit that `docs/transports.md` warns users of. QEMU removes eventfds that it has not
/// added, and fails an assertion.
fn vm_without_driver_ends_with_broker(executor: Executor) -> Result<()> {
    for signal in [Signal::INT, Signal::KILL] {
        let setting = Setting::new(executor, "1M")?;
        let (mut machine, _) = setting.machine()?;
        setting.broker.signal(signal)?;
        let status = machine.end()?;
        let errors = machine.errors()?;
        assert!(!status.success(), "QEMU lives on: tell the user so");
        assert!(
            errors.contains("memory_region_del_eventfd: Assertion"),
            "{errors}"
        );
    }
    Ok(())
}

fn qemu_without_shared_memory_has_no_region(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    let config = Config {
        shared_memory: false,
        ..setting.config()?
    };
    let mut machine = setting.start(&config)?;
    let device = machine.device("barlink0")?;
    let mut driver = Driver::find(&mut machine, device)?;
    driver.prepare(&mut machine)?;
    driver.start(&mut machine)?;
    wait_until("QEMU names the cure", || {
        Ok(machine.errors()?.contains("share=on"))
    })?;
    pass_broker(&mut machine, &driver)?;
    assert_eq!(driver.first_word(&mut machine)?, 0);
    // The broker does not request the mapping either, because QEMU would then end.
    machine.qmp("query-status", &json!({}))?;
    Ok(())
}

/// Checks that the broker refuses a plain file. It would be killed by SIGBUS if another process
/// shortened the file.
fn broker_rejects_plain_file_as_memory(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    let mut config = Config {
        shared_memory: false,
        ..setting.config()?
    };
    let file = setting.broker.folder().join("ram").display().to_string();
    let object = format!("memory-backend-file,id=file,size=128M,share=on,mem-path={file}");
    config.arguments.extend(["-object".to_owned(), object]);
    let words = ["-machine", "memory-backend=file"];
    config.arguments.extend(words.map(str::to_owned));
    let mut machine = setting.start(&config)?;
    let device = machine.device("barlink0")?;
    let mut driver = Driver::find(&mut machine, device)?;
    driver.prepare(&mut machine)?;
    driver.start(&mut machine)?;
    wait_until("the reason is said", || {
        Ok(setting.broker.log()?.contains("memory-backend-memfd"))
    })?;
    assert_eq!(driver.first_word(&mut machine)?, 0);
    wait_until("QEMU complains", || {
        Ok(machine.errors()?.contains("Error starting vhost-user-base"))
    })?;
    machine.qmp("query-status", &json!({}))?;
    Ok(())
}

/// Checks that QEMU refuses the device, with or without an IOMMU. By default the device bypasses
/// the IOMMU, and its driver knows that. `ci/tests/driver` shows that it streams and rings in a
/// guest with an IOMMU.
fn qemu_rejects_iommu_platform_option(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    for iommu in [None, Some(Iommu::Remapping)] {
        let mut config = Config {
            iommu,
            ..setting.config()?
        };
        let mut words = config.arguments.iter_mut();
        let device = words.find(|word| word.starts_with("vhost-user-test-device-pci"));
        device.context("no device")?.push_str(",iommu_platform=on");
        let started = setting.start(&config);
        let error = format!("{:#}", started.err().context("QEMU starts")?);
        let reason = "iommu_platform=true is not supported by the device";
        assert!(error.contains(reason), "{error}");
        wait_until("the slot is free again", || {
            Ok(setting.broker.inspect()?["broker"]["slots"][0]["vm"].is_null())
        })?;
    }
    let (mut machine, mut driver) = setting.machine()?;
    driver.prepare(&mut machine)?;
    driver.start(&mut machine)?;
    driver.wait_until_mapped(&mut machine)
}

fn qemu_refuses_to_migrate(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    let (machine, _) = setting.machine()?;
    let nowhere = json!({ "uri": "exec:cat >/dev/null" });
    let refused = machine.qmp("migrate", &nowhere);
    let error = format!("{:#}", refused.expect_err("it migrates"));
    assert!(error.contains("non-migratable device"), "{error}");
    Ok(())
}

/// Shows a limit that `docs/transports.md` warns users of. The request to map the region is on
/// its way when the device stops, and QEMU does not check whether the device runs
/// (`hw/virtio/vhost-user.c`).
fn device_reset_during_mapping_ends_qemu(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    // The outcome depends on microseconds. QEMU ends in more than half of the rounds, but in fewer
    // on a busy host.
    for _ in 0..100 {
        let (mut machine, mut driver) = setting.machine()?;
        driver.prepare(&mut machine)?;
        driver.start_and_reset(&mut machine)?;
        // QEMU answers unless it has ended.
        let ended = pass_broker(&mut machine, &driver).is_err();
        drop(machine);
        wait_until("the slot is free", || {
            Ok(setting.broker.inspect()?["broker"]["slots"][0]["vm"].is_null())
        })?;
        if ended {
            // Nothing else has ended: the broker serves the next VM.
            let (mut machine, mut driver) = setting.machine()?;
            driver.prepare(&mut machine)?;
            driver.start(&mut machine)?;
            return driver.wait_until_mapped(&mut machine);
        }
    }
    panic!("QEMU lives through it now: tell the user so");
}

/// Shows that the device can be plugged in and out. The guest has no driver for it, and leaves it
/// alone.
fn vhost_user_device_plugs_in_and_out(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    let socket = setting.broker.socket(0);
    let vm = Vm::restore(&Config {
        paths: vec![setting.broker.folder().to_owned()],
        shared_memory: true,
        ..Config::default()
    })?;
    for round in 0..2 {
        let address = json!({ "type": "unix", "data": { "path": socket } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        vm.qmp(
            "chardev-add",
            &json!({ "id": "late-socket", "backend": backend }),
        )?;
        vm.plug(&json!({
            "driver": "vhost-user-test-device-pci", "id": "late", "bus": FREE_PORT, "chardev": "late-socket",
            "virtio-id": 6, "num_vqs": 2, "vq_size": 64, "config_size": 64,
        }))?;
        wait_until("the guest sees it", || {
            let devices = vm.run(["sh", "-c", "cat /sys/bus/pci/devices/*/device"])?;
            devices.require_success()?;
            Ok(String::from_utf8_lossy(&devices.stdout).contains("0x1046"))
        })
        .with_context(|| format!("in round {round}"))?;
        vm.unplug("late")?;
        vm.qmp("chardev-remove", &json!({ "id": "late-socket" }))?;
        wait_until("the slot is free", || {
            Ok(setting.broker.inspect()?["broker"]["slots"][0]["vm"].is_null())
        })?;
    }
    Ok(())
}
