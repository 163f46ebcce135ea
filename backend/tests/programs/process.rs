// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Programs that tests start, and waits that have a limit.

use std::io::Read;
use std::ops::{Deref, DerefMut};
use std::os::fd::AsFd;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::retry_on_intr;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process, pidfd_open, waitid,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

/// Limit of every wait. No step takes as long, even on a busy machine.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Returns the number of rounds of a loop that is repeated for depth: `full` if `BARLINK_TIER` is
/// `soak`, otherwise `brief`.
pub fn rounds(brief: usize, full: usize) -> usize {
    match std::env::var("BARLINK_TIER") {
        Ok(tier) if tier == "soak" => full,
        _ => brief,
    }
}

/// Makes programs start with no signal ignored or blocked. This process may have been started with
/// ignored signals by `nohup`, or by a shell in the background.
fn reset_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let mut lines = status.lines();
        let ignored = lines.find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
        let ignored = u64::from_str_radix(ignored.trim(), 16).unwrap();
        for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
            if ignored >> (signal - 1) & 1 == 1 {
                // A handler that does nothing ignores the signal here, and becomes the default
                // action after `exec`. The standard library resets SIGPIPE.
                signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false))).unwrap();
            }
        }
    });
    // A child inherits the mask of the thread that starts it.
    SigSet::empty().thread_set_mask().unwrap();
}

/// A running program. Dropping this value kills the program.
pub struct Program(Child);

impl Deref for Program {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Program {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // `kill` does nothing to a program that was waited for.
        let _ = self.0.kill();
        let ended = ends_within(&mut self.0, TIMEOUT);
        assert!(ended.is_some() || std::thread::panicking(), "it stays");
    }
}

/// Starts a program. Tests use no other way to start one.
pub trait Start {
    /// Starts the program with the default for each signal.
    fn start(&mut self) -> Program;
}

impl Start for Command {
    fn start(&mut self) -> Program {
        reset_signals();
        match self.spawn() {
            Ok(child) => Program(child),
            Err(error) => panic!("cannot start {self:?}: {error}"),
        }
    }
}

pub fn signal_child(child: &Child, signal: Signal) {
    signal_process(Pid::from_child(child), signal);
}

/// Sends a child a signal. After SIGSTOP also waits until each thread of the child stands still,
/// which is a moment later.
pub fn signal_process(child: Pid, signal: Signal) {
    kill_process(child, signal).unwrap();
    if signal == Signal::STOP {
        let end = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        retry_on_intr(|| waitid(WaitId::Pid(child), end)).unwrap();
    }
}

fn ends_within(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    if let Some(status) = child.try_wait().unwrap() {
        return Some(status);
    }
    let end = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).unwrap();
    becomes_readable(&end, Instant::now() + limit);
    child.try_wait().unwrap()
}

/// Waits for a program, which must end within the limit.
pub fn wait(child: &mut Child) -> ExitStatus {
    ends_within(child, TIMEOUT).unwrap_or_else(|| {
        let _ = child.kill();
        panic!("process {} has not ended within {TIMEOUT:?}", child.id())
    })
}

/// Kills a program and waits for its end.
pub fn kill(child: &mut Child) {
    child.kill().unwrap();
    wait(child);
}

/// Returns whether a descriptor is readable within a time.
pub fn is_readable_within(from: &impl AsFd, time: Duration) -> bool {
    becomes_readable(from, Instant::now() + time)
}

fn becomes_readable(from: &impl AsFd, end: Instant) -> bool {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap();
        let mut readable = [PollFd::new(from, PollFlags::IN)];
        match rustix::event::poll(&mut readable, Some(&left)) {
            Err(rustix::io::Errno::INTR) => (),
            polled => return polled.unwrap() > 0,
        }
    }
}

/// Reads from a pipe or a terminal. Bytes or the end must come within the limit; 0 means the end.
pub fn read_some(from: &mut (impl Read + AsFd), bytes: &mut [u8]) -> usize {
    let is_readable = becomes_readable(from, Instant::now() + TIMEOUT);
    assert!(is_readable, "nothing to read within {TIMEOUT:?}");
    from.read(bytes).unwrap()
}

/// Reads exactly `LENGTH` bytes from a pipe. They must come within the limit.
pub fn read_exactly<const LENGTH: usize>(from: &mut (impl Read + AsFd)) -> [u8; LENGTH] {
    let (mut bytes, mut length) = ([0; LENGTH], 0);
    while length < LENGTH {
        let more = read_some(from, &mut bytes[length..]);
        assert_ne!(more, 0, "only {length} of {LENGTH} bytes came");
        length += more;
    }
    bytes
}

/// Reads a pipe to its end, which must come within the limit.
pub fn read_rest(from: &mut (impl Read + AsFd)) -> Vec<u8> {
    let (mut all, mut bytes) = (Vec::new(), [0; 1 << 16]);
    loop {
        match read_some(from, &mut bytes) {
            0 => return all,
            length => all.extend(&bytes[..length]),
        }
    }
}

/// Reads the standard error, a pipe, of a program that has ended.
pub fn errors_of(child: &mut Child) -> String {
    String::from_utf8(read_rest(&mut child.stderr.take().unwrap())).unwrap()
}

/// Waits until a condition holds, which must happen within the limit.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    let mut pause = Duration::from_micros(50);
    while !done() {
        assert!(start.elapsed() < TIMEOUT, "not within {TIMEOUT:?}: {what}");
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Waits for a thread, which must end within the limit.
pub fn join<T>(what: &str, thread: JoinHandle<T>) -> T {
    wait_until(what, || thread.is_finished());
    thread.join().unwrap()
}

/// Runs work that may block. It must end within the limit.
pub fn within_the_limit(what: &str, work: impl FnOnce() + Send + 'static) {
    join(what, std::thread::spawn(work));
}

/// A guard that sets a flag when it is dropped, so that other threads end even if a test fails.
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Receives a message of a thread, which must come within the limit.
pub fn take<T>(what: &str, from: &std::sync::mpsc::Receiver<T>) -> T {
    let taken = from.recv_timeout(TIMEOUT);
    taken.unwrap_or_else(|error| panic!("{error}: {what}"))
}

/// Waits for the end of a program, and reads its outputs, which are pipes.
pub fn finish(mut program: Program) -> Output {
    fn reader(pipe: Option<impl Read + AsFd + Send + 'static>) -> JoinHandle<Vec<u8>> {
        std::thread::spawn(|| pipe.map_or_else(Vec::new, |mut pipe| read_rest(&mut pipe)))
    }
    let (out, err) = (program.stdout.take(), program.stderr.take());
    let (out, err) = (reader(out), reader(err));
    let status = wait(&mut program);
    Output {
        status,
        stdout: join("the end of standard output", out),
        stderr: join("the end of standard error", err),
    }
}

/// Runs a command to its end, which must come within the limit.
pub fn run(command: &mut Command) -> Output {
    finish(
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .start(),
    )
}

/// Returns the numbers of context switches of a process's threads whose names begin with `name`.
/// `None` if one of them does not sleep.
fn switches_of_sleepers(pid: u32, name: &str) -> Option<Vec<u64>> {
    let mut all = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let read = |name| std::fs::read_to_string(thread.as_ref().unwrap().path().join(name));
        // The system call is read first, because a thread that still runs can already have the
        // status of one that sleeps.
        let call = read("syscall").unwrap_or_default();
        // A thread that ends between the reads did not sleep.
        let status = read("status").ok()?;
        let field = |key: &str| {
            let mut lines = status.lines();
            lines.find_map(|line| line.strip_prefix(key)).unwrap()
        };
        if !field("Name:\t").starts_with(name) {
            continue;
        }
        if call.starts_with("running") || !field("State:\t").starts_with('S') {
            return None;
        }
        let count = |key| field(key).trim().parse::<u64>().unwrap();
        all.push(count("voluntary_ctxt_switches:"));
        all.push(count("nonvoluntary_ctxt_switches:"));
    }
    Some(all)
}

/// Returns whether all threads of a process whose names begin with `name` sleep at the same time.
/// Then each has done everything that needs neither input nor time.
pub fn is_asleep(pid: u32, name: &str) -> bool {
    // If two looks find all threads asleep with equal numbers of switches, no thread ran between
    // them.
    let first = switches_of_sleepers(pid, name);
    first.is_some() && first == switches_of_sleepers(pid, name)
}

/// Waits until all threads of a process sleep, as [`is_asleep`] finds out.
pub fn wait_until_asleep(pid: u32, name: &str) {
    wait_until("all threads sleep", || is_asleep(pid, name));
}

/// Waits until no thread of a process has woken for longer than the back-off sleeps of a channel's
/// end take.
pub fn wait_until_fast_asleep(pid: u32) {
    wait_until("it is not woken by the clock", || {
        let before = switches_of_sleepers(pid, "");
        std::thread::sleep(Duration::from_millis(30));
        before.is_some() && before == switches_of_sleepers(pid, "")
    });
}

/// Attempts something up to ten times and requires one success. A busy machine can be too slow now
/// and then, but a fault shows in each attempt.
pub fn once_of_some(what: &str, attempt: impl FnMut() -> bool) {
    let succeeds = std::iter::repeat_with(attempt).take(10).any(|done| done);
    assert!(succeeds, "not once of ten times: {what}");
}
