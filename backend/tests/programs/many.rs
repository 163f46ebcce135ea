// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of several named brokers at once, each with VMs over both transports.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use barlink::Access;
use barlink::host::AttachOptions;
use rustix::process::Signal;

use crate::support::*;
use crate::vmm::{self, handshake};

const NAMES: [&str; 6] = ["red", "green", "blue", "vm-1", "vm_2", "a.b"];
/// Number of eventfds: 5 for each of two slots and the host. Each peer has a vector for control and
/// one for each channel, of which each slot has two.
const EVENTFDS: usize = 3 * 5;

/// Brokers of one user. Dropping this value kills them.
struct Brokers {
    folder: tempfile::TempDir,
    all: HashMap<&'static str, Program>,
}

impl Brokers {
    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// Returns a command that runs `barlink` with these arguments at the broker with this name.
    fn app(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = barlink(arguments);
        command.args(["--name", name]);
        command.env("XDG_RUNTIME_DIR", self.folder.path());
        command
    }

    fn serve(&self, name: &str) -> Command {
        let mut command = self.app(name, &["serve", "--size", "1M"]);
        let vm = self.path(&format!("{name}-vm.sock"));
        let user = self.path(&format!("{name}-user.sock"));
        command.arg("--ivshmem").arg(vm);
        command.arg("--vfio-user").arg(user);
        command
    }

    fn start(&mut self, name: &'static str) {
        let mut command = self.serve(name);
        let child = command.stderr(Stdio::null()).start();
        self.all.insert(name, child);
        wait_until("the broker listens", || {
            run(&mut self.app(name, &["inspect", "--json"]))
                .status
                .success()
        });
    }
}

/// One VM over each transport, at one broker.
struct Vms {
    ivshmem: vmm::Vm,
    vfio_user: vfio_user::Client,
}

impl Vms {
    fn connect(brokers: &Brokers, name: &str) -> Self {
        let path = |which: &str| brokers.path(&format!("{name}-{which}.sock"));
        let socket = vmm::connect_to(&path("vm"));
        Vms {
            ivshmem: handshake(socket, EVENTFDS),
            vfio_user: vfio_user::Client::new(&path("user")).unwrap(),
        }
    }

    /// Reads the same bytes of the region through each VM.
    fn bytes(&self, offset: u64) -> [String; 2] {
        let region = self.vfio_user.region(2).unwrap();
        let memory = region.file_offset.as_ref().unwrap();
        let read = |memory: &dyn std::os::fd::AsFd| {
            let mut bytes = [0; 8];
            rustix::io::pread(memory, &mut bytes, offset).unwrap();
            String::from_utf8_lossy(&bytes)
                .trim_end_matches('\0')
                .to_owned()
        };
        [read(&self.ivshmem.memory), read(memory.file())]
    }

    /// Counts the rings of all vectors of all peers since the last call.
    fn rings(&self) -> u64 {
        let eventfds = self.ivshmem.eventfds.iter();
        eventfds
            .map(|(_, eventfd): &(_, OwnedFd)| vmm::rings(eventfd))
            .sum()
    }

    /// Makes the VM over vfio-user ring the other VM.
    fn ring(&mut self) {
        let doorbell = 1u32.to_le_bytes();
        self.vfio_user.region_write(0, 12, &doorbell).unwrap();
    }
}

/// Returns the offset of the raw window, in bytes.
fn raw_window(brokers: &Brokers, name: &str) -> u64 {
    let control: &Path = &brokers.path(&format!("barlink/{name}.sock"));
    let attachment = AttachOptions::new()
        .access(Access::ReadOnly)
        .connect_path(control);
    attachment.unwrap().layout().raw_offset
}

/// The published client has no timeouts of its own.
#[test]
fn named_brokers_are_independent_over_both_transports() {
    within_the_limit("all brokers answer", named_brokers_are_independent);
}

fn named_brokers_are_independent() {
    let mut brokers = Brokers {
        folder: tempfile::tempdir().unwrap(),
        all: HashMap::new(),
    };
    for name in NAMES {
        brokers.start(name);
    }
    let vms = NAMES.map(|name| (name, Vms::connect(&brokers, name)));
    let mut vms = HashMap::from(vms);
    let raw = raw_window(&brokers, "red");
    for name in NAMES {
        works(&mut brokers.app(name, &["poke", name]));
    }
    for (name, vms) in &vms {
        assert_eq!(vms.bytes(raw), [*name; 2]);
        vms.rings();
    }
    for name in NAMES {
        vms.get_mut(name).unwrap().ring();
        for (other, vms) in &vms {
            assert_eq!(vms.rings(), u64::from(*other == name), "{name} {other}");
        }
    }
    // No second broker can have the same name.
    let other = brokers.path("other.sock");
    let mut second = brokers.app("red", &["serve", "--vfio-user", other.to_str().unwrap()]);
    fails(&mut second, 1, &["red.sock is in use by another broker"]);
    // The death of one broker does not affect the others, and its name is free for the next broker.
    let mut red = brokers.all.remove("red").unwrap();
    signal_child(&red, Signal::KILL);
    wait(&mut red);
    fails(
        &mut brokers.app("red", &["peek"]),
        3,
        &["no broker `red` in", "barlink list"],
    );
    vms.remove("red");
    for (name, vms) in &mut vms {
        vms.ring();
        assert_eq!(vms.rings(), 1, "{name}");
        works(&mut brokers.app(name, &["poke", "again"]));
        assert!(vms.bytes(raw).iter().all(|text| text.starts_with("again")));
    }
    brokers.start("red");
    let mut red = Vms::connect(&brokers, "red");
    assert_eq!(red.bytes(raw), [""; 2], "it has its predecessor's memory");
    red.rings();
    red.ring();
    assert_eq!(red.rings(), 1);
    assert!(vms.values().all(|vms| vms.rings() == 0));
}
