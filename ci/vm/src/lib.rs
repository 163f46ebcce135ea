// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A virtual machine under test: stock QEMU, a stock kernel, and an agent that runs commands in the
//! guest.
//!
//! ```no_run
//! use barlink_vm::{Config, Vm};
//!
//! let vm = Vm::boot(&Config::default())?;
//! assert_eq!(vm.run(["uname", "-s"])?.success()?, "Linux\n");
//! # anyhow::Ok(())
//! ```

mod accelerator;
mod agent;
mod bare;
pub mod broker;
mod console;
mod orders;
mod plug;
mod probe;
mod qemu;
mod qmp;
mod running;
mod snapshot;
pub mod tap;

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

pub use self::accelerator::{accelerator, check_accelerator, check_bare_kvm, check_kernel_boots};
use self::agent::Agent;
pub use self::agent::{Output, Process};
pub use self::bare::{Bare, Executor, PciDevice};
use self::console::Console;
use self::plug::Ports;
use self::qemu::Qemu;
use self::qmp::Qmp;
pub use self::snapshot::remove_snapshots;
use barlink_sandbox::builds::Artifacts;

/// Timeout of a boot, until the agent reports. A boot takes 4 s under TCG on an idle machine.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(180);

/// Default timeout of a command in the guest.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// Timeout of QEMU's own work.
pub const QMP_TIMEOUT: Duration = Duration::from_secs(60);

/// Wait after a device was unplugged. QEMU's ivshmem device closes the descriptor of its memory
/// twice, the second time when its mappings are gone, some 10 ms later. No other file may get the
/// same number in between (`docs/decisions/0005-hot-unplug.md`).
const UNPLUGGED: Duration = Duration::from_millis(300);

/// Shell script that suspends the guest to memory. On resume the kernel asks the host whether the
/// agent's port is open, but cannot receive the answer yet and takes the port for closed. So the
/// script binds the ports anew, which makes the kernel ask once more.
const SUSPEND: &str = "echo deep >/sys/power/mem_sleep && echo mem >/sys/power/state
    slept=$?
    cd /sys/bus/virtio/drivers/virtio_console || exit
    for port in virtio*; do echo $port >unbind; echo $port >bind; done
    exit $slept";

/// Number of the descriptor by which QEMU gets the first of [`Config::files`].
pub const FIRST_FILE: i32 = 10;

/// ID of a restored guest's last root port, for a device that a test plugs in by itself.
pub const FREE_PORT: &str = "port5";

/// An IOMMU of a VM.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Iommu {
    /// Translates DMA and remaps interrupts.
    Remapping,
    /// Only translates DMA.
    Translating,
}

/// Configuration of a VM.
#[derive(Clone, Debug)]
pub struct Config {
    /// Size of the guest's memory, in MiB.
    pub memory_mib: u32,
    /// Number of the guest's processors.
    pub cpus: u32,
    /// QEMU's name of the machine type.
    pub machine: &'static str,
    /// Further arguments for QEMU, such as those that `barlink qemu-args` prints.
    pub arguments: Vec<String>,
    /// Files and folders that the arguments name. QEMU sees no others. Each must exist, and not be
    /// below `/usr` or `/etc`.
    pub paths: Vec<PathBuf>,
    /// Files that the arguments name as `/proc/self/fd/NUMBER`, from [`FIRST_FILE`] on.
    pub files: Vec<Arc<File>>,
    /// Whether the host allocates all of the guest's memory at the start instead of on first use.
    /// For measurements of time.
    pub preallocated: bool,
    /// Whether other processes can map the guest's memory. vhost-user needs that.
    pub shared_memory: bool,
    /// The VM's IOMMU, if it has one. The guest's kernel is told to use it.
    pub iommu: Option<Iommu>,
    /// Whether QEMU ends when the guest reboots. Otherwise the guest boots again.
    pub ends_on_reboot: bool,
    /// Timeout of a boot, until the agent reports.
    pub boot_timeout: Duration,
    /// Whether [`Vm::attach_terminal`] can connect a terminal to the console.
    pub interactive: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            memory_mib: 256,
            cpus: 2,
            machine: "q35",
            arguments: Vec::new(),
            paths: Vec::new(),
            files: Vec::new(),
            preallocated: false,
            shared_memory: false,
            iommu: None,
            ends_on_reboot: false,
            boot_timeout: BOOT_TIMEOUT,
            interactive: false,
        }
    }
}

/// The origin of a VM's guest.
enum Origin<'a> {
    /// The guest boots.
    Boot,
    /// The guest boots with free root ports, and is written to this snapshot file later.
    BootForSnapshot(&'a File),
    /// The guest is read from this snapshot file.
    Snapshot(&'a File),
}

/// A running VM. Dropping it ends QEMU. If the caller panics, the end of the console's log is
/// shown.
#[derive(Debug)]
pub struct Vm {
    agent: Agent,
    qmp: Qmp,
    console: Console,
    /// The root ports of a restored guest, by the names that its configuration has for them.
    ports: Ports,
    // Dropped last, because it ends QEMU, to which the other fields are connected.
    qemu: Qemu,
}

impl Vm {
    /// Boots a VM with [`Artifacts::shared`], for a test of the boot itself.
    pub fn boot(config: &Config) -> Result<Self> {
        Self::boot_with(Artifacts::shared()?, config)
    }

    /// Boots a VM and waits for its agent.
    pub fn boot_with(artifacts: &Artifacts, config: &Config) -> Result<Self> {
        Self::start(artifacts, config, &Origin::Boot)
    }

    /// Boots a VM that has free root ports and can be written to a snapshot file.
    fn boot_for_snapshot(artifacts: &Artifacts, config: &Config, file: &File) -> Result<Self> {
        Self::start(artifacts, config, &Origin::BootForSnapshot(file))
    }

    /// Restores a booted VM with [`Artifacts::shared`], which takes a tenth of the time of a boot.
    /// Then plugs in the devices of [`Config::arguments`]. These may describe only devices, and the
    /// character devices, objects and ports that devices need.
    pub fn restore(config: &Config) -> Result<Self> {
        Self::restore_with(Artifacts::shared()?, config)
    }

    /// Restores a booted VM, plugs in its devices, and waits until the guest has found them.
    pub fn restore_with(artifacts: &Artifacts, config: &Config) -> Result<Self> {
        let snapshot = snapshot::open(artifacts, config)?;
        let mut vm = Self::start(artifacts, config, &Origin::Snapshot(&snapshot))?;
        vm.ports = plug::plug(&vm.qmp, &config.arguments, &qemu::PORTS)?;
        if !config.arguments.is_empty() {
            // Makes the guest look for devices at once. They are found when the command ends.
            vm.run(["sh", "-c", "echo 1 >/sys/bus/pci/rescan"])?
                .require_success()?;
        }
        Ok(vm)
    }

    fn start(artifacts: &Artifacts, config: &Config, origin: &Origin<'_>) -> Result<Self> {
        let (mut qemu, ends) = Qemu::start(artifacts, config, origin)?;
        let console = Console::new(qemu.folder(), ends.console)?;
        let boots = match origin {
            Origin::Boot | Origin::BootForSnapshot(_) => 0,
            Origin::Snapshot(_) => 1,
        };
        let agent = Agent::new(ends.agent, qemu.folder().to_owned(), boots)?;
        let ready = match origin {
            Origin::Boot | Origin::BootForSnapshot(_) => agent
                .wait_ready(1, config.boot_timeout)
                .and_then(|()| Qmp::new(ends.qmp, QMP_TIMEOUT)),
            Origin::Snapshot(_) => {
                Qmp::new(ends.qmp, QMP_TIMEOUT).and_then(|qmp| snapshot::load(&qmp).map(|()| qmp))
            }
        };
        let qmp = ready.with_context(|| {
            format!(
                "the VM does not start; its logs are in {}",
                qemu.keep_logs().display()
            )
        })?;
        Ok(Self {
            agent,
            qmp,
            console,
            ports: Ports::new(),
            qemu,
        })
    }

    /// Runs a command in the guest to its end, with an empty standard input.
    pub fn run<S: Into<String>>(&self, argv: impl IntoIterator<Item = S>) -> Result<Output> {
        let process = self.spawn(argv)?;
        process.close_stdin()?;
        process.wait(COMMAND_TIMEOUT)
    }

    /// Starts a command in the guest.
    pub fn spawn<S: Into<String>>(&self, argv: impl IntoIterator<Item = S>) -> Result<Process> {
        self.agent.spawn(argv.into_iter().map(Into::into).collect())
    }

    /// Writes a file in the guest.
    pub fn put_file(&self, path: &str, content: &[u8]) -> Result<()> {
        let process = self.spawn(["sh", "-c", "cat >\"$0\"", path])?;
        process.write(content)?;
        process.close_stdin()?;
        let output = process.wait(COMMAND_TIMEOUT)?;
        output
            .require_success()
            .with_context(|| format!("{path} cannot be written in the guest"))
    }

    /// Reads a file in the guest.
    pub fn get_file(&self, path: &str) -> Result<Vec<u8>> {
        let output = self.run(["cat", path])?;
        output
            .require_success()
            .with_context(|| format!("{path} cannot be read in the guest"))?;
        Ok(output.stdout)
    }

    /// Resets the machine, as its reset button does, and waits until it has booted again.
    pub fn reset(&self) -> Result<()> {
        let boots = self.agent.boots();
        self.qmp("system_reset", &json!({}))?;
        self.agent.wait_ready(boots + 1, BOOT_TIMEOUT)
    }

    /// Suspends the guest to memory (ACPI's S3), wakes it, and waits until it runs again. Works
    /// once per boot, because the firmware loses ACPI's registers (`docs/driver.md`, section 8).
    pub fn suspend(&self) -> Result<()> {
        self.suspend_during(|| Ok(()))
    }

    /// Suspends the guest as [`Vm::suspend`] does, and calls `meanwhile` before it wakes it.
    pub fn suspend_during(&self, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
        // Leaves the standard input open, because no message may be on its way to the agent during
        // a suspend.
        let process = self.spawn(["sh", "-c", SUSPEND])?;
        self.wait_suspended()?;
        // A guest that is not woken would end the test much later.
        let result = meanwhile();
        self.qmp("system_wakeup", &json!({}))?;
        let output = process.wait(COMMAND_TIMEOUT)?;
        output
            .require_success()
            .context("the guest is not suspended")?;
        result
    }

    /// Waits until the guest has suspended the machine, and wakes it.
    pub fn wake(&self) -> Result<()> {
        self.wait_suspended()?;
        self.qmp("system_wakeup", &json!({})).map(drop)
    }

    fn wait_suspended(&self) -> Result<()> {
        self.qmp.wait_event("SUSPEND", |_| true)
    }

    /// Presses and releases the Shift key, which has no effect by itself.
    pub fn press_key(&self) -> Result<()> {
        let key = json!({ "type": "qcode", "data": "shift" });
        let event = |down| json!({ "type": "key", "data": { "down": down, "key": key } });
        let events = json!({ "events": [event(true), event(false)] });
        self.qmp("input-send-event", &events).map(drop)
    }

    /// Executes a QMP command and returns its result.
    pub fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        self.qmp.execute(command, arguments)
    }

    /// Plugs in a device. `arguments` are those of `device_add` and must have an `id`.
    pub fn plug(&self, arguments: &Value) -> Result<()> {
        let mut device = arguments.clone();
        plug::rename_port(&mut device, &self.ports);
        self.qmp("device_add", &device).map(drop)
    }

    /// Asks the guest to release a device, and waits until the device is unplugged and QEMU has
    /// freed it.
    pub fn unplug(&self, id: &str) -> Result<()> {
        self.qmp("device_del", &json!({ "id": id }))?;
        self.qmp
            .wait_event("DEVICE_DELETED", |data| data["device"] == id)?;
        thread::sleep(UNPLUGGED);
        Ok(())
    }

    /// Returns everything that the guest's kernel and init have printed so far.
    pub fn console_log(&self) -> String {
        self.console.log()
    }

    /// Returns everything that QEMU has written to standard error so far.
    pub fn errors(&self) -> String {
        let errors = std::fs::read(self.qemu.folder().join(console::ERRORS));
        String::from_utf8_lossy(&errors.unwrap_or_default()).into_owned()
    }

    /// Returns the ends of QEMU's and the console's logs, for an error message.
    pub fn last_words(&self) -> String {
        console::tail(self.qemu.folder())
    }

    /// Connects the caller's terminal to the guest's console until the user presses Ctrl-], or the
    /// terminal is gone.
    pub fn attach_terminal(&self) -> Result<()> {
        self.console.attach_terminal(std::io::stdin().as_fd())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let folder = self.qemu.keep_logs();
            eprintln!(
                "{}\nall of it is in {}",
                console::tail(&folder),
                folder.display()
            );
        }
    }
}
