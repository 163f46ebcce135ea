// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of a VM over vhost-user whose broker is replaced or restarted, and of the VMs beside it.

use std::process::Stdio;

use barlink_service::ServiceManager;

use crate::support::*;
use crate::vhost_user_client::*;
use crate::vmm::{handshake, is_silent};

fn arguments(folder: &tempfile::TempDir) -> [String; 2] {
    let socket = folder.path().join("user.sock");
    ["--vhost-user".into(), socket.to_str().unwrap().into()]
}

#[test]
fn broker_with_vhost_user_vm_rejects_replacement() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = arguments(&folder);
    let arguments = arguments.each_ref().map(String::as_str);
    let mut broker = Broker::start_in(folder, &arguments);
    let vm = handshake(crate::vmm::connect(&broker, "vm.sock"), 15);
    let mut client = Client::handshake(&broker);
    client.start();
    client.map(true);
    let replace = [&arguments[..], &["--replace"]].concat();
    let us = format!("slot 1's VM, process {},", std::process::id());
    fails(
        broker
            .command(&replace)
            .env("RUST_LOG", "error")
            .stderr(Stdio::piped()),
        1,
        &[&us, "vhost-user", "shut that VM down first"],
    );
    // The device works as before.
    client.put(0, 2 << 16, 4, false);
    client.wait_for(0, 1);
    assert!(is_silent(&broker, &vm.socket));
    drop(client);
    let attachment = broker.attach();
    wait_until("the VM has left", || {
        attachment.status().unwrap().slots[1].vm.is_none()
    });
    drop(attachment);
    // A successor takes over a free slot like any other.
    succeed(&mut broker, &arguments);
    assert!(is_silent(&broker, &vm.socket));
    let mut client = Client::handshake(&broker);
    client.start();
    client.map(true);
    client.put(0, 2 << 16, 4, false);
    client.wait_for(0, 1);
}

#[test]
fn restarted_service_disconnects_vhost_user_vm() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let arguments = arguments(&folder);
    let arguments = arguments.each_ref().map(String::as_str);
    let mut broker = Broker::start_as(&manager, folder, &arguments);
    let vm = handshake(crate::vmm::connect(&broker, "vm.sock"), 15);
    let stored = |name: &str| manager.stored().contains(&name.to_owned());
    for killed in [false, true] {
        let mut client = Client::handshake(&broker);
        client.start();
        client.map(true);
        wait_until("both are stored", || stored("vm-0") && stored("vm-1"));
        let connection = |slot: usize| {
            let status = broker.attach().status().unwrap();
            status.slots[slot].vm.as_ref().map(|vm| vm.connection)
        };
        let before = connection(1).unwrap();
        // If the broker were killed right after its last message, it could not know that the VM
        // received it.
        assert!(is_silent(&broker, &vm.socket));
        if killed {
            broker.start_again(&manager, &arguments);
        } else {
            broker.restart(&manager, &arguments);
        }
        assert!(is_closed(&client.socket));
        wait_until("it is removed", || !stored("vm-1"));
        assert!(is_silent(&broker, &vm.socket));
        let mut client = Client::handshake(&broker);
        client.start();
        client.map(true);
        client.put(0, 2 << 16, 4, false);
        client.wait_for(0, 1);
        let status = broker.attach().status().unwrap();
        assert!(status.slots[1].vm.as_ref().unwrap().connection > before);
    }
    assert!(broker.log().contains("has ended with it"));
}
