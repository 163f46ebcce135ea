// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The QEMU process: its arguments, its descriptors and its start.

use std::fs;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use barlink_agent::PORT;
use command_fds::{CommandFdExt, FdMapping};
use tempfile::TempDir;

use crate::accelerator::{KVM, accelerator};
use crate::console::{ERRORS, LOG};
use crate::running::Running;
use crate::{Config, FIRST_FILE, FREE_PORT, Iommu, Origin};
use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::tools::{Accel, Qemu as Program};

/// Character devices that are connected to this process: name, and descriptor number in QEMU.
const QMP: (&str, i32) = ("qmp", 3);
const AGENT: (&str, i32) = ("agent", 4);
const CONSOLE: (&str, i32) = ("console", 5);

/// Descriptor number of a snapshot in QEMU, and the URI of that file for QEMU's migration.
const SNAPSHOT_FILE: i32 = 6;
pub(crate) const SNAPSHOT: &str = "file:/proc/self/fd/6";

/// Root ports of a guest that can be restored. The driver's checks need five.
pub(crate) const PORTS: [&str; 6] = ["port0", "port1", "port2", "port3", "port4", FREE_PORT];

/// A QEMU process. It ends when this is dropped, and when this process ends.
#[derive(Debug)]
pub(crate) struct Qemu {
    /// Dropped first, because QEMU writes to the folder.
    _process: Running,
    /// Folder of its logs.
    folder: TempDir,
}

/// This process's ends of the connections to QEMU.
pub(crate) struct Ends {
    pub(crate) qmp: UnixStream,
    pub(crate) agent: UnixStream,
    /// Present if the console is interactive.
    pub(crate) console: Option<UnixStream>,
}

impl Qemu {
    /// Starts QEMU, and returns the connections to it.
    pub(crate) fn start(
        artifacts: &Artifacts,
        config: &Config,
        origin: &Origin<'_>,
    ) -> Result<(Self, Ends)> {
        let folder = TempDir::with_prefix_in("vm-", &artifacts.logs)?;
        let accel = accelerator(artifacts);
        let mut command = program(artifacts, config, folder.path(), accel)?;
        arguments(&mut command, artifacts, config, folder.path(), accel);
        match origin {
            Origin::Boot => {
                command.args(&config.arguments);
            }
            Origin::BootForSnapshot(_) => {
                command.args(port_arguments());
            }
            Origin::Snapshot(_) => {
                command.args(port_arguments());
                command.args(["-incoming", "defer"]);
            }
        }

        // Socket pairs need no paths, so nothing is bound or removed, and no other process can
        // connect.
        let (qmp, qmp_end) = UnixStream::pair()?;
        let (agent, agent_end) = UnixStream::pair()?;
        let mut descriptors = vec![mapping(qmp_end, QMP), mapping(agent_end, AGENT)];
        let console = if config.interactive {
            let (console, console_end) = UnixStream::pair()?;
            descriptors.push(mapping(console_end, CONSOLE));
            Some(console)
        } else {
            None
        };
        if let Origin::BootForSnapshot(file) | Origin::Snapshot(file) = origin {
            let parent_fd = file.try_clone()?.into();
            descriptors.push(FdMapping {
                parent_fd,
                child_fd: SNAPSHOT_FILE,
            });
        }
        for (child_fd, file) in (FIRST_FILE..).zip(&config.files) {
            let parent_fd = file.try_clone()?.into();
            descriptors.push(FdMapping {
                parent_fd,
                child_fd,
            });
        }
        command.fd_mappings(descriptors)?;
        let errors = File::create(folder.path().join(ERRORS))?;
        command
            .stdin(Stdio::null())
            .stdout(errors.try_clone()?)
            .stderr(errors);

        let qemu = Self {
            _process: Running::start(command)?,
            folder,
        };
        Ok((
            qemu,
            Ends {
                qmp,
                agent,
                console,
            },
        ))
    }

    /// Keeps the logs after the VM has ended, and returns their folder.
    pub(crate) fn keep_logs(&mut self) -> PathBuf {
        self.folder.disable_cleanup(true);
        self.folder().to_owned()
    }

    /// Returns the folder of the logs.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }
}

pub(crate) fn mapping(stream: UnixStream, (_, child_fd): (&str, i32)) -> FdMapping {
    FdMapping {
        parent_fd: stream.into(),
        child_fd,
    }
}

/// Makes the command without arguments, with access to the files that QEMU needs.
pub(crate) fn program(
    artifacts: &Artifacts,
    config: &Config,
    folder: &Path,
    accel: Accel,
) -> Result<Command> {
    match &artifacts.tools.qemu {
        Program::Sandboxed(sandbox) => {
            let mut enter = sandbox
                .enter()
                .bind_read_only(&artifacts.tools.kernel_image)
                .bind_read_only(&artifacts.initramfs)
                .bind_read_only(artifacts.bare_guest())
                .bind(folder, folder);
            for path in &config.paths {
                let path = fs::canonicalize(path)
                    .with_context(|| format!("{} cannot be used", path.display()))?;
                enter = enter.bind(&path, &path);
            }
            if accel == Accel::Kvm {
                enter = enter.device(Path::new(KVM));
            }
            Ok(enter.run("qemu-system-x86_64"))
        }
        Program::Own(path) => {
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL", "--"]).arg(path);
            Ok(command)
        }
    }
}

/// Returns the object `ram`, which is the guest's memory.
pub(crate) fn memory(config: &Config) -> String {
    let kind = match config.shared_memory {
        true => "memory-backend-memfd,share=on",
        false => "memory-backend-ram",
    };
    let preallocated = if config.preallocated { "on" } else { "off" };
    let size = config.memory_mib;
    format!("{kind},id=ram,size={size}M,prealloc={preallocated}")
}

/// Returns the arguments for the IOMMU, if there is one. In caching mode the guest reports each
/// mapping to the IOMMU, so that QEMU can report it to the server of a vfio-user device.
pub(crate) fn iommu(config: &Config) -> &'static [&'static str] {
    match config.iommu {
        Some(Iommu::Remapping) => &["-device", "intel-iommu,intremap=on,caching-mode=on"],
        Some(Iommu::Translating) => &["-device", "intel-iommu,intremap=off,caching-mode=on"],
        None => &[],
    }
}

/// Returns the arguments for an accelerator and for the processor that it shows the guest.
pub(crate) fn processor(accel: Accel, config: &Config) -> [&'static str; 4] {
    let (accel, cpu) = match accel {
        // The kernel's own I/O APIC does not support interrupt remapping, so QEMU emulates it.
        Accel::Kvm if config.iommu.is_some() => ("kvm,kernel-irqchip=split", "host"),
        Accel::Kvm => ("kvm", "host"),
        // TCG translates `rep movsb` byte by byte, and kernels use it where these two features are.
        // Without them the guest's kernel reads a tmpfs at 1400 MB/s instead of 30, and writes it
        // twice as fast.
        Accel::Tcg => ("tcg,thread=multi", "max,-erms,-fsrm"),
    };
    ["-accel", accel, "-cpu", cpu]
}

/// Returns a path as a part of an option's value. Its commas are doubled, because a single comma
/// ends the part.
pub(crate) fn option_value(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn arguments(
    command: &mut Command,
    artifacts: &Artifacts,
    config: &Config,
    folder: &Path,
    accel: Accel,
) {
    let log = option_value(&folder.join(LOG));
    let console = if config.interactive {
        format!("socket,id={},fd={},logfile={log}", CONSOLE.0, CONSOLE.1)
    } else {
        format!("file,id={},path={log}", CONSOLE.0)
    };
    // On a busy host, virtual processors wait long for a real one. Without these options the
    // guest's kernel would then distrust its clock and change to a much slower one, or panic at
    // boot because its timer seems to stand still.
    let mut words = "console=ttyS0 tsc=reliable no_timer_check".to_owned();
    if config.iommu.is_some() {
        words += " intel_iommu=on";
    }
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args([
            "-machine",
            &format!("{},memory-backend=ram", config.machine),
        ])
        .args(processor(accel, config))
        .arg("-object")
        .arg(memory(config))
        .args(["-m", &format!("{}M", config.memory_mib)])
        .args(["-smp", &config.cpus.to_string()])
        .arg("-kernel")
        .arg(&artifacts.tools.kernel_image)
        .arg("-initrd")
        .arg(&artifacts.initramfs)
        .args(["-append", &words])
        .args(iommu(config))
        .args(["-chardev", &console])
        .args(["-serial", &format!("chardev:{}", CONSOLE.0)])
        .args(["-chardev", &format!("socket,id={},fd={}", QMP.0, QMP.1)])
        .args(["-qmp", &format!("chardev:{}", QMP.0)])
        .args(["-chardev", &format!("socket,id={},fd={}", AGENT.0, AGENT.1)])
        .args(["-device", "virtio-serial-pci"])
        .args([
            "-device",
            &format!("virtserialport,chardev={},name={PORT}", AGENT.0),
        ]);
    if config.ends_on_reboot {
        command.arg("-no-reboot");
    }
}

/// Returns the root ports of a guest that can be restored, with windows as `barlink qemu-args` has
/// them for a region of 16 GiB, the largest of a test.
fn port_arguments() -> Vec<String> {
    let mut arguments = Vec::new();
    for (port, chassis) in PORTS.iter().zip(1..) {
        let port = format!("pcie-root-port,id={port},chassis={chassis},pref64-reserve=32G");
        arguments.extend(["-device".to_owned(), port]);
    }
    arguments
}
