// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A virtual machine under test: a stock QEMU and kernel, and an agent that runs commands in the guest.
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
mod plug;
mod qemu;
mod qmp;
pub mod service;
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

pub use self::accelerator::{accelerator, check_accelerator};
use self::agent::Agent;
pub use self::agent::{Output, Process};
pub use self::bare::{Bare, PciDevice};
use self::console::Console;
use self::plug::Ports;
use self::qemu::Qemu;
use self::qmp::Qmp;
pub use self::snapshot::remove_snapshots;
use barlink_sandbox::builds::Artifacts;

/// How long a guest may take until its agent answers. A boot takes 4 s under TCG on an idle machine.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a command in the guest may take, unless the caller says otherwise.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// How long QEMU may take for what it does itself.
pub const QMP_TIMEOUT: Duration = Duration::from_secs(60);

/// How long QEMU may still have something of a device that was unplugged. ivshmem's closes the descriptor of its memory a second
/// time when it is rid of all that it was mapped for, some 10 ms later; by then nothing else is to have its number
/// (`docs/decisions/0005-hot-unplug.md`).
const UNPLUGGED: Duration = Duration::from_millis(300);

/// What suspends a guest. The kernel asks whether the host has the agent's port open when it cannot hear the answer yet, and takes it for
/// closed ever after, unless it looks at it anew.
const SUSPEND: &str = "echo deep >/sys/power/mem_sleep && echo mem >/sys/power/state
    slept=$?
    cd /sys/bus/virtio/drivers/virtio_console || exit
    for port in virtio*; do echo $port >unbind; echo $port >bind; done
    exit $slept";

/// The descriptor that QEMU has the first of [`Config::files`] as.
pub const FIRST_FILE: i32 = 10;

/// The ID of a restored guest's last root port, at which a test can plug in a device of its own.
pub const FREE_PORT: &str = "port5";

/// What a VM is made of.
#[derive(Clone, Debug)]
pub struct Config {
    /// The guest's memory, in MiB.
    pub memory_mib: u32,
    /// Its processors.
    pub cpus: u32,
    /// What QEMU calls the machine.
    pub machine: &'static str,
    /// Further arguments for QEMU, such as `barlink qemu-args` prints.
    pub arguments: Vec<String>,
    /// Files and folders that these arguments name; QEMU sees no others. Each must exist, and not be below `/usr` or
    /// `/etc`.
    pub paths: Vec<PathBuf>,
    /// Files that these arguments name as `/proc/self/fd/NUMBER`, from [`FIRST_FILE`] on.
    pub files: Vec<Arc<File>>,
    /// Whether the host is to have all of the guest's memory at hand from the start, rather than page by page on first
    /// use: for what is timed.
    pub preallocated: bool,
    /// Whether other processes are to share the guest's memory, which vhost-user needs.
    pub shared_memory: bool,
    /// Whether there is an IOMMU between devices and the guest's memory, which remaps interrupts as well, and which the
    /// guest's kernel uses.
    pub iommu: bool,
    /// Whether QEMU ends when the guest reboots, instead of booting it again.
    pub ends_on_reboot: bool,
    /// How long the guest may take until its agent answers.
    pub boot_timeout: Duration,
    /// Whether the console is to be connected to a terminal, by [`Vm::attach_terminal`].
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
            iommu: false,
            ends_on_reboot: false,
            boot_timeout: BOOT_TIMEOUT,
            interactive: false,
        }
    }
}

/// Where a VM's guest comes from.
enum Origin<'a> {
    /// It boots.
    Boot,
    /// It boots, with the free root ports of a snapshot, which is written to this file later.
    BootForSnapshot(&'a File),
    /// It is read from this file.
    Snapshot(&'a File),
}

/// A running VM; dropping it ends it, and where the caller panics, shows the end of its console.
#[derive(Debug)]
pub struct Vm {
    agent: Agent,
    qmp: Qmp,
    console: Console,
    /// The root ports of a restored guest, by the names that its configuration has for them.
    ports: Ports,
    // Dropped last, since it ends what the others talk to.
    qemu: Qemu,
}

impl Vm {
    /// Boots a VM with [`Artifacts::shared`]: for a test of what happens at boot.
    pub fn boot(config: &Config) -> Result<Self> {
        Self::boot_with(Artifacts::shared()?, config)
    }

    /// Boots a VM and waits for its agent.
    pub fn boot_with(artifacts: &Artifacts, config: &Config) -> Result<Self> {
        Self::start(artifacts, config, &Origin::Boot)
    }

    /// Boots a VM that has free root ports, and can be written to a file.
    fn boot_for_snapshot(artifacts: &Artifacts, config: &Config, file: &File) -> Result<Self> {
        Self::start(artifacts, config, &Origin::BootForSnapshot(file))
    }

    /// Restores a VM that has booted with [`Artifacts::shared`], in a tenth of the time of a boot, and plugs in what
    /// [`Config::arguments`] describe, which must be devices and what they need.
    pub fn restore(config: &Config) -> Result<Self> {
        Self::restore_with(Artifacts::shared()?, config)
    }

    /// Restores a VM, plugs in its devices, and waits until the guest has found them.
    pub fn restore_with(artifacts: &Artifacts, config: &Config) -> Result<Self> {
        let snapshot = snapshot::open(artifacts, config)?;
        let mut vm = Self::start(artifacts, config, &Origin::Snapshot(&snapshot))?;
        vm.ports = plug::plug(&vm.qmp, &config.arguments, &qemu::PORTS)?;
        if !config.arguments.is_empty() {
            // The guest looks for devices itself, rather than when it hears of them: with the end of this they are there.
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

    /// Runs a command in the guest to its end, with nothing on its standard input.
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

    /// Resets the machine, as its reset button would, and waits until it has booted again.
    pub fn reset(&self) -> Result<()> {
        let boots = self.agent.boots();
        self.qmp("system_reset", &json!({}))?;
        self.agent.wait_ready(boots + 1, BOOT_TIMEOUT)
    }

    /// Has the guest suspend the machine to memory (ACPI's S3), wakes it, and waits until the guest goes on: at most once from one
    /// boot to the next, since the firmware loses ACPI's registers (`docs/driver.md`, section 8).
    pub fn suspend(&self) -> Result<()> {
        // Nothing must be on its way to the agent then, not even that there is no input.
        let process = self.spawn(["sh", "-c", SUSPEND])?;
        self.wake()?;
        let output = process.wait(COMMAND_TIMEOUT)?;
        output
            .require_success()
            .context("the guest is not suspended")
    }

    /// Waits until the guest has suspended the machine, and wakes it.
    pub fn wake(&self) -> Result<()> {
        self.qmp.wait_event("SUSPEND", |_| true)?;
        self.qmp("system_wakeup", &json!({})).map(drop)
    }

    /// Presses and releases a key of the keyboard: one that does nothing by itself.
    pub fn press_key(&self) -> Result<()> {
        let key = json!({ "type": "qcode", "data": "shift" });
        let event = |down| json!({ "type": "key", "data": { "down": down, "key": key } });
        let events = json!({ "events": [event(true), event(false)] });
        self.qmp("input-send-event", &events).map(drop)
    }

    /// Executes a QMP command and gives what it returns.
    pub fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        self.qmp.execute(command, arguments)
    }

    /// Plugs a device in; `arguments` are those of `device_add`, and must hold an `id`.
    pub fn plug(&self, arguments: &Value) -> Result<()> {
        let mut device = arguments.clone();
        plug::rename_port(&mut device, &self.ports);
        self.qmp("device_add", &device).map(drop)
    }

    /// Asks the guest to let go of a device, and waits until it is out and QEMU rid of it.
    pub fn unplug(&self, id: &str) -> Result<()> {
        self.qmp("device_del", &json!({ "id": id }))?;
        self.qmp
            .wait_event("DEVICE_DELETED", |data| data["device"] == id)?;
        thread::sleep(UNPLUGGED);
        Ok(())
    }

    /// What the guest's kernel and init have printed so far.
    pub fn console_log(&self) -> String {
        self.console.log()
    }

    /// What QEMU has written to standard error so far.
    pub fn errors(&self) -> String {
        let errors = std::fs::read(self.qemu.folder().join(console::ERRORS));
        String::from_utf8_lossy(&errors.unwrap_or_default()).into_owned()
    }

    /// The last of what QEMU and the guest's console have said, for a failure's message.
    pub fn last_words(&self) -> String {
        console::tail(self.qemu.folder())
    }

    /// Connects the caller's terminal to the guest's console until the user presses Ctrl-], or the terminal is gone.
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
