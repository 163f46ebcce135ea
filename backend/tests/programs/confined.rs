// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests that every thread of a broker has given up unneeded rights, whether the broker is new, a
//! successor or a restarted service.

use barlink_service::ServiceManager;

use crate::support::*;
use crate::vfio_user_client::{Client, serve_both};
use crate::vhost_user_client::{self, serve_vhost_user};
use crate::vmm::*;

/// Waits until the process has this number of threads, and checks that each is confined.
fn check(pid: u32, threads: usize) {
    let mut tasks = Vec::new();
    wait_until("all threads are there", || {
        let folders = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let paths = folders.map(|folder| folder.unwrap().path().join("status"));
        // A thread of an earlier session can end before its file is read.
        tasks = paths
            .filter_map(|path| std::fs::read_to_string(path).ok())
            .collect();
        tasks.len() == threads
    });
    for task in tasks {
        // The filter is the last step of the confinement, before the thread starts others. `/proc`
        // does not show Landlock, and `NoNewPrivs` does not prove it.
        assert!(task.contains("Seccomp:\t2\n"), "not confined: {task}");
    }
}

/// Number of threads: the main thread, the log's, that of the answers to drivers, the slot's, and
/// the VM's.
const THREADS: usize = 5;

#[test]
fn fresh_broker_is_confined() {
    let broker = Broker::start(&[]);
    let _vm = handshake(connect(&broker, "vm.sock"), 6);
    check(broker.child.id(), THREADS);
}

#[test]
fn broker_of_vfio_user_is_confined() {
    let broker = serve_both(&["--guest-memory"]);
    let _client = Client::handshake(&broker);
    // One more slot has a thread. This VM's thread takes the place of the other VM's.
    check(broker.child.id(), THREADS + 1);
}

#[test]
fn broker_of_vhost_user_is_confined() {
    let broker = serve_vhost_user(&[]);
    // The second session makes its sockets, threads and mappings when the broker is already
    // confined.
    for _ in 0..2 {
        let mut client = vhost_user_client::Client::handshake(&broker);
        client.start();
        client.map(true);
        client.put(0, 2 << 16, 4, false);
        client.wait_for(0, 1);
        // One more slot has a thread. The VM's session has one, and its vhost-user daemon has two.
        check(broker.child.id(), THREADS + 3);
    }
}

#[test]
fn successor_broker_is_confined() {
    let mut broker = Broker::start(&[]);
    let _vm = handshake(connect(&broker, "vm.sock"), 6);
    succeed(&mut broker, &[]);
    check(broker.child.id(), THREADS);
}

#[test]
fn restarted_broker_is_confined() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let mut broker = Broker::start_as(&manager, folder, &[]);
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    wait_until("the VM is stored", || {
        manager.stored().contains(&"vm-0".to_owned())
    });
    // If the broker were killed right after its last message, it could not know that the VM
    // received it.
    assert!(is_silent(&broker, &vm.socket));
    broker.start_again(&manager, &[]);
    // One more thread sends messages to the service manager.
    check(broker.child.id(), THREADS + 1);
    assert!(is_silent(&broker, &vm.socket));
}
