// SPDX-License-Identifier: Apache-2.0 OR MIT

//! barlink's own device on stock QEMU: the test accesses the registers itself, without a kernel,
//! and counts messages. QEMU itself executes the accesses, or the bare guest under KVM.

mod buffer;
#[path = "../executors.rs"]
mod executors;
mod iommu;
mod relay;
mod under_way;

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use barlink_driver_checks::tier::rounds;
use barlink_protocol::wire::uapi::REGISTERS_MAGIC;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::tap::Tap;
use barlink_vm::{Bare, COMMAND_TIMEOUT, Config, Executor, FREE_PORT, PciDevice, Vm};
use barlink_vm_tests::{App, lengthen_timeout, wait_for_end, wait_until};
use rustix::process::Signal;
use serde_json::json;

use self::executors::{EACH, QTEST, Test};
use self::relay::{Message, Relay};

const TESTS: &[Test] = &[
    test!(EACH, qemu_sees_ivshmem_and_our_registers),
    test!(EACH, bar2_is_written_without_a_message),
    test!(EACH, doorbell_causes_one_message_and_ring),
    test!(QTEST, rings_become_interrupts_of_vm),
    test!(QTEST, reset_of_the_machine_reaches_the_broker),
    test!(EACH, broker_copies_shared_guest_memory),
    test!(QTEST, qemu_plugs_in_any_kind_of_memory),
    test!(EACH, rejected_vfio_user_qemu_ends_immediately),
    test!(QTEST, vfio_user_device_allows_plugging_not_unplugging),
    test!(EACH, vm_outlives_its_broker_until_it_reboots),
    test!(QTEST, migration_leaves_region_behind),
    test!(QTEST, stream_causes_messages_only_for_doorbells),
    test!(QTEST, buffer::host_reads_dma_buffer_of_guest),
    test!(QTEST, buffer::driver_announces_buffer_again_after_suspend),
    test!(
        QTEST,
        buffer::driver_announces_iommu_buffer_again_after_suspend
    ),
    test!(
        QTEST,
        buffer::driver_announces_no_buffer_without_guest_memory
    ),
    test!(QTEST, iommu::host_reads_dma_buffer_behind_iommu),
    test!(EACH, iommu::enabled_iommu_hides_guest_memory),
    test!(EACH, iommu::iommu_without_caching_mode_ends_qemu),
    test!(QTEST, under_way::replacement_delivers_each_ring_once),
    test!(
        QTEST,
        under_way::broker_killed_with_unread_message_ends_qemu
    ),
    test!(
        QTEST,
        under_way::vm_survives_missing_reply_from_killed_broker
    ),
    test!(
        QTEST,
        under_way::unanswered_message_delays_qemu_five_seconds
    ),
    test!(QTEST, under_way::lost_interrupt_setup_works_when_repeated),
    test!(EACH, under_way::vm_survives_broker_stopped_amid_rings),
    test!(
        QTEST,
        under_way::late_answer_of_stopped_broker_ends_connection
    ),
    test!(QTEST, under_way::longer_timeout_survives_stopped_broker),
];

fn main() -> ExitCode {
    executors::run("vfio_user", TESTS)
}

/// Commands of vfio-user: `DEVICE_RESET`, `REGION_WRITE`, `DEVICE_SET_IRQS` and `DMA_UNMAP`.
const RESET: u16 = 13;
const WRITE: u16 = 10;
const SET_IRQS: u16 = 8;
const UNMAP: u16 = 3;

/// A broker with slot 0 over vfio-user and slot 1 over ivshmem, from which the test takes its tap.
struct Setting {
    executor: Executor,
    broker: Broker,
    relay: Relay,
    tap: Tap,
}

const SLOTS: [Transport; 2] = [Transport::VfioUser, Transport::Ivshmem];
/// The host's ID as a peer.
const HOST: u32 = 2;
const VECTORS: u32 = 5;

impl Setting {
    fn new(executor: Executor, size: &str) -> Result<Self> {
        Self::with(executor, &["--size", size])
    }

    fn with(executor: Executor, arguments: &[&str]) -> Result<Self> {
        let broker = Broker::start_over(Artifacts::shared()?, &SLOTS, arguments)?;
        Self::at(executor, broker)
    }

    /// Starts a broker whose service manager stores all its descriptors for its successor, even if
    /// the broker is killed.
    fn managed() -> Result<Self> {
        let arguments = ["--size", "1M"];
        let broker = Broker::start_managed_over(Artifacts::shared()?, &SLOTS, &arguments)?;
        Self::at(Executor::Qtest, broker)
    }

    fn at(executor: Executor, broker: Broker) -> Result<Self> {
        let relay = Relay::start(&broker.socket(0), broker.folder())?;
        let tap = Tap::before_the_vm(&broker, 1, HOST, VECTORS)?;
        Ok(Self {
            executor,
            broker,
            relay,
            tap,
        })
    }

    /// Returns QEMU's configuration, with the relay's socket in place of the broker's.
    fn config(&self) -> Result<Config> {
        let socket = self.broker.socket(0).display().to_string();
        let relay = self.relay.path.display().to_string();
        let arguments = self.broker.arguments(0)?.into_iter();
        Ok(Config {
            memory_mib: 128,
            arguments: arguments
                .map(|word| word.replace(&socket, &relay))
                .collect(),
            paths: vec![self.broker.folder().to_owned()],
            ..Config::default()
        })
    }

    fn machine(&self) -> Result<(Bare, PciDevice)> {
        self.started(&self.config()?)
    }

    fn start(&self, config: &Config) -> Result<Bare> {
        Bare::start_by(self.executor, Artifacts::shared()?, config)
    }

    /// Starts a machine, and waits for the end of its firmware. Until then the firmware maps memory
    /// anew, and QEMU sends the broker messages about it.
    fn started(&self, config: &Config) -> Result<(Bare, PciDevice)> {
        let mut machine = self.start(config)?;
        let device = machine.device("barlink0")?;
        machine.wait_for_firmware(1)?;
        Ok((machine, device))
    }

    fn connection(&self) -> Result<u64> {
        let vm = &self.broker.inspect()?["broker"]["slots"][0]["vm"];
        vm["connection"].as_u64().context("no VM")
    }
}

/// Waits until the broker has answered one more message, and so all messages before it.
fn pass_broker(machine: &mut Bare, device: &PciDevice) -> Result<()> {
    machine.read(device.bars[0].0 + 8).map(drop)
}

fn qemu_sees_ivshmem_and_our_registers(executor: Executor) -> Result<()> {
    for (size, bytes) in [("1M", 1 << 20), ("64M", 64 << 20), ("1G", 1 << 30)] {
        let setting = Setting::new(executor, size)?;
        let (mut machine, device) = setting.machine()?;
        let mut config = |offset| machine.read(device.config + offset);
        assert_eq!(config(0x00)?, 0x1110_1af4);
        assert_eq!(config(0x08)?, 0x0500_0001);
        assert_eq!(config(0x2c)?, 0x1100_1af4);
        assert_eq!(config(0x34)? & 0xff, 0x40);
        assert_eq!(config(0x40)?, 0x000f_0011, "MSI-X with 16 vectors");
        assert_eq!(config(0x44)?, 1, "the table is in BAR1");
        assert_eq!(config(0x48)?, 0x1001);
        assert_eq!(config(0x3c)? >> 8, 0, "no interrupt pin");
        assert_eq!(config(0x18)? & 0xf, 0xc, "64 bits, prefetchable");
        let sizes: Vec<_> = device.bars.iter().map(|(_, size)| *size).collect();
        assert_eq!(sizes, [256, 8192, bytes, 0, 0, 0]);
        assert!(device.bars[2].0 >= 4 << 30, "{:#x}", device.bars[2].0);
        let registers = device.bars[0].0;
        let mut register = |offset| machine.read(registers + offset);
        assert_eq!(register(8)?, 0, "its own ID");
        assert_eq!(register(0x10)?, REGISTERS_MAGIC);
        assert_eq!(register(0x14)?, 1);
        assert_eq!([register(0x20)?, register(0x24)?], [3, VECTORS]);
        let errors = machine.errors()?;
        assert_eq!(errors, "", "QEMU complains");
    }
    Ok(())
}

fn bar2_is_written_without_a_message(executor: Executor) -> Result<()> {
    // A KVM that interprets the guest is slow.
    let setting = match executor {
        Executor::Qtest => Setting::new(executor, "64M")?,
        Executor::Guest(_) => Setting::new(executor, "1M")?,
    };
    let (mut machine, device) = setting.machine()?;
    let (address, size) = device.bars[2];
    // The superblock holds the offset of the raw window at byte 40.
    let window = u64::from(machine.read(address + 40)?);
    pass_broker(&mut machine, &device)?;
    let before = setting.relay.messages().len();
    // By qtest the rounds write 128 MiB or 1 GiB in total. They overwrite the superblock too,
    // because the broker does not read it again.
    let last = rounds(2, 16);
    for round in 1..=last {
        machine.fill(address, size, round)?;
    }
    machine.write(address + window, u32::from_le_bytes(*b"seen"))?;
    assert_eq!(
        machine.read(address + window + 4)?,
        u32::from_ne_bytes([last; 4])
    );
    pass_broker(&mut machine, &device)?;
    let after = setting.relay.messages().len();
    assert_eq!(after, before + 1, "accesses to BAR2 are messages");
    let seen = setting
        .broker
        .run(["peek", "--raw", "--length", "6"])
        .context("the host app looks")?;
    assert_eq!(seen, [&b"seen"[..], &[last; 2]].concat());
    Ok(())
}

fn doorbell_causes_one_message_and_ring(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    let (mut machine, device) = setting.machine()?;
    let doorbell = device.bars[0].0 + 12;
    setting.tap.all_rings()?;
    for (peer, vector) in [(HOST, 3), (1, 2), (HOST, 0)] {
        let before = setting.relay.messages();
        machine.write(doorbell, peer << 16 | vector)?;
        let messages = setting.relay.messages();
        let expected = Message {
            command: WRITE,
            region: Some(0),
        };
        assert_eq!(messages[before.len()..], [expected]);
        assert_eq!(setting.tap.all_rings()?, [(peer, vector, 1)]);
    }
    // Doorbells of unknown peers and vectors ring no eventfd.
    for (peer, vector) in [(3, 0), (HOST, VECTORS), (0xffff, 0xffff)] {
        machine.write(doorbell, peer << 16 | vector)?;
    }
    assert!(setting.tap.all_rings()?.is_empty());
    Ok(())
}

/// Address of guest memory that nothing uses, in bytes.
const TARGET: u64 = 32 << 20;

/// Sets address and data of each vector, and enables MSI-X.
fn enable_interrupts(machine: &mut Bare, device: &PciDevice) -> Result<()> {
    // Enables memory accesses and bus mastering.
    machine.write(device.config + 4, 6)?;
    for vector in 0..16 {
        let entry = device.bars[1].0 + 16 * vector;
        machine.write(entry, (TARGET + 4 * vector) as u32)?;
        machine.write(entry + 4, 0)?;
        machine.write(entry + 8, 0xfeed_0000 + vector as u32)?;
        machine.write(entry + 12, 0)?;
    }
    machine.write(device.config + 0x40, 0x8000_0000)
}

/// Rings a vector of the VM, and waits for its interrupt.
fn interrupt_comes(setting: &Setting, machine: &mut Bare, vector: u32) -> Result<()> {
    let target = TARGET + 4 * u64::from(vector);
    machine.write(target, 0)?;
    setting.tap.ring(0, vector, 1)?;
    wait_until(&format!("interrupt {vector} comes"), || {
        Ok(machine.read(target)? == 0xfeed_0000 + vector)
    })
}

fn rings_become_interrupts_of_vm(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    let (mut machine, device) = setting.machine()?;
    enable_interrupts(&mut machine, &device)?;
    machine.fill(TARGET, 64, 0)?;
    for vector in 0..VECTORS {
        interrupt_comes(&setting, &mut machine, vector)?;
    }
    // A masked interrupt comes once it is unmasked.
    let control = device.bars[1].0 + 16 + 12;
    machine.write(control, 1)?;
    machine.write(TARGET + 4, 0)?;
    setting.tap.ring(0, 1, 1)?;
    // The broker and QEMU take rings in batches, so the masked ring may be in a batch with the
    // first of these.
    for _ in 0..2 {
        interrupt_comes(&setting, &mut machine, 2)?;
    }
    assert_eq!(machine.read(TARGET + 4)?, 0);
    machine.write(control, 0)?;
    wait_until("the interrupt comes", || {
        Ok(machine.read(TARGET + 4)? == 0xfeed_0001)
    })?;
    assert_eq!(machine.errors()?, "");
    Ok(())
}

fn reset_of_the_machine_reaches_the_broker(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    let (mut machine, device) = setting.machine()?;
    enable_interrupts(&mut machine, &device)?;
    let before = setting.connection()?;
    let resets = |messages: &[Message]| {
        let resets = messages.iter().filter(|message| message.command == RESET);
        resets.count()
    };
    let count = resets(&setting.relay.messages());
    setting.tap.rings(HOST, 0)?;
    machine.qmp("system_reset", &json!({}))?;
    wait_until("the reset comes", || {
        Ok(resets(&setting.relay.messages()) > count)
    })?;
    wait_until("the host detects the reset", || {
        Ok(setting.connection()? > before)
    })?;
    assert!(setting.tap.rings(HOST, 0)? >= 1);
    // The firmware sets the device up again, and interrupts work as before.
    machine.wait_for_firmware(2)?;
    let device = machine.device("barlink0")?;
    assert_eq!(machine.read(device.config + 0x40)?, 0x000f_0011);
    enable_interrupts(&mut machine, &device)?;
    interrupt_comes(&setting, &mut machine, 2)?;
    assert_eq!(machine.errors()?, "");
    Ok(())
}

/// Returns 8 bytes of the guest's own memory, as a host app reads them.
fn peek(broker: &Broker, address: u64) -> Result<Vec<u8>> {
    let address = address.to_string();
    let peek = [
        "peek", "--guest", "0", "--raw", "--length", "8", "--at", &address,
    ];
    broker.run(peek)
}

fn broker_copies_shared_guest_memory(executor: Executor) -> Result<()> {
    let setting = Setting::with(executor, &["--size", "1M", "--guest-memory"])?;
    let peek = |address| peek(&setting.broker, address);
    let mut config = setting.config()?;
    config.arguments = setting.broker.arguments(0)?;
    let private = setting.start(&config)?;
    let error = format!("{:#}", peek(TARGET).expect_err("it is not shared"));
    assert!(error.contains("memory-backend-memfd,share=on"), "{error}");
    drop(private);
    wait_until("the slot is free", || {
        Ok(setting.broker.inspect()?["broker"]["slots"][0]["vm"].is_null())
    })?;
    config.arguments = setting.broker.arguments(0)?;
    config.shared_memory = true;
    let (mut machine, _) = setting.started(&config)?;
    machine.write(TARGET, u32::from_le_bytes(*b"seen"))?;
    machine.write(TARGET + 4, u32::from_le_bytes(*b" it!"))?;
    assert_eq!(peek(TARGET)?, b"seen it!");
    for address in [(128 << 20) - 4, 128 << 20, u64::MAX - 3] {
        peek(address).expect_err("nothing is there");
    }
    // A reset removes all memory and adds it again, some of it in parts that the firmware hides and
    // shows.
    let places = [0, 0xc_0000, 0xe_0000, 0xf_0000, 1 << 20, TARGET, 127 << 20];
    let readable = || places.map(|address| peek(address).is_ok());
    assert_eq!(readable(), [true; 7]);
    let before = setting.connection()?;
    machine.qmp("system_reset", &json!({}))?;
    wait_until("the reset comes", || Ok(setting.connection()? > before))?;
    machine.wait_for_firmware(2)?;
    assert_eq!(readable(), [true; 7]);
    assert_eq!(peek(TARGET)?, b"seen it!");
    assert_eq!(machine.errors()?, "");
    Ok(())
}

fn qemu_plugs_in_any_kind_of_memory(executor: Executor) -> Result<()> {
    let setting = Setting::with(executor, &["--size", "1M", "--guest-memory"])?;
    let mut config = setting.config()?;
    config.arguments = setting.broker.arguments(0)?;
    config.shared_memory = true;
    let room = ["-m", "size=128M,slots=3,maxmem=1G"];
    config.arguments.extend(room.map(str::to_owned));
    // The folder is beside the build's logs because these are not on a tmpfs: the file must not be
    // shared memory.
    let folder = tempfile::tempdir_in(&Artifacts::shared()?.logs)?;
    let on_disk = folder.path().join("memory");
    config.paths.push(folder.path().to_owned());
    let (mut machine, _) = setting.started(&config)?;
    let size = 128 << 20;
    let share = true;
    let status = || -> Result<(u64, u64)> {
        let vm = setting.broker.inspect()?["broker"]["slots"][0]["vm"].take();
        let bytes = |name: &str| vm["guest_memory"][name].as_u64().context("no number");
        Ok((bytes("readable")?, bytes("unreadable")?))
    };
    let (readable, unreadable) = status()?;
    assert_eq!(unreadable, 0);
    let mut plug = |name: &str, kind: &str, more: serde_json::Value| -> Result<u64> {
        let mut object = json!({ "id": name, "qom-type": kind, "size": size });
        let more = more.as_object().context("no object")?.clone();
        object.as_object_mut().context("no object")?.extend(more);
        machine.qmp("object-add", &object)?;
        let id = format!("{name}-dimm");
        let dimm = json!({ "driver": "pc-dimm", "id": id, "memdev": name });
        machine.qmp("device_add", &dimm)?;
        machine.qmp("query-status", &json!({}))?;
        let devices = machine.qmp("query-memory-devices", &json!({}))?;
        let devices = devices.as_array().context("no list")?.iter();
        let data = devices.map(|device| &device["data"]);
        let mut data = data.filter(|data| data["id"] == json!(id));
        let address = data.next().and_then(|data| data["addr"].as_u64());
        let address = address.context("it is not there")?;
        machine.write(address + 4096, u32::from_le_bytes(*b"plug"))?;
        machine.write(address + 4100, u32::from_le_bytes(*b"ged!"))?;
        Ok(address + 4096)
    };
    // The three kinds are memory without a file, memory in a file that is not shared memory, and
    // shared memory.
    let private = plug("private", "memory-backend-ram", json!({}))?;
    peek(&setting.broker, private).expect_err("it is not shared");
    let path = on_disk.to_str().context("a path")?;
    let other = plug(
        "other",
        "memory-backend-file",
        json!({ "mem-path": path, "share": share }),
    )?;
    peek(&setting.broker, other).expect_err("it is no shared memory");
    let shared = plug("shared", "memory-backend-memfd", json!({ "share": share }))?;
    assert_eq!(peek(&setting.broker, shared)?, b"plugged!");
    assert_eq!(status()?, (readable + size, size));
    assert_eq!(machine.errors()?, "");
    Ok(())
}

fn rejected_vfio_user_qemu_ends_immediately(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    // Without the relay, whose process would keep the slot of the first machine.
    let direct = Config {
        arguments: setting.broker.arguments(0)?,
        ..setting.config()?
    };
    let (first, _) = setting.started(&direct)?;
    let refused = setting.start(&direct);
    let error = format!("{:#}", refused.expect_err("the slot is taken"));
    // The broker sends QEMU an error. If the broker only closed the connection, QEMU would wait for
    // five seconds and report a timeout.
    assert!(error.contains("Device or resource busy"), "{error}");
    ensure!(first.qmp("query-status", &json!({}))?["running"] == true);
    // A new connection succeeds once the slot is free.
    drop(first);
    wait_until("the slot is free", || {
        Ok(setting.broker.inspect()?["broker"]["slots"][0]["vm"].is_null())
    })?;
    setting.start(&direct)?.device("barlink0")?;
    Ok(())
}

/// Shows a limit of QEMU 11.1: it ends when it unplugs a vfio-user device with MSI-X
/// (`vfio_user_msix_teardown`), with any server.
fn vfio_user_device_allows_plugging_not_unplugging(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    let vm = Vm::restore(&Config {
        paths: vec![setting.broker.folder().to_owned()],
        ..Config::default()
    })?;
    vm.run(["insmod", "/lib/barlink.ko"])?.require_success()?;
    let socket = json!({ "type": "unix", "path": setting.broker.socket(0) });
    vm.plug(&json!({
        "driver": "vfio-user-pci", "id": "late", "bus": FREE_PORT, "rombar": 0, "socket": socket,
    }))?;
    wait_until("the driver takes it", || {
        let info = vm.run(["barlink-guest", "info"])?;
        Ok(info.require_success().is_ok())
    })?;
    vm.run(["barlink-guest", "poke", "plugged"])?
        .require_success()?;
    let seen = setting.broker.run(["peek", "--raw", "--length", "7"])?;
    assert_eq!(seen, b"plugged");
    drop(vm);
    // For this reason the port that `barlink qemu-args` prints does not allow unplugging.
    let setting = Setting::new(executor, "1M")?;
    let (machine, _) = setting.machine()?;
    let refused = machine.qmp("device_del", &json!({ "id": "barlink0" }));
    let error = format!("{:#}", refused.expect_err("it can be unplugged"));
    assert!(error.contains("does not support hotplug"), "{error}");
    machine.qmp("query-status", &json!({}))?;
    Ok(())
}

/// Shows a limit that `docs/transports.md` warns users of.
fn vm_outlives_its_broker_until_it_reboots(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    let (mut machine, device) = setting.machine()?;
    let region = device.bars[2].0;
    setting.broker.signal(Signal::KILL)?;
    wait_until("QEMU notices", || {
        Ok(machine.read(device.bars[0].0 + 8)? == u32::MAX)
    })?;
    machine.write(region + 4096, 0x600d_600d)?;
    assert_eq!(machine.read(region + 4096)?, 0x600d_600d);
    machine.qmp("query-status", &json!({}))?;
    // QEMU cannot send the broker the guest's memory, and exits.
    let _ = machine.qmp("system_reset", &json!({}));
    let status = machine.end()?;
    assert!(!status.success());
    let errors = machine.errors()?;
    assert!(errors.contains("DMA mapping failed"), "{errors}");
    Ok(())
}

/// Shows a limit that `docs/transports.md` warns users of. No argument makes QEMU 11.1 refuse the
/// migration, not even `-only-migratable`.
fn migration_leaves_region_behind(executor: Executor) -> Result<()> {
    let (setting, other) = (Setting::new(executor, "1M")?, Setting::new(executor, "1M")?);
    let mut config = setting.config()?;
    config.arguments.push("-only-migratable".to_owned());
    let (mut machine, device) = setting.started(&config)?;
    enable_interrupts(&mut machine, &device)?;
    let region = device.bars[2].0;
    let window = u64::from(machine.read(region + 40)?);
    machine.write(region + window, u32::from_le_bytes(*b"seen"))?;
    machine.write(TARGET, u32::from_le_bytes(*b"seen"))?;
    let file = setting.broker.folder().join("migrated");
    let file = json!({ "uri": format!("file:{}", file.display()) });
    let wait = |machine: &Bare| {
        wait_until("the VM is migrated", || {
            let status = machine.qmp("query-migrate", &json!({}))?;
            ensure!(status["status"] != "failed", "{status}");
            Ok(status["status"] == "completed")
        })
    };
    machine.qmp("migrate", &file)?;
    wait(&machine)?;
    assert_ne!(machine.read(device.config + 0x1c)?, 0);
    drop(machine);
    let mut config = other.config()?;
    config.paths.push(setting.broker.folder().to_owned());
    let incoming = ["-only-migratable", "-incoming", "defer"];
    config.arguments.extend(incoming.map(str::to_owned));
    let mut machine = setting.start(&config)?;
    machine.qmp("migrate-incoming", &file)?;
    wait(&machine)?;
    // The guest's memory is there. Its device is in the state after power-on: no address, no bus
    // mastering, no interrupts.
    assert_eq!(machine.read(TARGET)?, u32::from_le_bytes(*b"seen"));
    let mut config = |offset| machine.read(device.config + offset);
    assert_eq!(config(0)?, 0x1110_1af4);
    assert_eq!([config(4)? & 7, config(0x1c)?, config(0x40)? >> 31], [0; 3]);
    let seen = |broker: &Broker| broker.run(["peek", "--raw", "--length", "4"]);
    assert_eq!(
        (seen(&setting.broker)?, seen(&other.broker)?),
        (b"seen".into(), vec![0; 4])
    );
    Ok(())
}

fn stream_causes_messages_only_for_doorbells(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "64M")?;
    let config = Config {
        memory_mib: Config::default().memory_mib,
        ..setting.config()?
    };
    let vm = Vm::restore(&config)?;
    vm.run(["insmod", "/lib/barlink.ko"])?.require_success()?;
    // The file is a hole because a pipe would be slower than the channel.
    let hole = "dd if=/dev/zero of=/tmp/file bs=1M count=0 seek=1024";
    vm.run(["sh", "-c", hole])?.require_success()?;
    // On a busy host the ends do not always run at the same time, and then ring more often: so one
    // of several streams has to show it.
    wait_until("a stream rings at most once in 1,000 records", || {
        let (records, rung) = stream_file(&setting, &vm, "/tmp/file")?;
        ensure!(records >= 65_536, "the stream was over too soon");
        Ok(rung * 1000 <= records)
    })
}

/// Streams a file from the guest to the host. Asserts that no message passes between QEMU and the
/// broker but doorbells. Returns the numbers of records and of rings of the stream.
fn stream_file(setting: &Setting, vm: &Vm, file: &str) -> Result<(u64, u64)> {
    let counts = || -> Result<[u64; 2]> {
        let channel = setting.broker.inspect()?["channels"][0].clone();
        assert_eq!(channel["name"], "up");
        let count = |name: &str| channel[name].as_u64().context("no count");
        Ok([count("records")?, count("rung")?])
    };
    let [records_before, rung_before] = counts()?;
    let mut receiver = App::start(&mut setting.broker.app(["recv", "-o", "/dev/null"]))?;
    let before = setting.relay.messages().len();
    let send = ["barlink-guest", "send", "--record-size", "16K", file];
    vm.spawn(send)?.wait(COMMAND_TIMEOUT)?.require_success()?;
    ensure!(wait_for_end(&mut receiver, "the receiver")?.success());
    let messages = setting.relay.messages()[before..].to_vec();
    let [records, rung] = counts()?;
    let (records, rung) = (records - records_before, rung - rung_before);
    println!(
        "{records} records, {rung} rings, {} messages",
        messages.len()
    );
    let of_bar2 = messages.iter().filter(|message| message.region == Some(2));
    assert_eq!(of_bar2.count(), 0, "accesses to BAR2 are messages");
    // The driver rings as well when an end is claimed or released, and an end rings when it
    // attaches.
    let more = messages.len() as u64 - rung;
    assert!(more < 10, "{more} messages that are no rings of the stream");
    Ok((records, rung))
}
