//! A broker has given up what it does not need: on every thread, however it came to its region.

use crate::service::ServiceManager;
use crate::support::*;
use crate::vfio_user_client::{Client, serve_both};
use crate::vhost_user_client::{self, serve_vhost_user};
use crate::vmm::*;

/// Panics unless so many threads come to be there, each confined.
fn check(pid: u32, threads: usize) {
    let mut tasks = Vec::new();
    wait_until("all threads are there", || {
        let folders = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        tasks = folders
            .map(|folder| std::fs::read_to_string(folder.unwrap().path().join("status")).unwrap())
            .collect();
        tasks.len() == threads
    });
    for task in tasks {
        // The last of what a thread gives up before it starts others; `NoNewPrivs` says nothing of Landlock either.
        assert!(task.contains("Seccomp:\t2\n"), "not confined: {task}");
    }
}

/// The main thread, the slot's, and the VM's.
const THREADS: usize = 3;

#[test]
fn fresh_broker_is_confined() {
    let broker = Broker::start(&[]);
    let _vm = handshake(connect(&broker, "vm.sock"), 6);
    check(broker.child.id(), THREADS);
}

#[test]
fn broker_of_vfio_user_is_confined() {
    let broker = serve_both(&["--guest-memory"]);
    let _client = Client::greet(&broker);
    // One more slot, and this VM in the place of the other.
    check(broker.child.id(), THREADS + 1);
}

#[test]
fn broker_of_vhost_user_is_confined() {
    let broker = serve_vhost_user(&[]);
    // Twice, since a session makes sockets, threads and mappings when the broker is confined already.
    for _ in 0..2 {
        let mut client = vhost_user_client::Client::greet(&broker);
        client.start();
        client.map(true);
        client.put(0, 2 << 16, 4, false);
        client.wait_for(0, 1);
        // One more slot; this VM's session, and its daemon's two threads.
        check(broker.child.id(), THREADS + 3);
    }
}

#[test]
fn broker_that_replaces_another_is_confined() {
    let mut broker = Broker::start(&[]);
    let _vm = handshake(connect(&broker, "vm.sock"), 6);
    succeed(&mut broker, &[]);
    check(broker.child.id(), THREADS);
}

#[test]
fn broker_that_is_started_again_is_confined() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let mut broker = Broker::start_as(&manager, folder, &[]);
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    wait_until("the VM is kept", || {
        manager.kept().contains(&"vm-0".to_owned())
    });
    // Killed in the moment after its last message, the broker could not know that the VM has it.
    assert!(is_silent(&broker, &vm.socket));
    broker.start_again(&manager, &[]);
    // One more tells the manager.
    check(broker.child.id(), THREADS + 1);
    assert!(is_silent(&broker, &vm.socket));
}
