// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Other projects' ways between a guest and its host: what each needs on the host, of QEMU and in the guest, set up only
//! if it is measured. A peer that cannot be set up is no reason not to measure the others.

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

/// The host, as the guest sees it through QEMU's user network.
const GATEWAY: &str = "10.0.2.2";
/// What the guest needs for TCP, and for vsock, in this order.
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
/// A port of the host's, and the socket that stands for it; the device makes the latter's name of two parts.
const VSOCK_PORT: u32 = 1024;
const VSOCK_HOST: &str = "vsock-host";

/// Where Debian's package has it.
const VIRTIOFSD: &str = "/usr/libexec/virtiofsd";
/// The shared folder: its name on the host, which is also its tag, and where the guest has it.
const SHARE: &str = "share";
const MOUNT: &str = "/tmp/share";

/// The peers that are measured and need something to be set up.
#[derive(Debug)]
pub struct Peers {
    folder: PathBuf,
    peers: Vec<Peer>,
}

#[derive(Debug)]
struct Peer {
    way: Way,
    daemon: Option<Daemon>,
    /// What kept it from being set up.
    failure: Option<String>,
}

/// What QEMU is told, and the process that it talks to.
type Device = (Vec<String>, Option<Daemon>);

impl Peers {
    /// Builds what these ways need and is not there yet, which can take minutes. If it fails, that is found again, and told, where
    /// it is used.
    pub fn build(ways: &[Way]) {
        if ways.contains(&Way::Vsock) {
            let [name, version] = VSOCK_DEVICE;
            let _ = setup::program(name, version);
        }
    }

    /// Starts on the host what these ways need, with its files in `folder`, and adds to QEMU's arguments.
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
                Err(error) => peer.failure = Some(told(&error)),
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
                peer.failure = Some(told(&error));
            }
        }
    }

    /// A file that is not there.
    fn fresh_file(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        if path.exists() {
            fs::remove_file(&path)?;
        }
        Ok(path)
    }

    /// The two ends of a way, the host's first, with nothing of an earlier use.
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
                // Free at this moment.
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

/// What went wrong, as far as it fits into a cell of a table.
pub fn told(error: &Error) -> String {
    let text = format!("{error:#}");
    text.lines().next().unwrap_or_default().to_owned()
}

/// A vsock device whose other end is a process of the host's: the host's kernel need not have vsock.
fn vsock(folder: &Path) -> Result<Device> {
    let [name, version] = VSOCK_DEVICE;
    let program = setup::program(name, version)?;
    let socket = folder.join("vsock.sock");
    // This one is in no sandbox, whose processes end with who started them.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    // The size of its buffer is left as it is: 0.3.0 hangs with a larger one, even for the smallest records from the guest.
    command.arg("--socket").arg(&socket);
    command.arg("--uds-path").arg(folder.join(VSOCK_HOST));
    let daemon = Daemon::start(name, command, folder, &socket)?;
    let device = format!(
        "-chardev socket,id=vsock,path={} -device vhost-user-vsock-pci,chardev=vsock",
        socket.display()
    );
    Ok((words(&device), Some(daemon)))
}

/// A folder of the host's.
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
        // Any other lets the guest believe for a second that a file is as long as it was.
        "--cache=never",
        // Its own sandbox needs namespaces, which a container's root may not make. The guest here is our own, and the folder
        // is for this alone.
        "--sandbox=none",
    ]);
    let daemon = Daemon::start("virtiofsd", command, folder, &socket)?;
    let device = format!(
        "-chardev socket,id=virtiofs,path={} -device vhost-user-fs-pci,chardev=virtiofs,tag={SHARE}",
        socket.display()
    );
    Ok((words(&device), Some(daemon)))
}

/// Loads modules of the guest's kernel, from the folder that has them.
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
