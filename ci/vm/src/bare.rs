// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A machine without a kernel, whose devices a test uses by orders, such as `readl 0xfee00030`.
//!
//! There are two ways to execute the orders. By QEMU's qtest (`docs/devel/testing/qtest.rst`), QEMU
//! itself reads and writes the memory of the machine, after its firmware has given devices their
//! addresses. Or the machine's processor does so, under KVM or TCG, with the bare guest
//! (`ci/bare-guest`) in place of the firmware. Then accesses take the way of a real guest's, and
//! interrupts come and are counted.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use command_fds::CommandFdExt;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::orders::Orders;
use crate::qemu::{iommu, mapping, memory, option_value, processor, program};
use crate::qmp::Qmp;
use crate::running::Running;
use crate::{COMMAND_TIMEOUT, Config};
use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::tools::Accel;

/// Address of the PCI configuration space in memory, as q35's firmware sets it.
const ECAM: u64 = 0xb000_0000;
/// Timeout of each wait for QEMU and the firmware.
const TIMEOUT: Duration = COMMAND_TIMEOUT;
/// Name of the file in the machine's folder to which SeaBIOS writes its log.
const FIRMWARE_LOG: &str = "seabios.log";
/// Last line of that log after each reset: SeaBIOS has set up all devices, finds nothing to boot,
/// and halts.
const FIRMWARE_HALTS: &str = "No bootable device.";

/// The party that executes the orders of a test.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Executor {
    /// QEMU itself, by qtest.
    Qtest,
    /// The bare guest, under this accelerator.
    Guest(Accel),
}

/// A running machine without a kernel. Dropping it ends QEMU.
#[derive(Debug)]
pub struct Bare {
    /// Dropped first, because QEMU uses the rest.
    process: Running,
    qmp: Qmp,
    orders: Orders,
    errors: File,
    folder: TempDir,
}

/// A PCI device, as the firmware has set it up.
#[derive(Clone, Debug)]
pub struct PciDevice {
    /// Address of its configuration space in memory.
    pub config: u64,
    /// Address and size in bytes of each BAR, by number. Both are 0 for a BAR that does not exist.
    pub bars: Vec<(u64, u64)>,
}

impl Bare {
    /// Starts QEMU with the memory, the IOMMU and the arguments of `config`. QEMU executes orders.
    pub fn start(artifacts: &Artifacts, config: &Config) -> Result<Self> {
        Self::start_by(Executor::Qtest, artifacts, config)
    }

    /// Starts QEMU with the memory, the IOMMU and the arguments of `config`.
    pub fn start_by(executor: Executor, artifacts: &Artifacts, config: &Config) -> Result<Self> {
        let folder = TempDir::with_prefix_in("bare-", &artifacts.logs)?;
        let accel = match executor {
            Executor::Qtest => Accel::Tcg,
            Executor::Guest(accel) => accel,
        };
        let mut command = program(artifacts, config, folder.path(), accel)?;
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-machine", "q35,memory-backend=ram"]);
        command.args(["-object", &memory(config)]);
        command.args(["-m", &format!("{}M", config.memory_mib)]);
        command.args(iommu(config));
        command.args(processor(accel, config));
        let (qmp, qmp_end) = UnixStream::pair()?;
        let (orders, orders_end) = UnixStream::pair()?;
        for (name, number) in [("qmp", 3), ("orders", 4)] {
            command.args(["-chardev", &format!("socket,id={name},fd={number}")]);
        }
        command.args(["-qmp", "chardev:qmp"]);
        match executor {
            Executor::Qtest => {
                command.args(["-qtest", "chardev:orders", "-qtest-log", "none"]);
                let log = option_value(&folder.path().join(FIRMWARE_LOG));
                command.args(["-chardev", &format!("file,id=seabios,path={log}")]);
                command.args(["-device", "isa-debugcon,iobase=0x402,chardev=seabios"]);
            }
            Executor::Guest(_) => {
                command.args(["-serial", "chardev:orders", "-bios"]);
                command.arg(artifacts.bare_guest());
            }
        }
        command.args(&config.arguments);
        command.fd_mappings(vec![
            mapping(qmp_end, ("qmp", 3)),
            mapping(orders_end, ("orders", 4)),
        ])?;
        let errors = tempfile::tempfile()?;
        command.stdin(Stdio::null()).stderr(errors.try_clone()?);
        let process = Running::start(command)?;
        let started = Qmp::new(qmp, TIMEOUT);
        let qmp = started.with_context(|| written(&errors).unwrap_or_default())?;
        Ok(Self {
            qmp,
            orders: match executor {
                Executor::Qtest => Orders::to_qemu(orders, TIMEOUT)?,
                Executor::Guest(_) => Orders::to_guest(orders, TIMEOUT)?,
            },
            errors,
            process,
            folder,
        })
    }

    /// Waits until the firmware has given all BARs of a device their addresses, and returns the
    /// device.
    pub fn device(&mut self, id: &str) -> Result<PciDevice> {
        let start = Instant::now();
        loop {
            let buses = self.qmp("query-pci", &json!({}))?;
            // Devices behind a bridge are not listed until the firmware has set up the bridge.
            if let Some(device) = find(&buses, id).and_then(placed) {
                return Ok(device);
            }
            ensure!(
                start.elapsed() < TIMEOUT,
                "the firmware gives {id} no addresses: {buses}"
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until the firmware has finished `boots` boots. The start is the first boot, and each
    /// reset starts another. From then on the machine's processor does not access any device.
    pub fn wait_for_firmware(&mut self, boots: usize) -> Result<()> {
        if let Some(wait) = self.orders.wait_for_boot(boots) {
            return wait;
        }
        let start = Instant::now();
        loop {
            let log = fs::read(self.folder.path().join(FIRMWARE_LOG))?;
            let log = String::from_utf8_lossy(&log);
            if log.matches(FIRMWARE_HALTS).count() >= boots {
                return Ok(());
            }
            ensure!(
                start.elapsed() < TIMEOUT,
                "the firmware does not come to the end of boot {boots}: {log}"
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Resets the machine by the port of its chip set, as a guest does that reboots, and waits
    /// until the bare guest has finished this many boots.
    pub fn reset_by_port(&mut self, boots: usize) -> Result<()> {
        const RESET_CONTROL: u16 = 0xcf9;
        // Chooses a hard reset, and then begins it. The guest does not answer any more.
        self.order(&format!("outb {RESET_CONTROL:#x} 2"))?;
        self.begin(&format!("outb {RESET_CONTROL:#x} 6"))?;
        self.wait_for_firmware(boots)
    }

    /// Executes a QMP command and returns its result.
    pub fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        self.qmp.execute(command, arguments)
    }

    /// Reads 32 bits from an address.
    pub fn read(&mut self, address: u64) -> Result<u32> {
        Ok(self.order(&format!("readl {address:#x}"))? as u32)
    }

    /// Writes 32 bits to an address.
    pub fn write(&mut self, address: u64, value: u32) -> Result<()> {
        self.order(&format!("writel {address:#x} {value:#x}"))
            .map(drop)
    }

    /// Reads 64 bits from an address.
    pub fn read_long(&mut self, address: u64) -> Result<u64> {
        self.order(&format!("readq {address:#x}"))
    }

    /// Writes 64 bits to an address.
    pub fn write_long(&mut self, address: u64, value: u64) -> Result<()> {
        self.order(&format!("writeq {address:#x} {value:#x}"))
            .map(drop)
    }

    /// Writes 8 bits to an address.
    pub fn write_byte(&mut self, address: u64, value: u8) -> Result<()> {
        self.order(&format!("writeb {address:#x} {value:#x}"))
            .map(drop)
    }

    /// Writes bytes to their addresses without a wait in between, even if QEMU ends because of one
    /// of them.
    pub fn write_at_once(&mut self, bytes: &[(u64, u8)]) -> Result<()> {
        let orders = bytes.iter();
        let orders = orders.map(|(address, value)| format!("writeb {address:#x} {value:#x}"));
        self.orders.at_once(&orders.collect::<Vec<_>>())
    }

    /// Writes 16 bits to an address.
    pub fn write_short(&mut self, address: u64, value: u16) -> Result<()> {
        self.order(&format!("writew {address:#x} {value:#x}"))
            .map(drop)
    }

    /// Reads 16 bits from an address.
    pub fn read_short(&mut self, address: u64) -> Result<u16> {
        Ok(self.order(&format!("readw {address:#x}"))? as u16)
    }

    /// Writes 32 bits to a port.
    pub fn write_port(&mut self, port: u16, value: u32) -> Result<()> {
        self.order(&format!("outl {port:#x} {value:#x}")).map(drop)
    }

    /// Reads 32 bits from a port.
    pub fn read_port(&mut self, port: u16) -> Result<u32> {
        Ok(self.order(&format!("inl {port:#x}"))? as u32)
    }

    /// Fills `size` bytes of memory with a byte.
    pub fn fill(&mut self, address: u64, size: u64, byte: u8) -> Result<()> {
        self.order(&format!("memset {address:#x} {size:#x} {byte:#x}"))
            .map(drop)
    }

    /// Returns everything that QEMU has written to standard error so far.
    pub fn errors(&self) -> Result<String> {
        written(&self.errors)
    }

    /// Waits until QEMU ends by itself, and returns its exit status.
    pub fn end(&mut self) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.process.child.try_wait()? {
                return Ok(status);
            }
            ensure!(start.elapsed() < TIMEOUT, "QEMU does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for an event of QEMU with this name, about the device with this ID.
    pub fn wait_for_event(&self, name: &str, device: &str) -> Result<()> {
        self.qmp.wait_event(name, |data| data["device"] == device)
    }

    /// Returns QEMU's process ID. In a sandbox it is that of the sandbox's first process.
    pub fn process(&self) -> u32 {
        self.process.child.id()
    }

    fn order(&mut self, order: &str) -> Result<u64> {
        self.orders.give(order)
    }
}

/// Orders that only the bare guest executes.
impl Bare {
    /// Writes `value` to an address `times` times, without a pause.
    pub fn repeat(&mut self, address: u64, value: u32, times: u64) -> Result<()> {
        self.begin_repeat(address, value, times)?;
        self.finish().map(drop)
    }

    /// Begins the writes of [`Bare::repeat`]. [`Bare::finish`] waits for their end.
    pub fn begin_repeat(&mut self, address: u64, value: u32, times: u64) -> Result<()> {
        self.begin(&format!("repeat {address:#x} {value:#x} {times}"))
    }

    /// Writes 1 and 0 to an address `times` times, without a pause.
    pub fn toggle(&mut self, address: u64, times: u64) -> Result<()> {
        self.order(&format!("toggle {address:#x} {times}"))
            .map(drop)
    }

    /// Sets and unmasks the first `count` entries of an MSI-X table: entry `n` interrupts by the
    /// processor's vector `first + n % span`.
    pub fn set_vectors(&mut self, table: u64, count: u32, first: u8, span: u8) -> Result<()> {
        let order = format!("vectors {table:#x} {count} {first} {span}");
        self.order(&order).map(drop)
    }

    /// Returns the number of interrupts so far by `count` vectors of the processor, from `first`
    /// on.
    pub fn taken(&mut self, first: u8, count: u32) -> Result<u64> {
        self.order(&format!("taken {first} {count}"))
    }

    /// Lets the processor sleep until `times` interrupts have come by a vector, or for about
    /// `time`. Returns how many have come.
    pub fn sleep_until(&mut self, vector: u8, times: u64, time: Duration) -> Result<u64> {
        let ticks = time.as_millis() / 10;
        self.order(&format!("await {vector} {times} {ticks}"))
    }

    /// Makes the guest write `value` to an address at each interrupt by a vector. Vector 0 ends it.
    pub fn echo(&mut self, vector: u8, address: u64, value: u32) -> Result<()> {
        self.order(&format!("echo {vector} {address:#x} {value:#x}"))
            .map(drop)
    }

    /// Gives an order without waiting for its end, which [`Bare::finish`] waits for.
    pub fn begin(&mut self, order: &str) -> Result<()> {
        self.orders.begin(order)
    }

    /// Waits for the end of the order that was begun, and returns its result.
    pub fn finish(&mut self) -> Result<u64> {
        self.orders.finish()
    }
}

/// Reads all of a file that QEMU writes. The file's position is shared with QEMU and must not
/// change.
pub(crate) fn written(errors: &File) -> Result<String> {
    let mut bytes = vec![0; usize::try_from(errors.metadata()?.len())?];
    errors.read_exact_at(&mut bytes, 0)?;
    Ok(String::from_utf8(bytes)?)
}

/// Finds the device with this ID in the result of `query-pci`.
fn find<'a>(value: &'a Value, id: &str) -> Option<&'a Value> {
    match value {
        Value::Object(fields) if fields.get("qdev_id").is_some_and(|found| found == id) => {
            Some(value)
        }
        Value::Object(fields) => fields.values().find_map(|value| find(value, id)),
        Value::Array(values) => values.iter().find_map(|value| find(value, id)),
        _ => None,
    }
}

fn placed(device: &Value) -> Option<PciDevice> {
    let number = |name: &str| device[name].as_u64();
    let place = number("bus")? << 20 | number("slot")? << 15 | number("function")? << 12;
    let mut bars = vec![(0, 0); 6];
    for region in device["regions"].as_array()? {
        let bar = usize::try_from(region["bar"].as_u64()?).ok()?;
        let address = region["address"]
            .as_u64()
            .filter(|address| *address != u64::MAX)?;
        *bars.get_mut(bar)? = (address, region["size"].as_u64()?);
    }
    bars.iter()
        .any(|(address, _)| *address > 0)
        .then_some(PciDevice {
            config: ECAM + place,
            bars,
        })
}
