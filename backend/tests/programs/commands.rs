// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the errors of commands: each takes one line, and names its cause.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Stdio;

use crate::support::*;

#[test]
fn poke_and_peek_reject_offsets_outside_window() {
    let broker = Broker::start(&["--size", "1M"]);
    works(&mut broker.app(&["poke", "hello", "--at", "3"]));
    assert_eq!(
        works(&mut broker.app(&["peek", "--raw", "--at", "3", "--length", "5"])),
        "hello"
    );
    assert!(works(&mut broker.app(&["peek", "--length", "16"])).contains("00 00 00 68"));
    let magic = works(&mut broker.app(&["peek", "--region", "--raw", "--length", "7"]));
    assert_eq!(magic, "barlink");
    fails(
        &mut broker.app(&["peek", "--at", "0xfffff0"]),
        1,
        &["0xfffff0 is not in the raw window", "a smaller --at"],
    );
    fails(
        &mut broker.app(&["poke", "x", "--region", "--at", "1M"]),
        1,
        &[
            "1 bytes at 0x100000 do not fit into the region, which has 0 bytes from there on: use no more",
        ],
    );
    fails(
        &mut broker.app(&["poke", "x", "--region"]),
        1,
        &[
            "the first 8.00 KiB of a region describe it",
            "--at 8192 or more",
        ],
    );
    // `poke` reads no more of its input than there is room for.
    let mut endless = std::process::Command::new("yes")
        .stdout(Stdio::piped())
        .start();
    let input = endless.stdout.take().unwrap();
    fails(
        broker.app(&["poke"]).stdin(input),
        1,
        &["do not fit into the raw window"],
    );
    wait(&mut endless);
}

#[test]
fn commands_reject_missing_ends_slots_and_windows() {
    // These channels leave no room for a raw window.
    let channels = ["a=up,64K", "b=down,32K", "c=up,8K"];
    let channels = channels.iter().flat_map(|channel| ["--channel", channel]);
    let broker = Broker::start(
        &["--size", "128K"]
            .into_iter()
            .chain(channels)
            .collect::<Vec<_>>(),
    );
    fails(
        &mut broker.app(&["recv", "--channel", "b"]),
        1,
        &[
            "the consumer of channel `b` is slot 0's VM",
            "use it there with barlink-guest",
        ],
    );
    fails(
        &mut broker.app(&["peek"]),
        1,
        &["no raw window", "a larger --size"],
    );
    fails(
        &mut broker.app(&["qemu-args", "--slot", "1"]),
        1,
        &["no slot 1", "last slot is 0", "with --slot"],
    );
}

#[test]
fn error_takes_one_line_whatever_the_name() {
    let broker = Broker::start(&[]);
    for (args, part) in [
        (&["tail", "a\nb"][..], "`a\\nb`"),
        (&["recv", "-o", "/no\x1b[2J/file"], "/no\\u{1b}[2J/file"),
        (&["send", "/no\r/file"], "/no\\r/file"),
        (&["recv", "--timeout", "a\rb"], "`a\\rb`"),
    ] {
        let output = run(&mut broker.app(args));
        assert!(!output.status.success());
        let errors = String::from_utf8(output.stderr).unwrap();
        let is_line = errors.ends_with('\n') && errors.matches(char::is_control).count() == 1;
        assert!(is_line && errors.contains(part), "{errors:?}");
    }
}

#[test]
fn tip_for_negative_value_names_its_option() {
    fails(
        &mut barlink(["tail", "up", "--count", "-1"]),
        2,
        &["unexpected argument '-1' found; tip: to pass '-1' as a value, use '--count=-1'"],
    );
    fails(
        &mut barlink(["serve", "--size", "-1"]),
        2,
        &["unexpected argument '-1' found; tip: to pass '-1' as a value, use '--size=-1'"],
    );
    fails(
        &mut barlink(["tail", "up", "--count=-1"]),
        2,
        &["invalid value '-1'"],
    );
}

/// Collects the variables of the environment that the code of a folder reads.
fn variables(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            variables(&path, found);
            continue;
        }
        let source = std::fs::read_to_string(path).unwrap();
        let lines = source.lines().map(str::trim_start);
        for line in lines.filter(|line| !line.starts_with("//")) {
            for call in ["variable(\"", "text(\"", "var(\"", "var_os(\""] {
                let names = line.split(call).skip(1);
                let names = names.map(|rest| rest.split('"').next().unwrap());
                let is_variable = |name: &&str| {
                    name.bytes()
                        .all(|byte| byte.is_ascii_uppercase() || byte == b'_')
                };
                found.extend(names.filter(is_variable).map(str::to_owned));
            }
        }
    }
}

#[test]
fn help_lists_environment() {
    let mut found = BTreeSet::new();
    let crates = Path::new(env!("CARGO_MANIFEST_DIR"));
    for source in ["src", "../client/src", "../protocol/cli/src"] {
        variables(&crates.join(source), &mut found);
    }
    for name in ["RUST_LOG", "XDG_RUNTIME_DIR", "LISTEN_FDNAMES"] {
        assert!(found.contains(name), "{name} is not found: {found:?}");
    }
    let help = works(&mut barlink(["serve", "--help"]));
    let document = include_str!("../../../docs/operations.md");
    for name in found {
        assert!(help.contains(&name), "no {name} in: {help}");
        assert!(document.contains(&format!("`{name}`")), "no {name}");
    }
    let mut guest = BTreeSet::new();
    variables(&crates.join("../guest-app/src"), &mut guest);
    assert_eq!(guest, BTreeSet::new(), "docs/operations.md says otherwise");
}

#[test]
fn empty_variables_count_as_not_set() {
    let names = [
        "NOTIFY_SOCKET",
        "FDSTORE",
        "LISTEN_PID",
        "LISTEN_FDS",
        "LISTEN_FDNAMES",
        "SYSTEMD_EXEC_PID",
        "MAINPID",
        "JOURNAL_STREAM",
        "RUST_LOG",
        "RUST_LOG_STYLE",
        "NO_COLOR",
        "TERM",
    ];
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start_by(folder, &[], |command| {
        command.envs(names.map(|name| (name, "")))
    });
    let log = broker.log();
    assert!(log.contains("INFO") && log.contains("serving"), "{log}");
    assert!(!log.contains("WARN"), "{log}");
    // It is no service, so it can be replaced.
    let mut successor = broker.command(&["--replace"]);
    let successor = successor.envs(names.map(|name| (name, ""))).start();
    wait_until("it is replaced", || {
        broker.attach().status().unwrap().broker == successor.id()
    });
}

/// Such a word would silence the log.
#[test]
fn invalid_log_filter_has_no_effect() {
    for (filter, is_valid) in [
        ("%%%", false),
        ("verbose", false),
        ("info,barlink=loud", false),
        (",", false),
        ("/serving", false),
        ("info,vhost=debug", true),
        ("barlink_broker,barlink=info", true),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let broker = Broker::start_by(folder, &[], |command| command.env("RUST_LOG", filter));
        let log = broker.log();
        assert!(log.contains("serving"), "{filter}: {log}");
        assert_eq!(log.contains("RUST_LOG has no effect"), !is_valid, "{log}");
    }
}

/// A shell that a service has started has variables that were meant for the service.
#[test]
fn stray_descriptor_variables_prevent_no_start() {
    for stray in [
        &[("LISTEN_FDNAMES", "a:b")][..],
        &[("LISTEN_FDS", "2")],
        &[("LISTEN_PID", "1"), ("LISTEN_FDS", "2")],
        &[
            ("LISTEN_PID", "x"),
            ("LISTEN_FDS", "x"),
            ("LISTEN_FDNAMES", "a"),
        ],
    ] {
        let folder = tempfile::tempdir().unwrap();
        let broker = Broker::start_by(folder, &[], |command| command.envs(stray.iter().copied()));
        assert!(!broker.log().contains("WARN"), "{}", broker.log());
    }
}

#[test]
fn missing_passed_descriptors_are_named_with_cure() {
    let folder = tempfile::tempdir().unwrap();
    for (variables, fault) in [
        (
            "LISTEN_FDS=1",
            "LISTEN_FDS names descriptor 3, `unknown`: Bad file",
        ),
        (
            "LISTEN_FDS=2 LISTEN_FDNAMES=a",
            "LISTEN_FDNAMES has 1 names",
        ),
        ("LISTEN_FDS=x", "LISTEN_FDS is `x`"),
        ("LISTEN_FDS=2147483644", "LISTEN_FDS is `2147483644`"),
    ] {
        let mut command = std::process::Command::new("sh");
        let script = format!("exec 3<&-; LISTEN_PID=$$ {variables} exec \"$0\" \"$@\"");
        let serve = barlink(["serve", "--ivshmem", "vm.sock", "--control", "c.sock"]);
        command.args(["-c", &script]).arg(serve.get_program());
        command.args(serve.get_args()).current_dir(&folder);
        fails(&mut command, 1, &[fault, "unset LISTEN_PID"]);
    }
}

/// A kernel reports such a file as a socket without a process.
#[test]
fn errors_name_file_instead_of_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::create_dir(path("folder")).unwrap();
    file_with(Path::new(&path("file")), b"mine");
    std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        path("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    for (name, what) in [
        ("folder", "a folder"),
        ("file", "a regular file"),
        ("pipe", "a pipe"),
        ("link", "a symbolic link"),
    ] {
        let path = path(name);
        let that = format!("no broker at {path}: that is {what}");
        for command in [&["inspect", "--once"][..], &["recv"], &["qemu-args"]] {
            fails(barlink(command).args(["--control", &path]), 3, &[&that]);
        }
        let it = format!("{path} is {what}, which is not a socket");
        let c = folder.path().join("c.sock");
        let c = c.to_str().unwrap();
        for options in [
            ["--ivshmem", c, "--control", &path],
            ["--ivshmem", &path, "--control", c],
            ["--vfio-user", &path, "--control", c],
            ["--vhost-user", &path, "--control", c],
        ] {
            for further in [&[][..], &["--check"], &["--replace"]] {
                // Without a predecessor, that is the fault.
                if further == ["--replace"] && options[3] == c {
                    continue;
                }
                let mut serve = barlink(["serve"]);
                fails(serve.args(options).args(further), 1, &[&it]);
            }
        }
    }
    let below = path("file/c.sock");
    let told = format!("{} is a regular file", path("file"));
    let mut inspect = barlink(["inspect", "--once", "--control", &below]);
    fails(&mut inspect, 3, &[&below, &told]);
    let mut serve = barlink(["serve", "--ivshmem", &below, "--control", &path("c.sock")]);
    fails(&mut serve, 1, &[&below, &told]);
    assert_eq!(std::fs::read(path("file")).unwrap(), b"mine");
}
