// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Support for the tests: a broker in a folder of its own, and commands that run against it.

use std::ffi::{OsStr, OsString};
use std::os::fd::IntoRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use barlink::Access;
use barlink::host::{self, AttachOptions, Attachment};
use barlink_service::ServiceManager;
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;

pub use crate::process::*;

/// Path of the program `barlink`.
const PROGRAM: &str = env!("CARGO_BIN_EXE_barlink");

/// Makes a command that runs `barlink` with these arguments.
pub fn barlink<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    command(PROGRAM.as_ref(), args)
}

fn command<S: AsRef<OsStr>>(program: &OsStr, args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(Stdio::null())
        .env_remove("RUST_LOG")
        .env_remove("SYSTEMD_EXEC_PID");
    command
}

/// A user ID that is not the broker's. Only root can change to it.
pub const NOBODY: u32 = 65534;

/// Returns whether this process can change to another user. If it cannot, it prints that a part of
/// the test is not run.
pub fn can_become_another_user() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("as an ordinary user: the part of this test that needs another user is not run");
    }
    root
}

/// Makes a command run as the user `nobody`. The command runs `barlink` by a descriptor, because
/// that user may be unable to reach the folder of the program, for example in root's home.
pub fn as_nobody(of: &mut Command) -> &mut Command {
    // Without CLOEXEC: the command inherits it.
    let program = rustix::fs::open(PROGRAM, OFlags::RDONLY, Mode::empty()).unwrap();
    let reachable = format!("/proc/self/fd/{}", program.into_raw_fd());
    let words = [of.get_program()].into_iter().chain(of.get_args());
    let reachable = words.map(|word| match word == PROGRAM {
        true => reachable.clone().into(),
        false => word.to_owned(),
    });
    let words: Vec<OsString> = reachable.collect();
    *of = command(&words[0], &words[1..]);
    of.uid(NOBODY).gid(NOBODY)
}

fn serve(folder: &Path, args: &[&str]) -> Command {
    let path = |name: &str| folder.join(name).into_os_string();
    let mut command = barlink([
        "serve".into(),
        "--ivshmem".into(),
        path("vm.sock"),
        "--control".into(),
        path("control.sock"),
    ]);
    // The tests wait for lines about host apps, which are not in the log by default.
    command.args(args).env("RUST_LOG", "debug");
    command
}

fn start_service(manager: &ServiceManager, folder: &Path, args: &[&str]) -> Program {
    let program = serve(folder, args);
    let mut command = manager.service(Path::new(program.get_program())).unwrap();
    command.args(program.get_args()).env("RUST_LOG", "debug");
    let program = command.stdin(Stdio::null()).stderr(log(folder)).start();
    wait_until("the service is ready", || {
        manager.wait_until_ready().is_ok()
    });
    program
}

/// Opens the file that brokers in a folder log to.
fn log(folder: &Path) -> std::fs::File {
    let mut options = std::fs::File::options();
    let file = options.create(true).append(true).open(folder.join("log"));
    file.unwrap()
}

/// A `barlink serve` that runs until this value is dropped.
pub struct Broker {
    pub child: Program,
    pub folder: tempfile::TempDir,
}

impl Broker {
    /// Starts a broker with one ivshmem slot and these further arguments.
    pub fn start(args: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), args)
    }

    /// Starts a broker as [`Broker::start`] does, in an existing folder.
    pub fn start_in(folder: tempfile::TempDir, args: &[&str]) -> Self {
        Self::start_by(folder, args, |command| command)
    }

    /// Starts a broker as [`Broker::start_in`] does, by a command that `way` has changed.
    pub fn start_by(
        folder: tempfile::TempDir,
        args: &[&str],
        way: impl FnOnce(&mut Command) -> &mut Command,
    ) -> Self {
        let mut command = serve(folder.path(), args);
        let child = way(&mut command).stderr(log(folder.path())).start();
        let broker = Broker { child, folder };
        wait_until("the broker listens", || {
            AttachOptions::new()
                .access(Access::ReadOnly)
                .connect_path(broker.control())
                .is_ok()
        });
        broker
    }

    /// Starts a broker as [`Broker::start_in`] does, as a service of this manager.
    pub fn start_as(manager: &ServiceManager, folder: tempfile::TempDir, args: &[&str]) -> Self {
        let child = start_service(manager, folder.path(), args);
        Broker { child, folder }
    }

    /// Kills the broker and starts it again, as its service manager does.
    pub fn start_again(&mut self, manager: &ServiceManager, args: &[&str]) {
        kill(&mut self.child);
        self.start_service_again(manager, args);
    }

    /// Starts the broker again after it has ended, as its service manager does.
    pub fn start_service_again(&mut self, manager: &ServiceManager, args: &[&str]) {
        self.child = start_service(manager, self.folder.path(), args);
    }

    /// Stops the broker by SIGTERM and starts it again, as its service manager does.
    pub fn restart(&mut self, manager: &ServiceManager, args: &[&str]) {
        self.signal(Signal::TERM);
        assert_eq!(wait(&mut self.child).code(), Some(0), "{}", self.log());
        self.start_service_again(manager, args);
    }

    /// Returns a command that runs `barlink serve` with this broker's sockets and log, and these
    /// further arguments.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = serve(self.folder.path(), args);
        command.stderr(log(self.folder.path()));
        command
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn control(&self) -> PathBuf {
        self.path("control.sock")
    }

    /// Returns a command that runs `barlink` with these arguments at this broker.
    pub fn app(&self, args: &[&str]) -> Command {
        let mut command = barlink(args);
        command.arg("--control").arg(self.control());
        command
    }

    pub fn attach(&self) -> Attachment {
        host::connect_path(self.control()).unwrap()
    }

    /// Returns the log, after the broker's thread for it has written all lines.
    pub fn log(&self) -> String {
        if Path::new(&format!("/proc/{}/task", self.child.id())).exists() {
            wait_until_asleep(self.child.id(), "log");
        }
        std::fs::read_to_string(self.path("log")).unwrap()
    }

    /// Waits until all of the broker's threads sleep.
    pub fn wait_until_idle(&self) {
        wait_until_asleep(self.child.id(), "");
    }

    /// Counts the broker's open descriptors, after it has closed those of ended connections.
    pub fn descriptors(&self) -> usize {
        self.wait_until_idle();
        let all = std::fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        all.unwrap().count()
    }

    pub fn signal(&self, signal: Signal) {
        signal_child(&self.child, signal);
    }

    /// Stops the broker with a signal. Returns its folder, and its exit code unless the signal
    /// killed it.
    pub fn stop(mut self, signal: Signal) -> (tempfile::TempDir, Option<i32>) {
        self.signal(signal);
        let status = wait(&mut self.child);
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap());
        (folder, status.code())
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "the broker's log:\n{}",
                std::fs::read_to_string(self.path("log")).unwrap_or_default()
            );
        }
    }
}

/// Replaces a broker by another one with the same arguments, and waits until that serves.
pub fn succeed(broker: &mut Broker, arguments: &[&str]) {
    let mut successor = broker.command(&[arguments, &["--replace"]].concat());
    let successor = successor.start();
    let mut predecessor = std::mem::replace(&mut broker.child, successor);
    assert_eq!(wait(&mut predecessor).code(), Some(0), "{}", broker.log());
    let pid = broker.child.id();
    assert_eq!(broker.attach().status().unwrap().broker, pid);
}

/// Runs a command that must fail with this exit code and one line on standard error. The line must
/// contain all `parts`.
pub fn fails(command: &mut Command, code: i32, parts: &[&str]) {
    let Output { status, stderr, .. } = run(command);
    let text = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(code), "{text}");
    assert_eq!(text.lines().count(), 1, "more than one line: {text}");
    for part in parts {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
}

/// Checks that a program fails with this code, and that its messages contain these parts.
pub fn fails_after(command: &mut Command, code: i32, parts: &[&str]) {
    let output = run(command);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{errors}");
    for part in parts {
        assert!(errors.contains(part), "no `{part}` in {errors}");
    }
}

/// Runs a command that must succeed. Returns its standard output.
pub fn works(command: &mut Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = run(command);
    assert!(
        status.success(),
        "{status}: {}",
        String::from_utf8_lossy(&stderr)
    );
    String::from_utf8(stdout).unwrap()
}

/// Reads a field of a broker's `/proc/PID/status`.
pub fn status(broker: &Broker, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", broker.child.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Measures the memory of a broker, in KiB. The region's pages are shared memory and not included.
pub fn own_memory(broker: &Broker) -> u64 {
    status(broker, "RssAnon") + status(broker, "RssFile")
}

/// Reads the processor time that a process has used, in clock ticks of 10 ms.
pub fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The second field, the name in parentheses, can contain spaces.
    let fields: Vec<_> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// Creates pseudo-random bytes. No two places are equal, and no compression or zero page can hide
/// an error.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = vec![0; length];
    for word in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
    bytes
}

pub fn file_with(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
}
