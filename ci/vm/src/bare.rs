// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A machine without a guest, for tests with QEMU's qtest (`docs/devel/testing/qtest.rst`).
//!
//! Stock QEMU runs its firmware, which gives devices their addresses. Then a test reads and writes
//! memory in place of a guest.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use command_fds::CommandFdExt;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::qemu::{iommu, mapping, memory, program, spawn};
use crate::qmp::Qmp;
use crate::{COMMAND_TIMEOUT, Config};
use barlink_sandbox::builds::Artifacts;

/// Address of the PCI configuration space in memory, as q35's firmware sets it.
const ECAM: u64 = 0xb000_0000;
/// Timeout of each wait for QEMU and the firmware.
const TIMEOUT: Duration = COMMAND_TIMEOUT;
/// Name of the file in the machine's folder to which SeaBIOS writes its log.
const FIRMWARE_LOG: &str = "seabios.log";
/// Last line of that log after each reset: SeaBIOS has set up all devices, finds nothing to boot,
/// and halts.
const FIRMWARE_HALTS: &str = "No bootable device.";

/// A running machine without a guest. Dropping it ends QEMU.
#[derive(Debug)]
pub struct Bare {
    qmp: Qmp,
    memory: BufReader<UnixStream>,
    errors: File,
    child: Child,
    folder: TempDir,
    _starter: Sender<()>,
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
    /// Starts QEMU with the memory, the IOMMU and the arguments of `config`.
    pub fn start(artifacts: &Artifacts, config: &Config) -> Result<Self> {
        let folder = TempDir::with_prefix_in("bare-", &artifacts.logs)?;
        let mut command = program(artifacts, config, folder.path())?;
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-machine", "q35,memory-backend=ram", "-accel", "tcg"]);
        command.args(["-object", &memory(config)]);
        command.args(["-m", &format!("{}M", config.memory_mib)]);
        command.args(iommu(config));
        let (qmp, qmp_end) = UnixStream::pair()?;
        let (ram, memory_end) = UnixStream::pair()?;
        for (name, number) in [("qmp", 3), ("qtest", 4)] {
            command.args(["-chardev", &format!("socket,id={name},fd={number}")]);
            command.args([format!("-{name}"), format!("chardev:{name}")]);
        }
        // Doubles commas, because a single comma ends the value of an option.
        let log = folder.path().join(FIRMWARE_LOG).display().to_string();
        let log = format!("file,id=seabios,path={}", log.replace(',', ",,"));
        command.args(["-chardev", &log]);
        command.args(["-device", "isa-debugcon,iobase=0x402,chardev=seabios"]);
        command.args(["-qtest-log", "none"]).args(&config.arguments);
        command.fd_mappings(vec![
            mapping(qmp_end, ("qmp", 3)),
            mapping(memory_end, ("qtest", 4)),
        ])?;
        let errors = tempfile::tempfile()?;
        command.stdin(Stdio::null()).stderr(errors.try_clone()?);
        let (child, starter) = spawn(command)?;
        ram.set_read_timeout(Some(TIMEOUT))?;
        let started = Qmp::new(qmp, TIMEOUT);
        let qmp = started.with_context(|| written(&errors).unwrap_or_default())?;
        Ok(Self {
            qmp,
            memory: BufReader::new(ram),
            errors,
            child,
            folder,
            _starter: starter,
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
    pub fn wait_for_firmware(&self, boots: usize) -> Result<()> {
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

    /// Executes a QMP command and returns its result.
    pub fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        self.qmp.execute(command, arguments)
    }

    /// Reads 32 bits from an address.
    pub fn read(&mut self, address: u64) -> Result<u32> {
        let answer = self.order(&format!("readl {address:#x}"))?;
        let number = answer.trim_start_matches("0x");
        Ok(u64::from_str_radix(number, 16)? as u32)
    }

    /// Writes 32 bits to an address.
    pub fn write(&mut self, address: u64, value: u32) -> Result<()> {
        self.order(&format!("writel {address:#x} {value:#x}"))
            .map(drop)
    }

    /// Writes 8 bits to an address.
    pub fn write_byte(&mut self, address: u64, value: u8) -> Result<()> {
        self.order(&format!("writeb {address:#x} {value:#x}"))
            .map(drop)
    }

    /// Writes bytes to their addresses in one message, even if QEMU ends because of one of them.
    pub fn write_at_once(&mut self, bytes: &[(u64, u8)]) -> Result<()> {
        let orders = bytes.iter();
        let orders = orders.map(|(address, value)| format!("writeb {address:#x} {value:#x}\n"));
        let orders = orders.collect::<String>();
        self.memory.get_mut().write_all(orders.as_bytes())?;
        for _ in bytes {
            // Ignores errors, because QEMU may have ended.
            let _ = self.memory.read_line(&mut String::new());
        }
        Ok(())
    }

    /// Writes 16 bits to an address.
    pub fn write_short(&mut self, address: u64, value: u16) -> Result<()> {
        self.order(&format!("writew {address:#x} {value:#x}"))
            .map(drop)
    }

    /// Reads 16 bits from an address.
    pub fn read_short(&mut self, address: u64) -> Result<u16> {
        let answer = self.order(&format!("readw {address:#x}"))?;
        let number = answer.trim_start_matches("0x");
        Ok(u64::from_str_radix(number, 16)? as u16)
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
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(start.elapsed() < TIMEOUT, "QEMU does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn order(&mut self, order: &str) -> Result<String> {
        self.memory
            .get_mut()
            .write_all(format!("{order}\n").as_bytes())?;
        let mut line = String::new();
        self.memory
            .read_line(&mut line)
            .with_context(|| format!("QEMU does not answer {order}"))?;
        match line.trim_end().strip_prefix("OK") {
            Some(answer) => Ok(answer.trim_start().to_owned()),
            None => bail!("QEMU refuses {order}: {line}"),
        }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // Ignores errors, because QEMU may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads all of a file that QEMU writes. The file's position is shared with QEMU and must not
/// change.
fn written(errors: &File) -> Result<String> {
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
