//! One broker takes the place of another, while VMs and host apps go on.

use std::process::Stdio;

use barlink::control::client::Control;
use barlink::control::message::{Answer, Ask};
use barlink::protocol::cursor::Kind;
use rustix::process::Signal;

use crate::support::*;
use crate::vmm::*;

/// Another broker with the same arguments, once it serves.
pub fn succeed(broker: &mut Broker, arguments: &[&str]) {
    let mut successor = broker.command(&[arguments, &["--replace"]].concat());
    let successor = successor.spawn().unwrap();
    let predecessor = std::mem::replace(&mut broker.child, successor);
    let mut predecessor = predecessor;
    assert_eq!(wait(&mut predecessor).code(), Some(0), "{}", broker.log());
    let pid = broker.child.id();
    assert_eq!(broker.attach().status().unwrap().broker, pid);
}

#[test]
fn successor_knows_vms_and_host_apps() {
    // More eventfds than one packet carries.
    let arguments = ["--vectors", "100"];
    let mut broker = Broker::start(&arguments);
    let vm = handshake(connect(&broker, "vm.sock"), 200);
    let before = broker.attach();
    let mut sender = before.sender("down").unwrap();
    let _ = sender.send(Kind::DATA, b"first", None).unwrap();
    let status = before.status().unwrap();

    succeed(&mut broker, &arguments);

    let after = before.status().unwrap();
    assert_eq!(
        (&after.slots, &after.claims, after.epoch),
        (&status.slots, &status.claims, status.epoch),
        "the connection of a host app leads to the successor, which knows what there was"
    );
    assert!(is_silent(&vm.socket), "the VM noticed");
    assert_eq!(
        message(&connect(&broker, "vm.sock")).unwrap().0,
        1,
        "the slot is still taken"
    );
    fails(
        broker.app(&["send"]).stdin(Stdio::null()),
        4,
        &["`down` already has a producer"],
    );
    let _ = sender.send(Kind::DATA, b"second", None).unwrap();
    drop(sender);
    let sender = broker.attach().sender("down").unwrap();
    assert_eq!(sender.sequence(), 2, "a record was lost");

    // And those who leave, leave the successor.
    drop(vm);
    wait_until("the VM has left", || {
        before.status().unwrap().slots[0].vm.is_none()
    });
    drop(handshake(connect(&broker, "vm.sock"), 200));
    let (folder, code) = broker.stop(Signal::TERM);
    assert_eq!(code, Some(0));
    assert!(
        !folder.path().join("vm.sock").exists() && !folder.path().join("control.sock").exists(),
        "the successor removes the sockets when it stops"
    );
}

#[test]
fn replacing_nobody_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).into_os_string();
    let mut command = barlink([
        "serve".into(),
        "--replace".into(),
        "--ivshmem".into(),
        path("vm.sock"),
        "--control".into(),
        path("control.sock"),
    ]);
    fails(&mut command, 3, &["no broker at"]);
}

#[test]
fn successor_with_other_arguments_fails_and_the_broker_goes_on() {
    let mut broker = Broker::start(&["--size", "1M"]);
    let other_socket = broker.path("other.sock");
    let others: [(&[&str], &str); 3] = [
        (&["--size", "2M"], "has another size or other channels"),
        (
            &["--size", "1M", "--channel", "x=up,4K"],
            "has another size or other channels",
        ),
        (
            &["--size", "1M", "--ivshmem", other_socket.to_str().unwrap()],
            "has another size or other channels",
        ),
    ];
    for (arguments, error) in others {
        let mut command = broker.command(&[arguments, &["--replace"]].concat());
        fails(
            command.env("RUST_LOG", "error").stderr(Stdio::piped()),
            1,
            &[error],
        );
        let vm = handshake(connect(&broker, "vm.sock"), 6);
        drop(vm);
        drop(broker.attach().sender("down").unwrap());
        wait_until("the VM has left", || {
            broker.attach().status().unwrap().slots[0].vm.is_none()
        });
    }
    succeed(&mut broker, &["--size", "1M"]);
}

#[test]
fn successor_that_says_nothing_is_given_up() {
    let broker = Broker::start(&[]);
    let silent = Control::connect(&broker.control()).unwrap();
    let (answer, descriptors) = silent.ask(Ask::HandOver).unwrap();
    assert!(
        matches!(answer, Answer::Inheritance { last: true, names } if names.len() == descriptors.len())
    );
    drop(handshake(connect(&broker, "vm.sock"), 6));
    drop(broker.attach());
    assert!(
        broker.log().contains("does not take over"),
        "{}",
        broker.log()
    );
}

#[test]
fn only_the_brokers_own_user_replaces_it() {
    if !can_become_another_user() {
        return;
    }
    let broker = Broker::start(&["--allow-user", "nobody"]);
    std::fs::set_permissions(
        broker.folder.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let mut command = broker.command(&["--replace"]);
    fails(
        as_nobody(&mut command)
            .env("RUST_LOG", "error")
            .stderr(Stdio::piped()),
        1,
        &["only the broker's own user can replace it"],
    );
    drop(broker.attach());
}
