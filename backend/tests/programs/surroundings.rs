// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of a broker whose files, log, terminal and groups are in the hands of other processes.

use std::io::{PipeReader, Read, Write, pipe};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use barlink::Access;
use barlink::host::{AttachOptions, Attachment};
use barlink_service::ServiceManager;
use rustix::fs::{CWD, FileType, Mode};
use rustix::process::{Pid, Signal, kill_process};

use crate::support::*;
use crate::terminal::{USUAL, terminal};
use crate::vmm::{connect, handshake};

fn serve(folder: &Path) -> Command {
    let mut command = barlink(["serve", "--size", "1M", "--ivshmem"]);
    command.arg(folder.join("vm.sock"));
    command.arg("--control").arg(folder.join("control.sock"));
    command.env("RUST_LOG", "error");
    command
}

fn attach(folder: &Path) -> Attachment {
    let control = folder.join("control.sock");
    let start = Instant::now();
    loop {
        match AttachOptions::new()
            .access(Access::ReadOnly)
            .connect_path(&control)
        {
            Ok(attachment) => return attachment,
            Err(error) => assert!(start.elapsed() < TIMEOUT, "{error}"),
        }
    }
}

#[test]
fn refuses_lock_that_is_no_lock_file() {
    let folder = tempfile::tempdir().unwrap();
    let (lock, victim) = (
        folder.path().join("vm.sock.lock"),
        folder.path().join("victim"),
    );
    let refused = |what: &str| {
        let parts = [
            "vm.sock.lock is ",
            what,
            "a folder that only you can write to",
        ];
        fails(&mut serve(folder.path()), 1, &parts);
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        std::fs::remove_file(&lock).unwrap();
    };
    std::fs::write(&victim, b"precious").unwrap();
    symlink(&victim, &lock).unwrap();
    refused("a symbolic link");
    symlink(folder.path().join("new"), &lock).unwrap();
    refused("a symbolic link");
    assert!(
        !folder.path().join("new").exists(),
        "it made a file through a link"
    );
    symlink("/dev/zero", &lock).unwrap();
    refused("a symbolic link");
    std::fs::hard_link(&victim, &lock).unwrap();
    refused("a file with further names");
    rustix::fs::mknodat(CWD, &lock, FileType::Fifo, Mode::RWXU, 0).unwrap();
    refused("not a regular file");
    std::fs::create_dir(&lock).unwrap();
    fails(
        &mut serve(folder.path()),
        1,
        &["vm.sock.lock is not a regular file"],
    );
}

#[test]
fn long_lock_file_is_read_in_part() {
    let folder = tempfile::tempdir().unwrap();
    let lock = folder.path().join("vm.sock.lock");
    let file = std::fs::File::create(&lock).unwrap();
    // The sparse file is larger than the memory of any machine.
    file.set_len(1 << 42).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let _socket = UnixListener::bind(folder.path().join("vm.sock")).unwrap();
    fails(&mut serve(folder.path()), 1, &["vm.sock is in use"]);
}

#[test]
fn sockets_have_their_mode_despite_umask() {
    for (mask, user, mode) in [("0777", None, 0o600), ("0077", Some("nobody"), 0o666)] {
        let folder = tempfile::tempdir().unwrap();
        let serve = serve(folder.path());
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("umask {mask}; exec \"$@\""), "sh"]);
        shell.arg(serve.get_program()).args(serve.get_args());
        shell.args(user.iter().flat_map(|user| ["--allow-user", user]));
        let mut broker = shell.start();
        attach(folder.path());
        for name in ["vm.sock", "control.sock"] {
            let found = folder.path().join(name).metadata().unwrap();
            assert_eq!(
                found.permissions().mode() & 0o777,
                mode,
                "{name}, umask {mask}"
            );
        }
        let lock = folder.path().join("vm.sock.lock").metadata().unwrap();
        assert_eq!(lock.mode() & 0o077, 0);
        kill(&mut broker);
    }
}

#[test]
fn admits_members_of_supplementary_group() {
    if !can_become_another_user() {
        return;
    }
    let broker = Broker::start(&["--allow-group", "4242"]);
    let folder = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(broker.folder.path(), folder).unwrap();
    let member = |groups: &str| {
        let mut inspect = broker.app(&["inspect", "--json"]);
        // The command runs with these groups, and otherwise as `as_nobody` makes it run.
        let inspect = as_nobody(&mut inspect);
        let mut member = Command::new("setpriv");
        member.args(["--reuid=65534", "--regid=65534", groups, "--"]);
        member.arg(inspect.get_program()).args(inspect.get_args());
        run(&mut member).status.code()
    };
    assert_eq!(member("--groups=27,4242"), Some(0));
    assert_eq!(member("--groups=27"), Some(3));
    // More groups than fit into the first try.
    let many: Vec<_> = (5000..5300).map(|group| group.to_string()).collect();
    assert_eq!(
        member(&format!("--groups={},4242", many.join(","))),
        Some(0)
    );
    assert_eq!(member("--clear-groups"), Some(3));
}

/// A terminal that is stopped by Ctrl-S behaves like this pipe.
#[test]
fn unread_log_stops_neither_service_nor_end() {
    let folder = tempfile::tempdir().unwrap();
    let (log, mut unread) = pipe().unwrap();
    let size = rustix::pipe::fcntl_setpipe_size(&log, 4096).unwrap();
    unread.write_all(&vec![b'.'; size]).unwrap();
    let mut serve = serve(folder.path());
    let mut broker = serve.env("RUST_LOG", "debug").stderr(unread).start();
    drop(serve);
    for _ in 0..100 {
        attach(folder.path()).status().unwrap();
    }
    signal_child(&broker, Signal::TERM);
    assert_eq!(wait(&mut broker).code(), Some(0));
    assert_eq!(
        all(log).trim_start_matches('.'),
        "",
        "the pipe was not full"
    );
}

/// Another process can make standard error non-blocking, because it may share the open file.
#[test]
fn nonblocking_log_loses_no_line_in_silence() {
    // The broker waits only one second for the reader of its last lines.
    once_of_some("the last line is written", || {
        let log = nonblocking_log();
        let is_whole = log.contains("stopped");
        if !is_whole {
            eprintln!("its last line is missing: {log}");
        }
        is_whole
    });
}

/// Returns the log of a broker whose standard error is non-blocking, and is read only at the end.
fn nonblocking_log() -> String {
    let folder = tempfile::tempdir().unwrap();
    let (log, end) = pipe().unwrap();
    rustix::pipe::fcntl_setpipe_size(&log, 4096).unwrap();
    rustix::io::ioctl_fionbio(&end, true).unwrap();
    let mut serve = serve(folder.path());
    let mut broker = serve.env("RUST_LOG", "trace").stderr(end).start();
    drop(serve);
    for _ in 0..200 {
        attach(folder.path()).status().unwrap();
    }
    let reader = std::thread::spawn(move || all(log));
    signal_child(&broker, Signal::TERM);
    assert_eq!(wait(&mut broker).code(), Some(0));
    reader.join().unwrap()
}

fn all(mut log: PipeReader) -> String {
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn broker_outlives_its_terminal() {
    let broker = Broker::start(&[]);
    broker.signal(Signal::HUP);
    broker.attach().status().unwrap();
    let (_, code) = broker.stop(Signal::TERM);
    assert_eq!(code, Some(0));
}

/// As a shell without job control starts `barlink serve &`.
#[test]
fn background_broker_outlives_ctrl_c() {
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start_by(folder, &[], |command| {
        let mut shell = Command::new("sh");
        shell.args(["-c", "trap '' INT; exec \"$@\"", "sh"]);
        shell.arg(command.get_program()).args(command.get_args());
        *command = shell;
        command
    });
    broker.signal(Signal::INT);
    broker.attach().status().unwrap();
    let (_, code) = broker.stop(Signal::TERM);
    assert_eq!(code, Some(0));
}

/// The table of signals in docs/operations.md.
#[test]
fn signals_have_their_documented_effects() {
    let mut folder = tempfile::tempdir().unwrap();
    for (signal, expected) in [
        (Signal::INT, Some(0)),
        (Signal::TERM, Some(0)),
        (Signal::QUIT, None),
        (Signal::ALARM, None),
        (Signal::USR1, None),
        (Signal::USR2, None),
    ] {
        // The next broker starts whatever the last one left.
        let broker = Broker::start_in(folder, &[]);
        let ignored = [Signal::HUP, Signal::PIPE, Signal::CHILD, Signal::XFSZ];
        for signal in ignored {
            broker.signal(signal);
            broker.attach().status().unwrap();
        }
        let control = broker.path("control.sock");
        assert!(control.exists());
        let (left, code) = broker.stop(signal);
        assert_eq!(code, expected, "{signal:?}");
        assert_eq!(control.exists(), expected.is_none(), "{signal:?}");
        folder = left;
    }
}

#[test]
fn journal_lines_have_priorities_and_no_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let journal = std::fs::File::create(&path).unwrap();
    let file = journal.metadata().unwrap();
    let mut serve = serve(folder.path());
    serve.env("JOURNAL_STREAM", format!("{}:{}", file.dev(), file.ino()));
    let mut broker = serve.env_remove("RUST_LOG").stderr(journal).start();
    drop(attach(folder.path()));
    signal_child(&broker, Signal::TERM);
    assert_eq!(wait(&mut broker).code(), Some(0));
    let lines = std::fs::read_to_string(path).unwrap();
    assert!(
        lines
            .lines()
            .all(|line| line.starts_with("<6>") || line.starts_with("<4>")),
        "{lines}"
    );
    assert!(lines.contains("<6>stopped\n"), "{lines}");
    // An operator does not want to know of each host app.
    assert!(!lines.contains("attaches"), "{lines}");
}

/// A shell with job control starts the broker in the background of a terminal that stops the
/// background jobs that write to it.
#[test]
fn background_broker_logs_without_being_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let (_master, terminal) = terminal(USUAL);
    let serve = serve(folder.path());
    let mut shell = Command::new("setsid");
    // `wait` would also end when the job is stopped.
    let script = "stty tostop; \"$@\" & while kill -0 $! 2>/dev/null; do sleep 0.1; done";
    shell.args(["--ctty", "sh", "-mc", script, "sh"]);
    shell.arg(serve.get_program()).args(serve.get_args());
    let end = || terminal.try_clone().unwrap();
    let mut shell = shell.stdin(end()).stdout(end()).stderr(end()).start();
    let broker = attach(folder.path()).status().unwrap().broker;
    let broker = Pid::from_raw(broker.cast_signed()).unwrap();
    // Its last line is written before it ends.
    kill_process(broker, Signal::TERM).unwrap();
    assert!(wait(&mut shell).success());
}

/// A user's run folder is removed at logout.
#[test]
fn removed_sockets_permit_no_second_broker() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = serve(folder.path()).start();
    let attached = attach(folder.path());
    for name in ["vm.sock", "control.sock"] {
        std::fs::remove_file(folder.path().join(name)).unwrap();
        std::fs::remove_file(folder.path().join(format!("{name}.lock"))).unwrap();
    }
    let process = format!("process {} listens at socket", first.id());
    let parts = [process.as_str(), "control.sock, whose file was removed"];
    fails(&mut serve(folder.path()), 1, &parts);
    fails(
        serve(folder.path()).arg("--check"),
        1,
        &["whose file was removed"],
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    attached.status().unwrap();
    kill(&mut first);
    let _second = serve(folder.path()).start();
    attach(folder.path());
}

/// Puts a file of a kind at a path.
fn put(what: &str, path: &Path) {
    match what {
        "a symbolic link" => symlink("/does/not/exist", path).unwrap(),
        "a regular file" => file_with(path, b"mine"),
        "a folder" => std::fs::create_dir(path).unwrap(),
        _ => {
            drop(UnixListener::bind(path).unwrap());
            // A process that another thread forks has a copy until it executes its program.
            wait_until("no process listens", || UnixStream::connect(path).is_err());
        }
    }
}

#[test]
fn replaced_sockets_permit_no_second_broker() {
    let replace = |what: &'static str, keeps_lock: bool| {
        let folder = tempfile::tempdir().unwrap();
        let first = serve(folder.path()).start();
        let attached = attach(folder.path());
        let control = folder.path().join("control.sock");
        std::fs::remove_file(&control).unwrap();
        if !keeps_lock {
            std::fs::remove_file(folder.path().join("control.sock.lock")).unwrap();
        }
        put(what, &control);
        let process = format!("process {} listens at socket", first.id());
        let now = format!("whose file was removed and {what} has its name now");
        std::thread::scope(|scope| {
            for option in ["--vectors=0", "--check", "--replace"] {
                let (mut serve, parts) = (serve(folder.path()), [&*process, &*now]);
                scope.spawn(move || fails(serve.arg(option), 1, &parts));
            }
        });
        assert!(control.symlink_metadata().is_ok(), "it is removed");
        attached.status().unwrap();
    };
    std::thread::scope(|scope| {
        for what in [
            "a symbolic link",
            "a regular file",
            "a folder",
            "a socket of no process",
        ] {
            for keeps_lock in [true, false] {
                scope.spawn(move || replace(what, keeps_lock));
            }
        }
    });
}

/// The region is served on, and the file is another program's.
#[test]
fn successor_serves_beside_foreign_file() {
    let mut broker = Broker::start(&[]);
    let socket = broker.path("vm.sock");
    for (what, is_renewed) in [
        ("a folder", false),
        ("a socket of no process", true),
        ("a symbolic link", false),
    ] {
        let _ = std::fs::remove_file(&socket);
        put(what, &socket);
        succeed(&mut broker, &[]);
        let told = format!("because {what} has its name: remove that");
        assert_eq!(
            broker.log().contains(&told),
            !is_renewed,
            "{}",
            broker.log()
        );
        if is_renewed {
            drop(handshake(connect(&broker, "vm.sock"), 6));
        }
        if what == "a folder" {
            std::fs::remove_dir(&socket).unwrap();
        }
    }
    // A broker that ends in good order removes its own files only.
    let (lock, control) = (broker.path("vm.sock.lock"), broker.control());
    std::fs::remove_file(&lock).unwrap();
    file_with(&lock, b"mine");
    succeed(&mut broker, &[]);
    let (_folder, code) = broker.stop(Signal::TERM);
    assert_eq!(code, Some(0));
    assert!(socket.symlink_metadata().is_ok() && !control.exists());
    assert_eq!(std::fs::read(&lock).unwrap(), b"mine");
}

/// The other program listens at the path of a socket whose file was removed.
#[test]
fn successor_leaves_live_foreign_socket_alone() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let mut broker = Broker::start_as(&manager, folder, &[]);
    let (socket, control) = (broker.path("vm.sock"), broker.control());
    std::fs::remove_file(&socket).unwrap();
    let other = UnixListener::bind(&socket).unwrap();
    let theirs = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(&socket, theirs.clone()).unwrap();
    let mut check = broker.command(&["--check"]);
    let check = check.env("MAINPID", broker.child.id().to_string());
    fails(
        check.stderr(Stdio::piped()),
        1,
        &["was removed and a socket of another program has its name now: remove that one"],
    );
    broker.restart(&manager, &[]);
    let log = broker.log();
    let told = "because a socket of another program has its name: remove that";
    assert!(log.contains(told), "{log}");
    let mode = socket.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, theirs.mode());
    drop(other);

    // A broker that no service manager runs removes its own files at its end.
    let mut broker = Broker::start(&[]);
    let (socket, own) = (broker.path("vm.sock"), broker.control());
    std::fs::remove_file(&socket).unwrap();
    let other = UnixListener::bind(&socket).unwrap();
    for _ in 0..2 {
        succeed(&mut broker, &[]);
        assert!(broker.log().contains(told), "{}", broker.log());
    }
    let (_folder, code) = broker.stop(Signal::TERM);
    assert_eq!(code, Some(0));
    assert!(!own.exists() && control.exists());
    let _connected = UnixStream::connect(&socket).unwrap();
    other.accept().unwrap();
}

/// A take-over makes the missing socket of its predecessor again, and then fails.
#[test]
fn failed_successor_leaves_lock_of_predecessor() {
    let folder = tempfile::tempdir().unwrap();
    let second = folder.path().join("second.sock");
    let broker = Broker::start_in(folder, &["--ivshmem", second.to_str().unwrap()]);
    let (socket, lock) = (broker.path("vm.sock"), broker.path("vm.sock.lock"));
    let elsewhere = broker.path("elsewhere.sock");
    for is_locked in [true, false] {
        let _ = std::fs::remove_file(&socket);
        if !is_locked {
            std::fs::remove_file(&lock).unwrap();
        }
        let args = ["--replace", "--ivshmem", elsewhere.to_str().unwrap()];
        let mut command = broker.command(&args);
        command.env("RUST_LOG", "error").stderr(Stdio::piped());
        fails(&mut command, 1, &["the running broker's socket is"]);
        assert!(!socket.exists(), "its socket stays");
        assert_eq!(lock.exists(), is_locked);
        broker.attach().status().unwrap();
    }
}

/// The broker of another user or mount namespace is known by its lock only.
#[test]
fn lock_without_socket_permits_no_second_broker() {
    let folder = tempfile::tempdir().unwrap();
    let lock = folder.path().join("control.sock.lock");
    let file = std::fs::File::create(&lock).unwrap();
    file.lock().unwrap();
    let parts = [
        "a broker has locked ",
        "the file of its socket ",
        "control.sock was removed",
    ];
    for options in [&[][..], &["--replace"], &["--check"]] {
        fails(serve(folder.path()).args(options), 1, &parts);
    }
    // The lock is no longer held, and its file is still there.
    drop(file);
    let mut replace = serve(folder.path());
    fails(replace.arg("--replace"), 3, &["no broker to replace at"]);
    let _broker = serve(folder.path()).start();
    attach(folder.path());
}

/// A restarted service makes its sockets again, and keeps the region.
#[test]
fn restarted_service_renews_removed_sockets() {
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let mut broker = Broker::start_as(&manager, folder, &[]);
    let app = broker.attach();
    let _claimed = app.sender("down").unwrap();
    works(&mut broker.app(&["poke", "kept"]));
    let files = [
        "vm.sock",
        "control.sock",
        "vm.sock.lock",
        "control.sock.lock",
    ];
    for removed in [&files[..2], &files, &files[..1]] {
        for name in removed {
            std::fs::remove_file(broker.path(name)).unwrap();
        }
        let mut check = broker.command(&["--check"]);
        let check = check.env("MAINPID", broker.child.id().to_string());
        fails(
            check.stderr(Stdio::piped()),
            1,
            &["of the running service was removed: restart the service"],
        );
        broker.restart(&manager, &[]);
        let kept = broker.app(&["peek", "--raw", "--length", "4"]);
        assert_eq!(works(&mut { kept }), "kept");
        assert!(matches!(
            broker.attach().sender("down"),
            Err(barlink::Error::Held(_))
        ));
        drop(handshake(connect(&broker, "vm.sock"), 6));
        // Locks and sockets are those that a further broker finds.
        fails(
            broker.command(&[]).stderr(Stdio::piped()),
            1,
            &["is in use by another broker"],
        );
    }
    app.status().unwrap();
}

/// A shell of a service has the service's environment.
#[test]
fn program_of_another_service_is_no_service() {
    let manager = tempfile::tempdir().unwrap();
    let path = manager.path().join("notify.sock");
    let _manager = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start_by(folder, &[], |command| {
        let command = command.env("NOTIFY_SOCKET", &path).env("FDSTORE", "16384");
        command.env("SYSTEMD_EXEC_PID", std::process::id().to_string())
    });
    // It can be replaced, and removes its sockets at its end.
    let mut successor = broker.command(&["--replace"]).start();
    wait_until("it is replaced", || {
        broker.attach().status().unwrap().broker == successor.id()
    });
    signal_child(&successor, Signal::TERM);
    assert_eq!(wait(&mut successor).code(), Some(0));
    assert!(!broker.control().exists());
}
