// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The setup of other projects' ways between a guest and its host: processes on the host, arguments
//! of QEMU, and commands in the guest. A way is set up only if it is measured. If the setup of one
//! fails, the others are still measured.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Error, Result, bail};
use barlink_bench_load::FILES;

use super::case::Way;
use super::daemon::Daemon;
use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::setup;
use barlink_vm::Vm;

/// The host's address in QEMU's user network.
const GATEWAY: &str = "10.0.2.2";
/// Kernel modules that the guest needs for TCP and for vsock, in the order of loading.
const NETWORK: [&str; 3] = [
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
];
const VSOCK: [&str; 3] = [
    "net/vmw_vsock/vsock.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport.ko",
];

/// The published program that serves vsock, and its version.
const VSOCK_DEVICE: [&str; 2] = ["vhost-device-vsock", "0.3.0"];
/// A port of the host, and the first part of the socket's file name. The device appends `_` and the
/// port.
const VSOCK_PORT: u32 = 1024;
const VSOCK_HOST: &str = "vsock-host";

/// The path of virtiofsd in Debian's package.
const VIRTIOFSD: &str = "/usr/libexec/virtiofsd";
/// The shared folder: its name on the host, which is also its tag, and its mount point in the
/// guest.
const SHARE: &str = "share";
const MOUNT: &str = "/tmp/share";

/// The peers that are measured and need a setup.
#[derive(Debug)]
pub struct Peers {
    folder: PathBuf,
    peers: Vec<Peer>,
}

#[derive(Debug)]
struct Peer {
    way: Way,
    daemon: Option<Daemon>,
    /// The reason why the setup failed.
    failure: Option<String>,
}

/// The arguments of QEMU, and the process that it connects to.
type Device = (Vec<String>, Option<Daemon>);

impl Peers {
    /// Builds programs that these ways need and that are not there yet, which can take minutes. A
    /// failure occurs again where the program is used, and is reported there.
    pub fn build(ways: &[Way]) {
        if ways.contains(&Way::Vsock) {
            let [name, version] = VSOCK_DEVICE;
            let _ = setup::program(name, version);
        }
    }

    /// Starts the processes on the host that these ways need, with their files in `folder`, and
    /// appends to QEMU's arguments.
    pub fn start(
        ways: &[Way],
        artifacts: &Artifacts,
        folder: &Path,
        arguments: &mut Vec<String>,
    ) -> Self {
        let mut peers = Vec::new();
        for &way in ways {
            let device = match way {
                Way::Tcp => {
                    let net = "-netdev user,id=net -device virtio-net-pci,netdev=net,romfile=";
                    Ok((words(net), None))
                }
                Way::Vsock => vsock(folder),
                Way::Virtiofs => virtiofs(artifacts, folder),
                _ => continue,
            };
            let mut peer = Peer {
                way,
                daemon: None,
                failure: None,
            };
            match device {
                Ok((added, daemon)) => {
                    arguments.extend(added);
                    peer.daemon = daemon;
                }
                Err(error) => peer.failure = Some(first_line(&error)),
            }
            peers.push(peer);
        }
        Self {
            folder: folder.to_owned(),
            peers,
        }
    }

    /// Prepares the guest.
    pub fn connect(&mut self, vm: &Vm, artifacts: &Artifacts) {
        let image = &artifacts.tools.kernel_image;
        let modules = image.parent().unwrap_or(Path::new("")).join("kernel");
        for peer in self.peers.iter_mut().filter(|peer| peer.failure.is_none()) {
            let connected = match peer.way {
                Way::Tcp => load(vm, &modules, NETWORK).and_then(|()| {
                    let address = "ip link set lo up && ip link set eth0 up && ip address add 10.0.2.15/24 dev eth0";
                    shell(vm, address)
                }),
                Way::Vsock => load(vm, &modules, VSOCK),
                _ => shell(vm, &format!("mkdir {MOUNT} && mount -t virtiofs {SHARE} {MOUNT}")),
            };
            if let Err(error) = connected {
                peer.failure = Some(first_line(&error));
            }
        }
    }

    /// Returns a path in the folder, and removes an existing file there.
    fn fresh_file(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        if path.exists() {
            fs::remove_file(&path)?;
        }
        Ok(path)
    }

    /// Returns the two ends of a way, the host's first. Removes the files of an earlier use.
    pub fn endpoints(&self, way: Way) -> Result<[String; 2]> {
        let peer = self.peers.iter().find(|peer| peer.way == way);
        if let Some(failure) = peer.and_then(|peer| peer.failure.as_ref()) {
            bail!("it is not there: {failure}");
        }
        if let Some(daemon) = peer.and_then(|peer| peer.daemon.as_ref()) {
            daemon.check()?;
        }
        Ok(match way {
            Way::Tcp => {
                // The port is free at this moment.
                let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
                [
                    format!("tcp-listen:127.0.0.1:{port}"),
                    format!("tcp:{GATEWAY}:{port}"),
                ]
            }
            Way::Vsock => {
                let path = self.fresh_file(&format!("{VSOCK_HOST}_{VSOCK_PORT}"))?;
                [
                    format!("unix-listen:{}", path.display()),
                    format!("vsock:{VSOCK_PORT}"),
                ]
            }
            Way::Virtiofs => {
                for name in FILES {
                    File::create_new(self.fresh_file(&format!("{SHARE}/{name}"))?)?;
                }
                [
                    format!("host-files:{}", self.folder.join(SHARE).display()),
                    format!("guest-files:{MOUNT}"),
                ]
            }
            _ => bail!("nothing is known of the ends of {}", way.name()),
        })
    }
}

/// Returns the first line of an error, which fits into a cell of a table.
pub fn first_line(error: &Error) -> String {
    let text = format!("{error:#}");
    text.lines().next().unwrap_or_default().to_owned()
}

/// Starts a vsock device that connects to processes of the host through Unix sockets, so that the
/// host's kernel needs no vsock.
fn vsock(folder: &Path) -> Result<Device> {
    let [name, version] = VSOCK_DEVICE;
    let program = setup::program(name, version)?;
    let socket = folder.join("vsock.sock");
    // A process in a sandbox ends with the process that started it. This one is in no sandbox, so
    // `setpriv` makes it end with the bench.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    // The device keeps its default buffer size, because version 0.3.0 hangs with a larger one, even
    // for the smallest records from the guest.
    command.arg("--socket").arg(&socket);
    command.arg("--uds-path").arg(folder.join(VSOCK_HOST));
    let daemon = Daemon::start(name, command, folder, &socket)?;
    let device = format!(
        "-chardev socket,id=vsock,path={} -device vhost-user-vsock-pci,chardev=vsock",
        socket.display()
    );
    Ok((words(&device), Some(daemon)))
}

/// Starts virtiofsd, which shares a folder of the host.
fn virtiofs(artifacts: &Artifacts, folder: &Path) -> Result<Device> {
    fs::create_dir(folder.join(SHARE))?;
    let socket = folder.join("virtiofs.sock");
    let mut command = match &artifacts.tools.sandbox {
        Some(sandbox) => sandbox.enter().bind(folder, folder).run(VIRTIOFSD),
        None => {
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL", "--", VIRTIOFSD]);
            command
        }
    };
    command.arg("--socket-path").arg(&socket);
    command.arg("--shared-dir").arg(folder.join(SHARE));
    command.args([
        // In each other mode the guest caches the length of a file for a second.
        "--cache=never",
        // virtiofsd's own sandbox needs namespaces, which root in a container may not create. The
        // guest is trusted here, and the folder has no other use.
        "--sandbox=none",
    ]);
    let daemon = Daemon::start("virtiofsd", command, folder, &socket)?;
    let device = format!(
        "-chardev socket,id=virtiofs,path={} -device vhost-user-fs-pci,chardev=virtiofs,tag={SHARE}",
        socket.display()
    );
    Ok((words(&device), Some(daemon)))
}

/// Loads modules of the guest's kernel from a folder of the host.
fn load(vm: &Vm, folder: &Path, modules: [&str; 3]) -> Result<()> {
    for module in modules {
        let path = folder.join(format!("{module}.xz"));
        let packed =
            fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        vm.put_file("/tmp/module.ko.xz", &packed)?;
        shell(
            vm,
            "unxz -f /tmp/module.ko.xz && insmod /tmp/module.ko && rm /tmp/module.ko",
        )?;
    }
    Ok(())
}

fn shell(vm: &Vm, line: &str) -> Result<()> {
    vm.run(["sh", "-c", line])?.require_success()
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}
