// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of starting and stopping a broker, and of invalid command lines.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use barlink_protocol::wire::layout::{BROKER_PAGE, presence};
use rustix::process::{Pid, Signal};

use crate::limits::wrap;
use crate::support::*;

/// Returns a command that runs `barlink serve` in a folder with these further arguments.
fn serve(folder: &Path, args: &[&str]) -> std::process::Command {
    let path = |name: &str| folder.join(name).into_os_string();
    let mut command = barlink(["serve".into(), "--control".into(), path("control.sock")]);
    command.args(args).env("RUST_LOG", "error");
    if !args.contains(&"--ivshmem") {
        command.arg("--ivshmem").arg(path("vm.sock"));
    }
    command
}

#[test]
fn refuses_sizes_that_no_bar_can_have() {
    let folder = tempfile::tempdir().unwrap();
    let serve = |size| serve(folder.path(), &["--size", size]);
    fails(
        &mut serve("100M"),
        2,
        &[
            "100.00 MiB is not a power of two",
            "take --size 64M or 128M",
        ],
    );
    // Rounded to MiB, this size would read as a power of two, so the error has the bytes.
    fails(
        &mut serve("1048577"),
        2,
        &["region size 1048577 bytes is not a power of two"],
    );
    fails(
        &mut serve("2K"),
        2,
        &["too small", "take --size 128K or more"],
    );
    fails(
        &mut serve("0"),
        2,
        &["0 B is too small", "take --size 128K or more"],
    );
    fails(
        &mut serve("130K"),
        2,
        &["not a power of two", "take --size 128K or 256K"],
    );
    fails(
        &mut serve("1T"),
        2,
        &["1.00 TiB is more than this machine's memory", "or less"],
    );
    // The error names the requested size, not the next power of two.
    fails(
        &mut serve("100T"),
        2,
        &[
            "100.00 TiB is more than this machine's memory",
            "take --size ",
        ],
    );
    fails(&mut serve("8E"), 2, &["more than this machine's memory"]);
    fails(
        &mut serve("much"),
        2,
        &["invalid size `much`", "use a number of bytes, or 64M"],
    );
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        0,
        "it left something behind"
    );
}

#[test]
fn refuses_ineffective_or_invalid_options() {
    let folder = tempfile::tempdir().unwrap();
    fails(
        &mut serve(folder.path(), &["--guest-memory"]),
        2,
        &["--guest-memory has no effect", "add --vfio-user SOCKET"],
    );
    fails(
        &mut serve(folder.path(), &["--channel", "a=up,33M"]),
        2,
        &["33.00 MiB is not a power of two", "take 32M"],
    );
}

#[test]
fn refuses_channels_that_do_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let mut serve = serve(folder.path(), &["--size", "1M", "--channel", "a=up,1M"]);
    fails(
        &mut serve,
        2,
        &[
            "1.00 MiB is too small for its channels",
            "take --size 2M or more",
        ],
    );
    // Without `--size`, the error names the default size.
    fails(
        &mut self::serve(folder.path(), &["--channel", "a=up,64M"]),
        2,
        &[
            "64.00 MiB is too small for its channels",
            "take --size 128M or more",
        ],
    );
    fails(
        &mut self::serve(folder.path(), &["--channel", "a=up,64T"]),
        2,
        &[
            "the channels need a region of 128.00 TiB",
            "take channels that fit into --size ",
        ],
    );
}

#[test]
fn refuses_duplicate_channels_and_sockets() {
    let folder = tempfile::tempdir().unwrap();
    let twice = ["--channel", "a=up,4K", "--channel", "a=down,4K"];
    fails(
        &mut serve(folder.path(), &twice),
        2,
        &["two channels are named `a`", "name them apart"],
    );
    fails(
        &mut serve(folder.path(), &["--channel", "a=1-host,4K"]),
        2,
        &["slot 1", "the last one is 0", "add a socket for each VM"],
    );
    let socket = folder.path().join("vm.sock");
    let socket = socket.to_str().unwrap();
    fails(
        &mut serve(folder.path(), &["--ivshmem", socket, "--ivshmem", socket]),
        2,
        &[socket, "is named twice"],
    );
    // Another spelling of a path does not hide that it is the same.
    let mut command = serve(folder.path(), &["--ivshmem", socket]);
    command.args(["--vfio-user", "./vm.sock"]);
    fails(
        command.current_dir(&folder),
        2,
        &["socket ./vm.sock is named twice"],
    );
    std::os::unix::fs::symlink(&folder, folder.path().join("link")).unwrap();
    std::fs::create_dir(folder.path().join("sub")).unwrap();
    for path in [
        ".//control.sock",
        "link/control.sock",
        "sub/../control.sock",
    ] {
        let mut command = serve(folder.path(), &["--ivshmem", path]);
        fails(command.current_dir(&folder), 2, &["is named twice"]);
    }
}

#[test]
fn refuses_relative_path_that_resolves_too_long() {
    let folder = tempfile::tempdir().unwrap();
    let deep = folder.path().join("x".repeat(100));
    std::fs::create_dir(&deep).unwrap();
    let mut command = serve(folder.path(), &["--ivshmem", "vm.sock"]);
    fails(
        command.current_dir(&deep),
        1,
        &[deep.to_str().unwrap(), "choose a shorter one"],
    );
}

#[test]
fn refuses_existing_file_and_preserves_it() {
    let folder = tempfile::tempdir().unwrap();
    let taken = folder.path().join("taken");
    file_with(&taken, b"mine");
    let taken = taken.to_str().unwrap();
    fails(
        &mut serve(folder.path(), &["--ivshmem", taken]),
        1,
        &[taken, "is not a socket", "choose another path"],
    );
    assert_eq!(std::fs::read(taken).unwrap(), b"mine");
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "it left something beside it: {left:?}");
}

#[test]
fn refuses_a_path_that_is_too_long() {
    let folder = tempfile::tempdir().unwrap();
    let long = folder.path().join("x".repeat(120));
    let long = long.to_str().unwrap();
    fails(
        &mut serve(folder.path(), &["--ivshmem", long]),
        1,
        &[long, "107", "choose a shorter one"],
    );
}

#[test]
fn refuses_a_path_in_a_missing_folder() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("no/vm.sock");
    let parts = [
        "no folder",
        "create",
        folder.path().join("no").to_str().unwrap(),
    ]
    .map(str::to_owned);
    let mut serve = serve(folder.path(), &["--ivshmem", missing.to_str().unwrap()]);
    fails(&mut serve, 1, &parts.each_ref().map(String::as_str));
}

#[test]
fn refuses_path_without_write_permission() {
    if can_become_another_user() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        fails(
            as_nobody(&mut serve(folder.path(), &[])),
            1,
            &["no permission", "choose a folder"],
        );
        // Every user may write to this folder, and another user's broker has left a lock file.
        let open = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(folder.path(), open).unwrap();
        let lock = folder.path().join("vm.sock.lock");
        file_with(&lock, b"");
        std::fs::set_permissions(&lock, std::fs::Permissions::from_mode(0o600)).unwrap();
        fails(
            as_nobody(&mut serve(folder.path(), &[])),
            1,
            &[
                "vm.sock.lock belongs to another user's broker",
                "choose another path",
            ],
        );
    }
    fails(&mut serve(Path::new("/proc/self"), &[]), 1, &["/proc/self"]);
}

#[test]
fn reuses_sockets_of_dead_broker_only() {
    let broker = Broker::start(&[]);
    let folder = broker.folder.path().to_owned();
    let other = folder.join("other.sock");
    let mut again = serve(&folder, &["--ivshmem", other.to_str().unwrap()]);
    fails(
        &mut again,
        1,
        &[
            "control.sock is in use by another broker",
            "--replace",
            "a --name",
        ],
    );
    assert!(!other.exists(), "it left a socket behind");
    let (folder, _) = broker.stop(Signal::KILL);
    assert!(folder.path().join("vm.sock").exists());
    let broker = Broker::start_in(folder, &[]);
    broker.attach();
}

#[test]
fn refuses_a_path_where_another_program_listens() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let told = format!("vm.sock is in use by process {}, which", std::process::id());
    fails(&mut serve(folder.path(), &[]), 1, &[&told]);
    assert!(path.metadata().unwrap().file_type().is_socket());
}

#[test]
fn stopped_broker_removes_its_private_sockets() {
    let mut folder = tempfile::tempdir().unwrap();
    for signal in [Signal::TERM, Signal::INT] {
        let broker = Broker::start_in(folder, &[]);
        let attachment = broker.attach();
        let epoch = || {
            attachment
                .region()
                .ring()
                .load(BROKER_PAGE + presence::EPOCH)
        };
        assert_eq!(epoch(), 1);
        for name in ["vm.sock", "control.sock"] {
            assert_eq!(
                broker.path(name).metadata().unwrap().permissions().mode() & 0o777,
                0o600,
                "{name}"
            );
        }
        let (left, code) = broker.stop(signal);
        assert_eq!((code, epoch()), (Some(0), 2));
        let files = std::fs::read_dir(left.path()).unwrap();
        let files: Vec<_> = files.map(|file| file.unwrap().file_name()).collect();
        assert_eq!(files, ["log"], "after {signal:?}");
        let socket = left.path().join("control.sock");
        fails(
            barlink(["inspect", "--control"]).arg(&socket),
            3,
            &["no broker at", "barlink serve"],
        );
        folder = left;
    }
}

#[test]
fn occupied_socket_error_suggests_working_replacement() {
    let mut broker = Broker::start(&[]);
    let socket = broker.path("vm.sock");
    let other = broker.path("other.sock");
    let mut second = barlink(["serve".as_ref(), "--ivshmem".as_ref(), socket.as_os_str()]);
    second.arg("--control").arg(&other);
    let theirs = format!("--replace --control {} ", broker.control().display());
    fails(
        second.env("RUST_LOG", "error"),
        1,
        &[
            "vm.sock is in use by the broker at",
            "choose another path",
            &theirs,
        ],
    );
    // No broker to replace runs at the second broker's own control socket.
    fails(
        second.arg("--replace"),
        3,
        &["no broker to replace at", "other.sock: leave --replace out"],
    );
    succeed(&mut broker, &[]);
}

#[test]
fn host_app_waits_for_starting_broker() {
    let broker = Broker::start(&[]);
    // The app retries for only one second, and a broker can take longer to start on a busy machine.
    // So the broker runs already, and appears under this path after the app's first attempt. This
    // test can be too slow for that second as well.
    let late = broker.path("late.sock");
    once_of_some("the app finds the broker", || {
        let mut early = barlink(["qemu-args", "--control"]);
        let early = early.arg(&late).stdout(std::process::Stdio::piped());
        let mut early = early.start();
        wait_until("the app sleeps or has ended", || {
            is_asleep(early.id(), "") || early.try_wait().unwrap().is_some()
        });
        std::os::unix::fs::symlink(broker.control(), &late).unwrap();
        let output = finish(early);
        std::fs::remove_file(&late).unwrap();
        let arguments = String::from_utf8(output.stdout).unwrap();
        output.status.success() && arguments.contains("ivshmem-doorbell")
    });
    // The error comes soon, whether a dead broker left its socket or there is no socket.
    let (folder, _) = broker.stop(Signal::KILL);
    for control in ["control.sock", "none.sock"] {
        let start = std::time::Instant::now();
        let mut late = barlink(["qemu-args", "--control"]);
        fails(late.arg(folder.path().join(control)), 3, &["no broker at"]);
        assert!(start.elapsed() < TIMEOUT / 4, "{:?}", start.elapsed());
    }
}

/// A broker that a service runs has its socket in `/run`, and a login shell has a run folder.
#[test]
fn name_is_found_in_folder_of_services() {
    if !can_become_another_user() {
        // The test needs the right to create a mount namespace.
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    std::fs::create_dir(&run).unwrap();
    let script = "mount --bind \"$0\" /run && exec \"$@\"";
    let within = |arguments: &[&str], run_folder: Option<&Path>| {
        let mut command = barlink(arguments);
        let mount = ["--mount", "sh", "-c", script, run.to_str().unwrap()];
        wrap(&mut command, "unshare", &mount);
        match run_folder {
            Some(folder) => command.env("XDG_RUNTIME_DIR", folder),
            None => command.env_remove("XDG_RUNTIME_DIR"),
        };
        command
    };
    let serve = ["serve", "--name", "red", "--ivshmem", "/run/vm.sock"];
    let mut serve = within(&serve, None);
    let mut broker = serve.stderr(std::process::Stdio::null()).start();
    wait_until("the broker listens", || {
        run.join("barlink/red.sock").exists()
    });
    let login = Some(folder.path());
    let inspect = |name| ["inspect", "--once", "--name", name];
    let text = works(&mut within(&inspect("red"), login));
    assert!(text.contains("region 64.00 MiB"), "{text}");
    let listed = works(&mut within(&["list"], login));
    assert!(listed.contains("/run/barlink/red.sock"), "{listed}");
    // Another user may not connect, and cannot know what the socket is. A file with such a name is
    // no broker's.
    let odd = run.join("barlink/\x1b[2J.sock");
    std::fs::hard_link(run.join("barlink/red.sock"), odd).unwrap();
    assert_eq!(works(&mut within(&["list"], login)), listed);
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(run.join("barlink"), open).unwrap();
    let mut list = barlink(["list"]);
    let list = as_nobody(&mut list);
    let script = "mount --bind \"$0\" /run && exec setpriv --reuid=65534 --regid=65534 --clear-groups \"$@\"";
    let mut other = std::process::Command::new("unshare");
    other.args(["--mount", "sh", "-c", script]).arg(&run);
    other.arg(list.get_program()).args(list.get_args());
    let listed = works(other.env_remove("XDG_RUNTIME_DIR"));
    assert!(listed.contains("no broker in"), "{listed}");
    fails(
        &mut within(&inspect("blue"), login),
        3,
        &["no broker `blue` in", "or /run/barlink:", "`barlink list`"],
    );
    kill(&mut broker);
}

#[test]
fn name_selects_private_socket_in_run_folder() {
    let folder = tempfile::tempdir().unwrap();
    let run_folder = |command: &mut std::process::Command| {
        command.env("XDG_RUNTIME_DIR", folder.path());
    };
    let vm = folder.path().join("vm.sock");
    let mut command = barlink([
        "serve".as_ref(),
        "--name".as_ref(),
        "red".as_ref(),
        "--ivshmem".as_ref(),
        vm.as_os_str(),
    ]);
    run_folder(&mut command);
    let mut broker = command.stderr(std::process::Stdio::null()).start();
    wait_until("the broker listens", || {
        folder.path().join("barlink/red.sock").exists()
    });
    assert_eq!(
        folder
            .path()
            .join("barlink")
            .metadata()
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o700
    );
    let mut command = barlink(["qemu-args", "--name", "red"]);
    run_folder(&mut command);
    let arguments = works(&mut command);
    let expected = format!(
        "-chardev socket,id=barlink-socket,path={} -device pcie-root-port,id=barlink-port,chassis=64,pref64-reserve=8G \
         -device ivshmem-doorbell,id=barlink,bus=barlink-port,chardev=barlink-socket,vectors=3\n",
        vm.display()
    );
    assert_eq!(arguments, expected);
    let mut command = barlink(["list"]);
    run_folder(&mut command);
    let listed = works(&mut command);
    let control = folder.path().join("barlink/red.sock");
    let line = listed.lines().find(|line| line.starts_with("red "));
    let line = line.unwrap_or_else(|| panic!("{listed}"));
    let pid = broker.id().to_string();
    for shown in ["64.00 MiB", "0 of 1", &pid, control.to_str().unwrap()] {
        assert!(line.contains(shown), "{shown} is not in {listed}");
    }
    let mut command = barlink(["list", "--json"]);
    run_folder(&mut command);
    let listed: serde_json::Value = serde_json::from_str(&works(&mut command)).unwrap();
    let is_red = |entry: &&serde_json::Value| entry["name"] == "red";
    let red = listed.as_array().unwrap().iter().find(is_red).unwrap();
    assert_eq!((&red["size"], &red["vms"]), (&(64 << 20).into(), &0.into()));
    assert_eq!(red["pid"], broker.id());
    let mut command = barlink(["qemu-args", "--name", "blue"]);
    run_folder(&mut command);
    fails(
        &mut command,
        3,
        &[
            "no broker `blue` in",
            folder.path().to_str().unwrap(),
            "`barlink serve --ivshmem /tmp/vm.sock`",
        ],
    );
    signal_child(&broker, Signal::TERM);
    assert_eq!(wait(&mut broker).code(), Some(0));
}

#[test]
fn qemu_args_refuses_unquotable_socket_paths() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (odd, spaced) = (path("it's$HOME;`x`&\"y\".sock"), path("a b.sock"));
    // QEMU takes vfio-user's options as JSON, in which these characters would need a backslash.
    let (quoted, control) = (path("user\"1.sock"), path("user\u{7}.sock"));
    let vms = ["--ivshmem", &odd, "--ivshmem", &spaced];
    let users = ["--vfio-user", &quoted, "--vfio-user", &control];
    let broker = Broker::start(&[vms, users].concat());
    let mut shell = std::process::Command::new("sh");
    shell.args([
        "-c",
        r#"printf '%s\n' $("$0" qemu-args --slot 1 --control "$1")"#,
    ]);
    shell.args([
        env!("CARGO_BIN_EXE_barlink").as_ref(),
        broker.control().as_os_str(),
    ]);
    let words = works(&mut shell);
    let expected = format!("socket,id=barlink-socket,path={odd}");
    assert_eq!(words.lines().nth(1), Some(&expected[..]));
    for slot in ["3", "4"] {
        fails(
            &mut broker.app(&["qemu-args", "--slot", slot]),
            1,
            &["user", "serve at a path without it"],
        );
    }
    fails(
        &mut broker.app(&["qemu-args", "--slot", "2"]),
        1,
        &["a b.sock", "has a ' '", "serve at a path without it"],
    );
    assert!(works(&mut broker.app(&["qemu-args", "--slot", "2", "--libvirt"])).contains(&spaced));
}

#[test]
fn takes_little_memory_beside_the_region() {
    let broker = Broker::start(&["--size", "64M"]);
    // A session, a claim and a snapshot make the broker run all of its code.
    let attachment = broker.attach();
    drop(attachment.sender("down").unwrap());
    attachment.status().unwrap();
    let own = own_memory(&broker);
    assert!(own <= 16 << 10, "{own} KiB");
}

#[test]
fn allowed_users_can_enter_run_folder() {
    let folder = tempfile::tempdir().unwrap();
    let serve = |name: &str, options: &[&str]| {
        let mut broker = barlink(["serve", "--name", name, "--ivshmem"])
            .arg(folder.path().join(format!("{name}-vm.sock")))
            .args(options)
            .env("XDG_RUNTIME_DIR", folder.path())
            .start();
        let control = folder.path().join(format!("barlink/{name}.sock"));
        wait_until("the broker serves", || control.exists());
        kill(&mut broker);
        let metadata = folder.path().join("barlink").metadata().unwrap();
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(serve("one", &[]), 0o700);
    assert_eq!(serve("two", &["--allow-user", "12345"]), 0o711);
}

#[test]
fn stopped_broker_removes_only_own_files() {
    let broker = Broker::start(&[]);
    let (socket, lock) = (broker.path("vm.sock"), broker.path("vm.sock.lock"));
    for file in [&socket, &lock] {
        std::fs::remove_file(file).unwrap();
        file_with(file, b"mine");
    }
    let (_folder, code) = broker.stop(Signal::TERM);
    assert_eq!(code, Some(0));
    for file in [&socket, &lock] {
        assert_eq!(std::fs::read(file).unwrap(), b"mine");
    }
}

#[test]
fn removed_working_folder_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let script = "mkdir gone && cd gone && rmdir ../gone && exec \"$0\" \"$@\"";
    let mut command = std::process::Command::new("sh");
    command
        .arg("-c")
        .arg(script)
        .arg(barlink([""]).get_program());
    command.args(["serve", "--ivshmem", "vm.sock", "--control", "control.sock"]);
    let parts = [
        "the folder in which this program runs was removed",
        "whole path",
    ];
    fails(command.current_dir(&folder), 1, &parts);
}

#[test]
fn sockets_that_stay_are_reported() {
    let mut broker = Broker::start(&[]);
    let folder = broker.path("control.sock").parent().unwrap().to_owned();
    let moved = folder.with_extension("moved");
    std::fs::rename(&folder, &moved).unwrap();
    std::fs::write(&folder, "no folder").unwrap();
    signal_process(Pid::from_child(&broker.child), Signal::TERM);
    assert_eq!(wait(&mut broker.child).code(), Some(0));
    std::fs::remove_file(&folder).unwrap();
    std::fs::rename(&moved, &folder).unwrap();
    let log = broker.log();
    assert!(log.contains("sockets could not be removed"), "{log}");
}

/// Returns the standard output of a check that succeeds.
fn checks(folder: &Path, args: &[&str]) -> String {
    works(&mut serve(folder, &[&["--check"], args].concat()))
}

#[test]
fn check_without_broker_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let text = checks(folder.path(), &[]);
    assert!(text.contains("are valid; no broker runs at"), "{text}");
    let missing = folder.path().join("no/vm.sock");
    for (args, code, part) in [
        (["--size", "3M"], 2, "not a power of two"),
        (
            ["--ivshmem", missing.to_str().unwrap()],
            1,
            "no folder for socket",
        ),
        (
            ["--allow-user", "no such user"],
            1,
            "no `no such user` in /etc/passwd",
        ),
        (["--channel", "a=up,1G"], 2, "too small"),
    ] {
        let mut check = serve(folder.path(), &[&["--check"], &args[..]].concat());
        fails(&mut check, code, &[part]);
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn check_compares_arguments_with_running_broker() {
    let broker = Broker::start(&["--size", "1M"]);
    let folder = broker.folder.path();
    let text = checks(folder, &["--size", "1M"]);
    let fits = format!(
        "(process {}): its successor keeps the region",
        broker.child.id()
    );
    assert!(text.contains(&fits), "{text}");
    let (socket, other) = (broker.path("vm.sock"), broker.path("other.sock"));
    let (socket, other) = (socket.to_str().unwrap(), other.to_str().unwrap());
    let size = ["--check", "--size", "1M"];
    for (args, parts) in [
        (
            vec!["--size", "2M"],
            ["has another size", "clean --what=fdstore"],
        ),
        (vec!["--ivshmem", other], ["vm.sock and not", "other.sock"]),
    ] {
        let args = [
            &size[..1],
            &args,
            if args[0] == "--size" { &[] } else { &size[1..] },
        ]
        .concat();
        fails(&mut serve(folder, &args), 1, &parts);
    }
    let mut other_transport = barlink(["serve", "--vfio-user", socket, "--size", "1M", "--check"]);
    let control = broker.control();
    let other_transport = other_transport.arg("--control").arg(control);
    fails(
        other_transport,
        1,
        &["slot 0 of the running broker has another transport"],
    );
    broker.attach().status().unwrap();
}

/// A service has a `/tmp` of its own by PrivateTmp=, so no VM would find the socket.
#[test]
fn refuses_socket_in_private_folder() {
    if !can_become_another_user() {
        return;
    }
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let private = folder
        .path()
        .join("systemd-private-0f-barlink@vm1.service-x");
    std::fs::create_dir(&private).unwrap();
    // The path leads there all the same.
    let link = folder.path().join("link");
    std::os::unix::fs::symlink("/tmp", &link).unwrap();
    let link = link.join("vm.sock");
    // As a control process of a service, such as the check before a reload, and as a service that
    // sends no notices.
    for (environment, path) in [
        ("MAINPID=1", "/tmp/vm.sock"),
        ("SYSTEMD_EXEC_PID=$$", "/tmp/vm.sock"),
        ("SYSTEMD_EXEC_PID=$$", link.to_str().unwrap()),
    ] {
        let serve = barlink(["serve", "--ivshmem", path]);
        let mut shell = std::process::Command::new("unshare");
        let script = format!(
            "mount --bind '{}' /tmp && export {environment} && exec \"$@\"",
            private.display()
        );
        shell
            .env_remove("SYSTEMD_EXEC_PID")
            .env_remove("NOTIFY_SOCKET");
        shell.args(["--mount", "sh", "-c", &script, "sh"]);
        // The program may be below /tmp, so it is run by a descriptor.
        let program = std::fs::File::open(serve.get_program()).unwrap();
        shell
            .arg("/proc/self/fd/0")
            .args(serve.get_args())
            .arg("--control")
            .arg(folder.path().join("control.sock"));
        let shell = shell.stdin(program);
        fails(
            shell,
            1,
            &[
                "would be hidden from VMs by PrivateTmp=",
                "below /run/barlink",
            ],
        );
    }
}
