// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of `cargo xtask demo` as a user types it: the crates that it builds, the arguments that it
//! refuses before it builds anything, and the state after Ctrl-C.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use barlink_sandbox::builds::cargo;
use rustix::process::{Pid, Signal, kill_process_group};

/// Runs `cargo xtask demo` where nothing is set up and nothing can be built. Returns its error,
/// which must be one line.
fn refused(arguments: &[&str]) -> Result<String> {
    let cache = tempfile::tempdir()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.arg("demo").args(arguments).stdin(Stdio::null());
    command.env("XDG_CACHE_HOME", cache.path());
    command
        .env("CARGO", "/bin/false")
        .env_remove("BARLINK_ACCEL");
    let output = command.output()?;
    let errors = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(1), "{errors}");
    ensure!(errors.lines().count() == 1, "{errors}");
    ensure!(fs::read_dir(cache.path())?.next().is_none(), "it began");
    Ok(errors)
}

#[test]
fn demo_refuses_impossible_options_immediately() -> Result<()> {
    let keep = refused(&["--keep"])?;
    assert!(
        keep.contains("--keep puts a shell on this terminal"),
        "{keep}"
    );
    let qemu = refused(&["--qemu", "/no/such/file"])?;
    assert!(
        qemu.contains("--qemu /no/such/file cannot be used"),
        "{qemu}"
    );
    let kernel = ["--kernel-image=/no/image", "--kernel-headers=/no/headers"];
    let kernel = refused(&kernel)?;
    assert!(
        kernel.contains("--kernel-image /no/image cannot be used"),
        "{kernel}"
    );
    if !Path::new("/dev/kvm").exists() {
        let kvm = refused(&["--accel", "kvm"])?;
        assert!(kvm.contains("--accel kvm: /dev/kvm is not there"), "{kvm}");
    }
    Ok(())
}

/// Runs the demo as an ordinary user, to whom the device is closed if it has the kernel's default
/// mode.
#[test]
fn demo_refuses_kvm_without_access() -> Result<()> {
    let closed =
        fs::metadata("/dev/kvm").is_ok_and(|device| device.permissions().mode() & 0o7 == 0);
    if !closed || !rustix::process::geteuid().is_root() {
        eprintln!("not run: it needs root, and a /dev/kvm that is closed to others");
        return Ok(());
    }
    let nobody = 65534;
    // The user `nobody` needs access to the program.
    let folder = tempfile::tempdir()?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let program = folder.path().join("xtask");
    fs::copy(env!("CARGO_BIN_EXE_xtask"), &program)?;
    let mut command = Command::new(program);
    command
        .args(["demo", "--accel", "kvm"])
        .uid(nobody)
        .gid(nobody);
    let output = command.current_dir("/").output()?;
    let errors = String::from_utf8(output.stderr)?;
    assert!(
        errors.contains("/dev/kvm is closed to this user: join the group"),
        "{errors}"
    );
    Ok(())
}

/// Timeout of a demo, after which the test kills it.
const LIMIT: Duration = Duration::from_secs(240);

/// A process group. Dropping it kills the processes.
struct Group(Pid);

impl Drop for Group {
    fn drop(&mut self) {
        // Ignores errors, because the processes have usually ended.
        let _ = kill_process_group(self.0, Signal::KILL);
    }
}

#[test]
fn interrupted_demo_leaves_nothing_behind() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.arg("demo").stdin(Stdio::null());
    command.env("TMPDIR", folder.path()).process_group(0);
    let (output, both) = std::io::pipe()?;
    let mut demo = command.stdout(both.try_clone()?).stderr(both).spawn()?;
    drop(command);
    // The demo and the programs that it starts have a process group of their own, which the test
    // must end itself if it fails or takes too long.
    let group = Group(Pid::from_child(&demo));
    let (ended, end) = channel::<()>();
    let limit = thread::spawn(move || {
        let _ = end.recv_timeout(LIMIT);
        drop(group);
    });
    let mut errors = String::new();
    for line in BufReader::new(output).lines() {
        let line = line?;
        // At this point the guest has booted, and a program runs on each side.
        if line.starts_with("to guest ") {
            // Sends the signal to the whole group, as a terminal does.
            kill_process_group(Pid::from_child(&demo), Signal::INT)?;
        }
        errors.push_str(&line);
        errors.push('\n');
    }
    let code = demo.wait()?.code();
    drop(ended);
    let _ = limit.join();
    ensure!(
        code == Some(130) && errors.ends_with("interrupted; nothing is left behind\n"),
        "{code:?}: {errors}"
    );
    let left: Vec<_> = fs::read_dir(folder.path())?.collect();
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Checks that the demo needs few crates, because it is the first program that a user builds.
#[test]
fn demo_needs_no_costly_crates() -> Result<()> {
    let mut tree = cargo("tree");
    tree.args(["--package=xtask", "--edges=normal", "--prefix=none"]);
    let tree = String::from_utf8(tree.output()?.stdout)?;
    assert!(tree.starts_with("xtask v"), "{tree}");
    let costly = [
        "barlink ",
        "barlink-guest ",
        "barlink-bench",
        "barlink-soak",
        "plotters",
        "vhost",
    ];
    for package in costly {
        let found = tree.lines().find(|line| line.starts_with(package));
        assert_eq!(found, None);
    }
    Ok(())
}
