// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of errors that say what to do: limits of a region, of a broker and of a process, and the
//! run folder.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::support::*;

/// Returns a command that serves with one slot in a folder, and these further arguments.
fn serve(folder: &std::path::Path, args: &[&str]) -> Command {
    let mut command = barlink(["serve", "--ivshmem"]);
    command.arg(folder.join("vm.sock")).args(args);
    command
}

#[test]
fn refuses_vectors_that_do_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    for (args, parts) in [
        (
            &["--vectors", "250", "--reserve", "4M,10"][..],
            ["260 vectors", "take --reserve SIZE,6 or fewer"],
        ),
        (
            &["--vectors", "256", "--reserve", "4M,1"],
            ["257 vectors", "take --vectors 255 or fewer"],
        ),
        (
            &["--reserve", "4M,300"],
            ["303 vectors", "take --reserve SIZE,253 or fewer"],
        ),
    ] {
        let mut command = serve(folder.path(), args);
        command.arg("--control").arg(folder.path().join("c.sock"));
        fails(&mut command, 2, &parts);
    }
    let mut command = serve(folder.path(), &["--reserve", "4M,253", "--check"]);
    works(command.arg("--control").arg(folder.path().join("c.sock")));
}

#[test]
fn refuses_more_channels_than_the_table_has() {
    let folder = tempfile::tempdir().unwrap();
    let channels = |count: u32| {
        let mut command = serve(folder.path(), &["--check"]);
        command.arg("--control").arg(folder.path().join("c.sock"));
        for number in 0..count {
            command.arg("--channel").arg(format!("c{number}=up,4K"));
        }
        command
    };
    works(&mut channels(60));
    let parts = ["61 channels", "at most 60", "another `barlink serve`"];
    fails(&mut channels(61), 2, &parts);
}

#[test]
fn full_table_names_another_region() {
    let channels = (0..60).map(|number| format!("--channel=c{number}=up,4K"));
    let mut args: Vec<_> = channels.collect();
    args.push("--reserve=1M".to_owned());
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let broker = Broker::start(&args);
    let parts = ["has 60 channels", "another `barlink serve`"];
    let mut add = barlink(["channel", "add", "more=up,4K", "--control"]);
    fails(add.arg(broker.control()), 1, &parts);
}

#[test]
fn low_limits_are_named_with_their_cures() {
    let folder = tempfile::tempdir().unwrap();
    for (limit, parts) in [
        ("-n 20", ["on open files, 20,", "ulimit -n 646"]),
        ("-f 1000", ["on the size of files,", "ulimit -f unlimited"]),
        // This limit lets the program start, also in a debug build, which is larger. The memory of
        // the region does not fit.
        (
            "-v 200000",
            ["on address space, 204800000,", "smaller --size"],
        ),
    ] {
        let mut command = serve(folder.path(), &["--size", "256M"]);
        command.arg("--control").arg(folder.path().join("c.sock"));
        command.env("RUST_LOG", "error");
        let program = command.get_program().to_owned();
        let args: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let mut limited = Command::new("sh");
        limited
            .arg("-c")
            .arg(format!("ulimit {limit} && exec \"$0\" \"$@\""))
            .arg(program)
            .args(args)
            .env("RUST_LOG", "error")
            .stdin(Stdio::null());
        fails(&mut limited, 1, &parts);
    }
}

/// The broker has given up most system calls when it starts its threads.
#[test]
fn limit_on_threads_is_named_with_cure() {
    /// A user without other processes.
    const USER: u32 = 54_321;
    if !can_become_another_user() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(folder.path(), Some(USER), None).unwrap();
    let mut command = serve(folder.path(), &[]);
    command.arg("--control").arg(folder.path().join("c.sock"));
    // That user may be unable to reach the folder of the program.
    let program = std::fs::File::open(command.get_program()).unwrap();
    let mut limited = Command::new("prlimit");
    limited.args(["--nproc=2", "/proc/self/fd/0"]);
    limited.args(command.get_args()).env("RUST_LOG", "error");
    limited.uid(USER).gid(USER).stdin(program);
    let parts = ["whose limit is 2", "`ulimit -u`", "cannot start a thread"];
    fails(&mut limited, 1, &parts);
}

#[test]
fn lost_report_says_that_channel_was_added() {
    let broker = Broker::start(&["--reserve", "1M"]);
    let mut add = barlink(["channel", "add", "more=up,4K", "--control"]);
    add.arg(broker.control());
    let full = std::fs::File::options().write(true).open("/dev/full");
    let program = add.stdout(full.unwrap()).stderr(Stdio::piped()).start();
    let output = finish(program);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    let told = "channel `more` is added, and only this report failed";
    assert!(text.contains(told) && text.contains("No space"), "{text}");
    let mut list = barlink(["channel", "list", "--control"]);
    assert!(works(list.arg(broker.control())).contains("more: "));
}

#[test]
fn apps_beyond_limit_receive_reason_and_cure() {
    let broker = Broker::start(&[]);
    let mut attached: Vec<_> = (0..64).map(|_| broker.attach()).collect();
    let parts = ["64 host apps are attached", "end one of them"];
    for _ in 0..20 {
        fails(&mut broker.app(&["inspect", "--once"]), 4, &parts);
    }
    fails(&mut broker.app(&["recv"]), 4, &parts);
    attached.pop();
    wait_until("the broker serves again", || {
        run(&mut broker.app(&["inspect", "--once"]))
            .status
            .success()
    });
}

#[test]
fn refuses_run_folders_that_do_not_exist() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("run/user");
    let mut command = serve(folder.path(), &[]);
    command.env("XDG_RUNTIME_DIR", &missing);
    let parts = ["run/user, which does not exist", "loginctl", "--control"];
    fails(&mut command, 1, &parts);
    assert!(!folder.path().join("run").exists());

    let mut command = serve(folder.path(), &[]);
    command.env("XDG_RUNTIME_DIR", "run").current_dir(&folder);
    let parts = [
        "XDG_RUNTIME_DIR is `run`",
        "not an absolute path",
        "--control",
    ];
    fails(&mut command, 1, &parts);
    assert!(!folder.path().join("run").exists());
    // Other commands look in no such folder, either.
    std::fs::create_dir_all(folder.path().join("run/barlink")).unwrap();
    let mut command = barlink(["inspect", "--once", "--name", "no-such-name"]);
    command.env("XDG_RUNTIME_DIR", "run").current_dir(&folder);
    let output = run(&mut command);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(!text.contains(" run/barlink"), "{text}");
}

#[test]
fn list_names_folder_that_it_cannot_read() {
    let folder = tempfile::tempdir().unwrap();
    // Not even root can list a file.
    file_with(&folder.path().join("barlink"), b"");
    let mut list = barlink(["list"]);
    list.env("XDG_RUNTIME_DIR", folder.path());
    let place = folder.path().join("barlink").display().to_string();
    let parts = [
        "cannot list",
        place.as_str(),
        "are not listed",
        "--name NAME",
    ];
    fails_after(&mut list, 1, &parts);
}

#[test]
fn run_folder_of_strict_umask_is_named() {
    if !can_become_another_user() {
        return;
    }
    let run = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(run.path(), Some(NOBODY), None).unwrap();
    for mode in [0o000, 0o300, 0o500] {
        let folder = run.path().join("barlink");
        std::fs::create_dir(&folder).unwrap();
        std::os::unix::fs::chown(&folder, Some(NOBODY), None).unwrap();
        std::fs::set_permissions(&folder, Permissions::from_mode(mode)).unwrap();
        let mut command = serve(run.path(), &[]);
        as_nobody(&mut command).env("XDG_RUNTIME_DIR", run.path());
        let with = format!("with its mode {mode:03o}");
        fails(&mut command, 1, &[&with, "chmod 700"]);
        std::fs::remove_dir(&folder).unwrap();
    }
}

/// Another user could exchange the sockets in such a folder.
#[test]
fn refuses_run_folders_of_other_users() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("target");
    std::fs::create_dir(&target).unwrap();
    std::os::unix::fs::symlink(&target, folder.path().join("barlink")).unwrap();
    let mode = target.metadata().unwrap().permissions();
    let mut command = serve(folder.path(), &["--allow-user", "0"]);
    command.env("XDG_RUNTIME_DIR", folder.path());
    fails(&mut command, 1, &["cannot prepare the run folder"]);
    assert_eq!(target.metadata().unwrap().permissions(), mode);
    if can_become_another_user() {
        let theirs = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(theirs.path(), Some(NOBODY), None).unwrap();
        let mut command = serve(folder.path(), &[]);
        command.env("XDG_RUNTIME_DIR", theirs.path());
        fails(&mut command, 1, &["is the folder of user 65534"]);
        let in_ours = folder.path().join("run");
        std::fs::create_dir_all(in_ours.join("barlink")).unwrap();
        std::os::unix::fs::chown(in_ours.join("barlink"), Some(NOBODY), None).unwrap();
        let mut command = serve(folder.path(), &[]);
        command.env("XDG_RUNTIME_DIR", in_ours);
        fails(
            &mut command,
            1,
            &["barlink: name a socket", "it belongs to user 65534"],
        );
    }
}
