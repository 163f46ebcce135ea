// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The state that a broker's threads share, without the threads.

use std::sync::{Arc, LazyLock};

use barlink_broker::broker::{Broker, BrokerState, Config, Policy, Reserve};
use barlink_broker::slot::Vmm;
use barlink_broker::socket::Peer;
use barlink_broker::transport::{Ivshmem, Transport, VfioUser, VhostUser};
use rustix::fs::{Mode, OFlags};

/// The process that VMs connect from.
pub const PEER: Peer = Peer {
    pid: 1,
    uid: 0,
    gid: 0,
};

/// Returns the process of a client's VMM, whose end the broker cannot see.
pub fn vmm() -> Vmm {
    Vmm::new(PEER.pid, None)
}

/// The state of a broker with one slot over ivshmem, created once.
pub static IVSHMEM: LazyLock<Arc<BrokerState>> = LazyLock::new(|| broker(Arc::new(Ivshmem)));

/// The state of a broker with one slot over vfio-user, created once.
pub static VFIO_USER: LazyLock<Arc<BrokerState>> =
    LazyLock::new(|| broker(Arc::new(VfioUser::default())));

/// The state of a broker with one slot over vhost-user, created once.
pub static VHOST_USER: LazyLock<Arc<BrokerState>> = LazyLock::new(|| broker(Arc::new(VhostUser)));

fn broker(transport: Arc<dyn Transport>) -> Arc<BrokerState> {
    let folder = std::env::temp_dir().join(format!("barlink-fuzz-{}", std::process::id()));
    std::fs::create_dir(&folder).expect("a folder for sockets");
    let config = Config {
        size: 1 << 20,
        vectors: 0,
        channels: Vec::new(),
        reserve: Reserve::default(),
        slots: vec![(transport, folder.join("vm.sock"))],
        control: folder.join("control.sock"),
        policy: Policy::new(Vec::new(), Vec::new()),
    };
    let broker = Broker::new(config, Default::default()).expect("a broker");
    let state = Arc::clone(broker.state());
    // The broker is never dropped, because no client connects and the process can be ended at any
    // time.
    std::mem::forget(broker);
    std::fs::remove_dir_all(&folder).expect("the folder is there");
    state
}

/// Returns the number that the next descriptor gets. It stays the same if no descriptor is left
/// open.
pub fn next_descriptor() -> i32 {
    use std::os::fd::AsRawFd;
    let file = rustix::fs::open("/dev/null", OFlags::RDONLY, Mode::empty());
    file.expect("/dev/null").as_raw_fd()
}
