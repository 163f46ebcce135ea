// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of a broker that replaces another one while VMs and host apps go on.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use barlink::Access;
use barlink::control::client::Control;
use barlink::control::message::{Answer, Ask};
use barlink::host::{AttachOptions, Attachment};
use barlink_broker::persistence::name;
use barlink_protocol::cursor::Kind;
use barlink_protocol::wire::layout::{BROKER_PAGE, channel, presence};
use barlink_service::ServiceManager;
use rustix::process::Signal;

use crate::control::{connect_app, say};
use crate::readers;
use crate::support::*;
use crate::vmm::*;

#[test]
fn successor_knows_vms_and_host_apps() {
    // One packet cannot carry as many eventfds.
    let arguments = ["--vectors", "100"];
    let mut broker = Broker::start(&arguments);
    let vm = handshake(connect(&broker, "vm.sock"), 200);
    let before = broker.attach();
    let mut sender = before.sender("down").unwrap();
    sender.send(Kind::DATA, b"first").unwrap();
    let status = before.status().unwrap();

    succeed(&mut broker, &arguments);

    let after = before.status().unwrap();
    assert_eq!(
        (&after.slots, &after.claims, after.epoch),
        (&status.slots, &status.claims, status.epoch),
        "the connection of a host app leads to the successor, which knows what there was"
    );
    assert!(is_silent(&broker, &vm.socket), "the VM noticed");
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
    sender.send(Kind::DATA, b"second").unwrap();
    drop(sender);
    let sender = broker.attach().sender("down").unwrap();
    assert_eq!(sender.sequence(), 2, "a record was lost");

    // A VM or app that leaves now leaves the successor.
    drop(vm);
    wait_until("the VM has left", || {
        before.status().unwrap().slots[0].vm.is_none()
    });
    drop(handshake(connect(&broker, "vm.sock"), 200));
    let (folder, code) = broker.stop(Signal::TERM);
    assert_eq!(code, Some(0));
    let stopped = UnixStream::connect(folder.path().join("vm.sock")).unwrap_err();
    assert_eq!(stopped.kind(), std::io::ErrorKind::NotFound);
}

/// Each process asks the broker that runs at that moment. One that loses to another names it.
#[test]
fn losers_of_many_successors_name_winner() {
    let mut broker = Broker::start(&[]);
    let (mut losers, mut rounds) = (0, 0);
    // On few processors, each process of a round can serve in its turn.
    while rounds < 3 || losers == 0 && rounds < 20 {
        rounds += 1;
        let start = |_| {
            let mut command = broker.command(&["--replace"]);
            command
                .env("RUST_LOG", "error")
                .stderr(Stdio::piped())
                .start()
        };
        let mut all: Vec<_> = (0..12).map(start).collect();
        wait_until("one is left", || {
            all = std::mem::take(&mut all)
                .into_iter()
                .filter_map(|mut successor| {
                    let Some(status) = successor.try_wait().unwrap() else {
                        return Some(successor);
                    };
                    let text = errors_of(&mut successor);
                    if status.code() == Some(4) {
                        let names = text.contains(" has just replaced the broker at ");
                        assert!(names || text.contains("busy"), "{text}");
                        losers += usize::from(names);
                    } else {
                        // It served, and was replaced.
                        assert_eq!(status.code(), Some(0), "{text}");
                    }
                    None
                })
                .collect();
            all.len() == 1
        });
        let winner = all.pop().unwrap();
        let mut predecessor = std::mem::replace(&mut broker.child, winner);
        assert_eq!(wait(&mut predecessor).code(), Some(0));
        let pid = broker.child.id();
        wait_until("it serves", || {
            broker.attach().status().unwrap().broker == pid
        });
    }
    assert!(losers > 0, "no process lost");
}

#[test]
fn successor_keeps_base_of_reset() {
    let arguments = ["--channel", "loop=host-host,64K"];
    let mut broker = Broker::start(&arguments);
    let app = broker.attach();
    let offset = app.layout().find("loop").unwrap().1.offset;
    let (region, cursors) = (
        app.region(),
        [channel::WRITTEN, channel::LIMIT, channel::READ],
    );
    let reset = |generation| {
        assert_eq!(app.reset("loop").unwrap(), generation);
        region.ring().load(offset + channel::WRITTEN)
    };
    let bases = [1, 2, 3].map(reset);
    assert!(bases.is_sorted() && bases[0] >= 64 << 10);
    succeed(&mut broker, &arguments);
    // A guest that breaks all cursors does not make them go back.
    for cursor in cursors {
        region.ring().store(offset + cursor, 3);
    }
    assert!(reset(4) > bases[2]);
}

/// Creates the socket of a service manager that reads all messages and ignores them.
fn manager(folder: &Path) -> PathBuf {
    let path = folder.join("notify.sock");
    let socket = UnixDatagram::bind(&path).unwrap();
    std::thread::spawn(move || while socket.recv(&mut [0; 4096]).is_ok() {});
    path
}

/// Arguments for a handshake of more messages than the socket holds.
const MANY: [&str; 2] = ["--vectors", "160"];

#[test]
fn successor_finishes_handshake_of_predecessor() {
    let mut broker = Broker::start(&MANY);
    let vm = connect(&broker, "vm.sock");
    broker.wait_until_idle();
    succeed(&mut broker, &MANY);
    let vm = handshake(vm, 320);
    assert!(is_silent(&broker, &vm.socket));
    let peers: Vec<_> = vm.eventfds.iter().map(|(peer, _)| *peer).collect();
    assert_eq!(peers, [[1; 160], [0; 160]].concat());
    succeed(&mut broker, &MANY);
    assert!(is_silent(&broker, &vm.socket));
}

#[test]
fn restarted_broker_finishes_interrupted_handshake() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let mut broker = Broker::start_as(&manager, folder, &MANY);
    let vm = connect(&broker, "vm.sock");
    broker.wait_until_idle();
    broker.start_again(&manager, &MANY);
    let vm = handshake(vm, 320);
    assert!(is_silent(&broker, &vm.socket));
    assert!(broker.attach().status().unwrap().slots[0].vm.is_some());
}

#[test]
fn slot_rejects_others_during_handshake() {
    let broker = Broker::start(&MANY);
    let vm = connect(&broker, "vm.sock");
    broker.wait_until_idle();
    assert_eq!(message(&connect(&broker, "vm.sock")).unwrap().0, 1);
    handshake(vm, 320);
}

#[test]
fn successor_accepts_same_sockets_from_another_folder() {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    let serve = |from: &Path, sockets: [&str; 2], further: &[&str]| {
        let mut command = barlink(["serve", "--ivshmem", sockets[0], "--control", sockets[1]]);
        command
            .args(further)
            .current_dir(from)
            .env("RUST_LOG", "error");
        command
    };
    let relative = ["vm.sock", "control.sock"];
    let mut first = serve(folder.path(), relative, &[]).start();
    let control = folder.path().join("control.sock");
    let broker = || {
        let attachment = AttachOptions::new()
            .access(Access::ReadOnly)
            .connect_path(&control)
            .ok()?;
        Some(attachment.status().ok()?.broker)
    };
    wait_until("the broker listens", || broker().is_some());
    // The same relative path means another socket in another folder.
    let control = control.to_str().unwrap();
    fails(
        &mut serve(&inner, ["vm.sock", control], &["--replace"]),
        1,
        &["the running broker's socket is"],
    );
    let vm = folder.path().join("vm.sock");
    let absolute = [vm.to_str().unwrap(), control];
    let mut second = serve(&inner, absolute, &["--replace"]).start();
    assert_eq!(wait(&mut first).code(), Some(0));
    wait_until("the successor serves", || broker() == Some(second.id()));
    let mut third = serve(folder.path(), relative, &["--replace"]);
    let mut third = third.start();
    assert_eq!(wait(&mut second).code(), Some(0));
    wait_until("the successor serves", || broker() == Some(third.id()));
    kill(&mut third);
}

#[test]
fn rejects_replace_without_running_broker() {
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
    fails(
        &mut command,
        3,
        &[
            "no broker to replace at",
            "leave --replace out, or name the one that runs",
        ],
    );
}

#[test]
fn broker_survives_successor_with_other_arguments() {
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
        let log = broker.log();
        assert!(log.contains("it has ended without taking over"), "{log}");
    }
    succeed(&mut broker, &["--size", "1M"]);
}

/// Writes the version of the layout into the state that a broker keeps for its successor.
fn set_layout_version(broker: &Broker, version: u32) {
    let descriptors = format!("/proc/{}/fd", broker.child.id());
    let entries = std::fs::read_dir(descriptors).unwrap();
    let memories = entries.filter_map(|entry| {
        let path = entry.unwrap().path();
        let target = std::fs::read_link(&path).ok()?;
        let is_memory = target.to_string_lossy().contains("memfd:");
        // The region of 1 MiB is a memory as well.
        (is_memory && path.metadata().unwrap().len() < 1 << 20).then_some(path)
    });
    let path = memories.last().expect("the broker keeps its state");
    let state = File::options().write(true).open(path).unwrap();
    state.write_all_at(&version.to_le_bytes(), 8).unwrap();
}

/// A package can have been upgraded to a version with another layout.
#[test]
fn broker_survives_successor_with_other_layout_version() {
    let mut broker = Broker::start(&["--size", "1M"]);
    set_layout_version(&broker, 3);
    let mut successor = broker.command(&["--size", "1M", "--replace"]);
    fails(
        successor.env("RUST_LOG", "error").stderr(Stdio::piped()),
        1,
        &["cannot be taken over", "version 3", "shut its VMs down"],
    );
    drop(broker.attach().sender("down").unwrap());
    set_layout_version(&broker, 2);
    succeed(&mut broker, &["--size", "1M"]);
}

/// A VM over ivshmem would be served as one over vhost-user, and disconnected.
#[test]
fn successor_with_other_transport_changes_nothing() {
    let other = |broker: &Broker, mut command: Command| {
        let path = |name: &str| broker.path(name).into_os_string();
        command.args(["serve".into(), "--vhost-user".into(), path("vm.sock")]);
        command.args(["--control".into(), path("control.sock")]);
        command.env("RUST_LOG", "error").stderr(Stdio::piped());
        command
    };
    let error = ["slot 0 of the running broker has another transport"];
    let mut broker = Broker::start(&[]);
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    let mut successor = other(&broker, barlink::<&str>([]));
    fails(successor.arg("--replace"), 1, &error);
    succeed(&mut broker, &[]);
    assert!(is_silent(&broker, &vm.socket));

    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let mut broker = Broker::start_as(&manager, folder, &[]);
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    broker.signal(Signal::TERM);
    assert_eq!(wait(&mut broker.child).code(), Some(0));
    // A removed file is made again only by a broker that takes over.
    std::fs::remove_file(broker.path("vm.sock")).unwrap();
    let program = barlink::<&str>([]);
    let service = manager.service(Path::new(program.get_program())).unwrap();
    fails(&mut other(&broker, service), 1, &error);
    assert!(!broker.path("vm.sock").exists());
    broker.start_service_again(&manager, &[]);
    assert!(broker.path("vm.sock").exists());
    assert!(is_silent(&broker, &vm.socket));
}

/// The service manager would restart the replaced broker, so that two brokers would have one
/// region.
#[test]
fn managed_broker_rejects_replacement() {
    let folder = tempfile::tempdir().unwrap();
    let manager = manager(folder.path());
    let mut broker = Broker::start_by(folder, &[], |command| {
        command.env("NOTIFY_SOCKET", &manager)
    });
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    fails(
        broker
            .command(&["--replace"])
            .env("RUST_LOG", "error")
            .stderr(Stdio::piped()),
        1,
        &["systemctl restart"],
    );
    assert!(broker.child.try_wait().unwrap().is_none());
    broker.attach().status().unwrap();
    assert!(is_silent(&broker, &vm.socket));
}

#[test]
fn stopped_service_preserves_epoch_for_successor() {
    let epoch = |attachment: &Attachment| {
        attachment
            .region()
            .ring()
            .load(BROKER_PAGE + presence::EPOCH)
    };
    let folder = tempfile::tempdir().unwrap();
    let path = manager(folder.path());
    let broker = Broker::start_by(folder, &[], |command| {
        command.env("NOTIFY_SOCKET", &path).env("FDSTORE", "0")
    });
    let attachment = broker.attach();
    let (_folder, code) = broker.stop(Signal::TERM);
    assert_eq!(
        (code, epoch(&attachment)),
        (Some(0), 2),
        "no successor keeps it"
    );

    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let broker = Broker::start_as(&manager, folder, &[]);
    let attachment = broker.attach();
    let (folder, code) = broker.stop(Signal::TERM);
    assert_eq!((code, epoch(&attachment)), (Some(0), 1));
    let broker = Broker::start_as(&manager, folder, &[]);
    assert_eq!(broker.attach().status().unwrap().epoch, 1);
}

#[test]
fn restart_without_persisted_state_creates_new_region() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let mut broker = Broker::start_as(&manager, folder, &[]);
    let notify = UnixDatagram::unbound().unwrap();
    notify.connect(broker.path("notify.sock")).unwrap();
    let forget = format!("FDSTOREREMOVE=1\nFDNAME={}\n", name::STATE);
    notify.send(forget.as_bytes()).unwrap();
    wait_until("it is removed", || {
        !manager.stored().contains(&name::STATE.to_owned())
    });
    broker.start_again(&manager, &[]);
    drop(handshake(connect(&broker, "vm.sock"), 6));
    // The manager's persisted state is now that of the new region.
    wait_until("it is stored", || {
        manager.stored().contains(&name::STATE.to_owned())
    });
    broker.start_again(&manager, &[]);
    let sender = broker.attach().sender("down").unwrap();
    assert_eq!(broker.attach().status().unwrap().epoch, 1);
    drop(sender);
}

/// In this way a service takes over a region from an ordinary broker.
#[test]
fn service_takes_over_from_ordinary_broker() {
    let mut broker = Broker::start(&[]);
    let vm = handshake(connect(&broker, "vm.sock"), 6);
    let manager = manager(broker.folder.path());
    let mut successor = broker.command(&["--replace"]);
    let successor = successor.env("NOTIFY_SOCKET", &manager).start();
    let mut predecessor = std::mem::replace(&mut broker.child, successor);
    assert_eq!(wait(&mut predecessor).code(), Some(0), "{}", broker.log());
    let status = broker.attach().status().unwrap();
    assert_eq!(status.broker, broker.child.id());
    assert!(status.slots[0].vm.is_some() && is_silent(&broker, &vm.socket));
}

#[test]
fn broker_gives_up_silent_successor() {
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
fn successor_sets_socket_modes() {
    let mut broker = Broker::start(&[]);
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    let user = NOBODY.to_string();
    let allow = ["--allow-user", &user];
    for (arguments, expected) in [(&allow[..], 0o666), (&[], 0o600)] {
        succeed(&mut broker, arguments);
        for name in ["vm.sock", "control.sock"] {
            assert_eq!(mode(&broker.path(name)), expected, "{name}");
        }
    }
    // The successor does not change a path that is not a broker's socket.
    let [link, file] = ["vm.sock", "file"].map(|name| broker.path(name));
    std::fs::remove_file(&link).unwrap();
    file_with(&file, b"");
    let before = mode(&file);
    std::os::unix::fs::symlink(&file, &link).unwrap();
    succeed(&mut broker, &allow);
    assert_eq!(mode(&broker.control()), 0o666);
    assert_ne!(before, 0o666);
    assert_eq!(mode(&file), before);
}

#[test]
fn only_own_user_replaces_broker() {
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
        &["only the broker's own user and root can replace it"],
    );
    drop(broker.attach());
}

/// Attaches with a socket of its own, and returns the answers to a claim and to a reset.
fn ask_to_change(socket: &OwnedFd) -> [String; 2] {
    [
        r#"{"claim":{"channel":0,"end":"consumer"}}"#,
        r#"{"reset":{"channel":0}}"#,
    ]
    .map(|ask| say(socket, format!(r#"{{"version":1,"ask":{ask}}}"#).as_bytes()))
}

#[test]
fn successor_keeps_read_only_attachments() {
    let mut broker = Broker::start(&[]);
    let attach = |access: &str| {
        let socket = connect_app(&broker);
        let ask = format!(r#"{{"version":1,"ask":{{"attach":{{"access":"{access}"}}}}}}"#);
        assert!(say(&socket, ask.as_bytes()).contains("region"));
        socket
    };
    let (reader, writer) = (attach("read-only"), attach("read-write"));
    for _ in 0..2 {
        succeed(&mut broker, &[]);
        for answer in ask_to_change(&reader) {
            assert!(answer.contains(r#"{"refused":"read-only"}"#), "{answer}");
        }
    }
    assert!(ask_to_change(&writer)[0].contains("claimed"));
    // A host app that attaches again has the access of its latest attachment.
    let ask = br#"{"version":1,"ask":{"attach":{"access":"read-write"}}}"#;
    assert!(say(&reader, ask).contains("region"));
    drop(writer);
    succeed(&mut broker, &[]);
    assert!(ask_to_change(&reader)[0].contains("claimed"));
}

#[test]
fn successor_grants_reader_no_more() {
    if !can_become_another_user() {
        return;
    }
    let mut broker = readers::start(&[]);
    let reader = readers::connect_as_nobody(&broker);
    let ask = br#"{"version":1,"ask":"status"}"#;
    assert!(say(&reader, ask).contains("claims"));
    for options in [&["--allow-reader", "nobody"][..], &[]] {
        succeed(&mut broker, options);
        for answer in ask_to_change(&reader) {
            assert!(answer.contains(r#"{"refused":"reader"}"#), "{answer}");
        }
    }
    succeed(&mut broker, &["--allow-user", "nobody"]);
    assert!(ask_to_change(&reader)[0].contains("claimed"));
}

#[test]
fn successor_keeps_instance_of_region() {
    let mut broker = Broker::start(&[]);
    let identity = broker.attach().layout().identity;
    let shown: serde_json::Value =
        serde_json::from_str(&works(&mut broker.app(&["inspect", "--json"]))).unwrap();
    assert_eq!(shown["region"]["name"], identity.name.as_str());
    assert_eq!(shown["region"]["instance"], identity.instance.to_string());
    succeed(&mut broker, &[]);
    assert_eq!(broker.attach().layout().identity, identity);
    // A broker that starts anew has another region, under the same name.
    let other = Broker::start(&[]).attach().layout().identity;
    assert_eq!(other.name, identity.name);
    assert_ne!(other.instance, identity.instance);
}
