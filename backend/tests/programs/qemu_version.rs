// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of `barlink qemu-args --qemu`, with scripts in the place of QEMU.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::*;

/// Writes an executable script, and returns its path. A process of its own writes it, because a
/// file that any process of this test has open for writing cannot be executed.
fn script(broker: &Broker, name: &str, body: &str) -> String {
    let path = broker.path(name).display().to_string();
    let mut writer = Command::new("sh")
        .args(["-c", "cat > \"$1\" && chmod 755 \"$1\"", "sh", &path])
        .stdin(Stdio::piped())
        .start();
    let mut input = writer.stdin.take().unwrap();
    write!(input, "#!/bin/sh\n{body}\n").unwrap();
    drop(input);
    assert!(wait(&mut writer).success());
    path
}

/// Starts a broker with an ivshmem slot 0, a vfio-user slot 1 and a vhost-user slot 2.
fn serve_all() -> Broker {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (user, vhost) = (path("user.sock"), path("vhost.sock"));
    Broker::start_in(folder, &["--vfio-user", &user, "--vhost-user", &vhost])
}

fn args<'a>(slot: &'a str, qemu: &'a str) -> [&'a str; 5] {
    ["qemu-args", "--slot", slot, "--qemu", qemu]
}

#[test]
fn qemu_args_tell_what_qemu_can() {
    let broker = serve_all();
    let old = "echo 'QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)'";
    let old = script(&broker, "old", old);
    let output = run(&mut broker.app(&args("0", &old)));
    assert!(output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    let expected = "QEMU 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3) can use the slot over ivshmem";
    assert!(said.starts_with(expected), "{said}");
    let plain = works(&mut broker.app(&["qemu-args"]));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), plain);
    for (slot, needed) in [("1", "10.1"), ("2", "11.1")] {
        let needed = format!("needs {needed} or later: name a later QEMU");
        let parts = ["QEMU 7.2.22 (Debian", "too old", &needed, "with --ivshmem"];
        fails(&mut broker.app(&args(slot, &old)), 1, &parts);
    }
    let candidate = "echo 'QEMU emulator version 10.0.93 (v10.1.0-rc3)'";
    let candidate = script(&broker, "candidate", candidate);
    works(&mut broker.app(&args("1", &candidate)));
    fails(&mut broker.app(&args("2", &candidate)), 1, &["too old"]);
    let ancient = script(&broker, "ancient", "echo 'QEMU emulator version 6.2.0'");
    fails(&mut broker.app(&args("0", &ancient)), 1, &["needs 7.2"]);
}

#[test]
fn qemu_args_find_qemu_as_shells_do() {
    let broker = Broker::start(&[]);
    script(&broker, "my-qemu", "echo 'QEMU emulator version 10.0.2'");
    // A shell would run a command here.
    let odd = script(
        &broker,
        "a $(touch made)",
        "echo 'QEMU emulator version 9.0.0'",
    );
    let mut by_name = broker.app(&args("0", "my-qemu"));
    let folder = broker.path("my-qemu");
    works(by_name.env("PATH", folder.parent().unwrap()));
    let mut quoted = broker.app(&args("0", &odd));
    works(quoted.current_dir(folder.parent().unwrap()));
    assert!(!broker.path("made").exists());
}

#[test]
fn qemu_args_name_cause_of_failed_check() {
    let broker = Broker::start(&[]);
    let missing = broker.path("missing").display().to_string();
    fails(
        &mut broker.app(&args("0", &missing)),
        1,
        &["missing cannot be run: name a program", "No such file"],
    );
    for (name, body, parts) in [
        (
            "fails",
            "echo 'no libpixman\nand more' >&2; exit 127",
            &["fails --version` failed", "127", "\"no libpixman\""][..],
        ),
        ("killed", "kill -KILL $$", &["signal: 9", "runs here"]),
        (
            "image",
            "echo 'qemu-img version 7.2.22'",
            &["\"qemu-img version 7.2.22\"", "qemu-system-x86_64"],
        ),
        ("silent", "exit 0", &["printed \"\"", "qemu-system-x86_64"]),
        (
            "rubbish",
            r"printf 'QEMU emulator version \033[2J\377\n'",
            &["and not `QEMU emulator version ...`", "\\u{1b}[2J"],
        ),
        ("endless", "exec yes", &["more than 4096 bytes"]),
        ("loud", "exec yes >&2", &["more than 4096 bytes"]),
    ] {
        let qemu = script(&broker, name, body);
        let mut command = broker.app(&args("0", &qemu));
        fails(&mut command, 1, parts);
        let output = run(&mut command);
        assert!(output.stdout.is_empty(), "{name} prints arguments");
    }
}

#[test]
fn hanging_qemu_is_killed_with_children() {
    let broker = Broker::start(&[]);
    let pid = broker.path("pid").display().to_string();
    // Without its pipes, QEMU still has to end.
    let body = format!("sleep 1000 & echo $! > {pid}; exec > /dev/null 2>&1; wait");
    let hangs = script(&broker, "hangs", &body);
    let begun = Instant::now();
    fails(
        &mut broker.app(&args("0", &hangs)),
        1,
        &["hangs --version` failed", "did not end within 5 s"],
    );
    assert!(begun.elapsed() >= Duration::from_secs(5));
    assert_ended(&broker);
    // A process that was left behind has the pipes, and is not waited for.
    let body = format!("sleep 1000 & echo $! > {pid}; echo 'QEMU emulator version 8.0.0'");
    let leaves = script(&broker, "leaves", &body);
    works(&mut broker.app(&args("0", &leaves)));
    assert_ended(&broker);
}

/// Waits until the process whose number is in the file `pid` has ended.
fn assert_ended(broker: &Broker) {
    let pid = std::fs::read_to_string(broker.path("pid")).unwrap();
    let status = format!("/proc/{}/stat", pid.trim());
    wait_until("the child has ended", || {
        // It is a zombie until the machine's first process reaps it.
        std::fs::read_to_string(&status).is_ok_and(|stat| stat.contains(") Z "))
            || !std::path::Path::new(&status).exists()
    });
}
