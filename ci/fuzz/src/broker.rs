// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a broker's threads share, without its threads.

use std::sync::{Arc, LazyLock};

use barlink_broker::broker::{Broker, Config, Peer, Policy, Shared};
use barlink_broker::transport::{Ivshmem, Transport, VfioUser, VhostUser};
use rustix::fs::{Mode, OFlags};

/// VMs connect from here.
pub const PEER: Peer = Peer {
    pid: 1,
    uid: 0,
    gid: 0,
};

/// The broker of one slot for ivshmem, made once.
pub static SHARED: LazyLock<Arc<Shared>> = LazyLock::new(|| broker(Arc::new(Ivshmem)));

/// The broker of one slot for vfio-user, made once.
pub static VFIO_USER: LazyLock<Arc<Shared>> =
    LazyLock::new(|| broker(Arc::new(VfioUser::default())));

/// The broker of one slot for vhost-user, made once.
pub static VHOST_USER: LazyLock<Arc<Shared>> = LazyLock::new(|| broker(Arc::new(VhostUser)));

fn broker(transport: Arc<dyn Transport>) -> Arc<Shared> {
    let folder = std::env::temp_dir().join(format!("barlink-fuzz-{}", std::process::id()));
    std::fs::create_dir(&folder).expect("a folder for sockets");
    let config = Config {
        size: 1 << 20,
        vectors: 0,
        channels: Vec::new(),
        slots: vec![(transport, folder.join("vm.sock"))],
        control: folder.join("control.sock"),
        policy: Policy::new(Vec::new(), Vec::new()),
    };
    let broker = Broker::new(config, Default::default()).expect("a broker");
    let shared = Arc::clone(broker.shared());
    // Nobody shall connect, and the process can be ended at any time.
    std::mem::forget(broker);
    std::fs::remove_dir_all(&folder).expect("the folder is there");
    shared
}

/// The number that the next descriptor gets: the same as long as none is left open.
pub fn next_descriptor() -> i32 {
    use std::os::fd::AsRawFd;
    let file = rustix::fs::open("/dev/null", OFlags::RDONLY, Mode::empty());
    file.expect("/dev/null").as_raw_fd()
}
