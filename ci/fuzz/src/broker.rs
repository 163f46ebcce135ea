// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The state that a broker's threads share, without the threads. Its region has a channel of each
//! policy, and a reserve for more.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use barlink_broker::broker::{Broker, BrokerState, ChannelPlan, Config, Policy, Reserve};
use barlink_broker::persistence::Inheritance;
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

/// The channels, as the command line writes them.
const CHANNELS: [&str; 5] = [
    "up=up,4K",
    "down=down,4K,drop",
    "camera=host-taps,4K,overwrite",
    "log=0-taps,4K,overwrite",
    "self=host-host,4K",
];
/// Room for three of the smallest channels, and for one further that is twice as large.
const RESERVE: Reserve = Reserve {
    bytes: 9 << 12,
    vectors: 1,
};
/// Number of channels in a crowded region, whose table has room for one more.
const CROWD: usize = 59;

/// Returns the process of a client's VMM, whose end the broker cannot see.
pub fn vmm() -> Vmm {
    Vmm::new(PEER.pid, None)
}

/// The state of a broker with one slot over ivshmem, created once.
pub static IVSHMEM: LazyLock<Arc<BrokerState>> = LazyLock::new(|| forever(Arc::new(Ivshmem)));

/// The state of a broker with one slot over vfio-user, created once.
pub static VFIO_USER: LazyLock<Arc<BrokerState>> =
    LazyLock::new(|| forever(Arc::new(VfioUser::default())));

/// The state of a broker with one slot over vhost-user, created once.
pub static VHOST_USER: LazyLock<Arc<BrokerState>> = LazyLock::new(|| forever(Arc::new(VhostUser)));

fn forever(transport: Arc<dyn Transport>) -> Arc<BrokerState> {
    let broker = create(1 << 20, &CHANNELS, vec![transport], Inheritance::new());
    let state = Arc::clone(broker.state());
    // The broker is never dropped, because no client connects and the process can be ended at any
    // time.
    std::mem::forget(broker);
    state
}

/// Creates a broker with a slot over vfio-user, whose VM can share its memory, and one over
/// vhost-user, whose VM keeps the broker from being replaced. The table of a crowded region is
/// nearly full. With an inheritance, the broker is the successor of another one.
pub fn of_two_slots(is_crowded: bool, inheritance: Inheritance) -> Broker {
    let slots: Vec<Arc<dyn Transport>> = vec![
        Arc::new(VfioUser { guest_memory: true }),
        Arc::new(VhostUser),
    ];
    if !is_crowded {
        return create(128 << 10, &CHANNELS, slots, inheritance);
    }
    let more = (CHANNELS.len()..CROWD).map(|number| format!("number-{number}=up,4K"));
    let all: Vec<_> = CHANNELS
        .map(str::to_owned)
        .into_iter()
        .chain(more)
        .collect();
    let all: Vec<_> = all.iter().map(String::as_str).collect();
    create(1 << 20, &all, slots, inheritance)
}

fn create(
    size: u64,
    channels: &[&str],
    slots: Vec<Arc<dyn Transport>>,
    inheritance: Inheritance,
) -> Broker {
    // A disk takes milliseconds to remove the files.
    let memory = Path::new("/dev/shm");
    let parent = match memory.is_dir() {
        true => memory.to_owned(),
        false => std::env::temp_dir(),
    };
    let folder = parent.join(format!("barlink-fuzz-{}", std::process::id()));
    std::fs::create_dir(&folder).expect("a folder for sockets");
    let config = config(size, channels, slots, &folder);
    let broker = Broker::new(config, inheritance).expect("a broker");
    std::fs::remove_dir_all(&folder).expect("the folder is there");
    broker
}

fn config(size: u64, channels: &[&str], slots: Vec<Arc<dyn Transport>>, folder: &Path) -> Config {
    let parse = |plan: &&str| plan.parse::<ChannelPlan>().expect("a channel");
    let slots = slots.into_iter().enumerate();
    let slots = slots.map(|(id, transport)| (transport, folder.join(format!("vm{id}.sock"))));
    Config {
        size,
        vectors: 3,
        channels: channels.iter().map(parse).collect(),
        reserve: RESERVE,
        slots: slots.collect(),
        control: folder.join("control.sock"),
        policy: Policy::new(Vec::new(), Vec::new()),
    }
}

/// Returns the number that the next descriptor gets. It stays the same if no descriptor is left
/// open.
pub fn next_descriptor() -> i32 {
    use std::os::fd::AsRawFd;
    let file = rustix::fs::open("/dev/null", OFlags::RDONLY, Mode::empty());
    file.expect("/dev/null").as_raw_fd()
}
