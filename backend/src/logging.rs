// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program's log. The broker's log never blocks a thread that logs: a terminal that is stopped
//! by Ctrl-S, or a pipe that no process reads, must not stop the broker.

use std::io::{self, IsTerminal, Write, stderr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use barlink_broker::broker::confine_early_thread;
use barlink_broker::environment::{text, variable};
use barlink_cli::notice::is_silent;
use env_logger::{Builder, Target, WriteStyle};
use log::{Level, LevelFilter, error, warn};
use nix::sys::signal::SigSet;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::fstat;
use rustix::io::{Errno, retry_on_intr};

/// Most lines that wait to be written. Further lines are counted and left out.
const QUEUE: usize = 1024;
/// Longest time that an ending program waits for unwritten log lines.
const FLUSH: Duration = Duration::from_secs(1);

/// Starts the log of a command that is not the broker: lines go to standard error at once. With
/// `--json` they are errors, unless the environment asks for more.
pub fn start() {
    let level = match is_silent() {
        true => LevelFilter::Error,
        false => LevelFilter::Warn,
    };
    builder(level, WriteStyle::Auto).init();
    warn_of_filter();
}

/// Starts the log of the broker: a thread writes the lines to standard error, and a panic is a line
/// of the log.
pub fn start_queued() -> io::Result<LineQueue> {
    let (queue, entries) = sync_channel(QUEUE);
    let queue = LineQueue {
        entries: queue,
        left_out: Arc::default(),
    };
    let left_out = Arc::clone(&queue.left_out);
    let (confined, is_confined) = sync_channel(0);
    thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || {
            // Signals are for other threads. A background job whose thread does not block SIGTTOU
            // would be stopped by a write to a terminal with `tostop` (`termios(3)`).
            let _ = SigSet::all().thread_block();
            confine_early_thread();
            drop::<SyncSender<()>>(confined);
            write_entries(&entries, &left_out, write_some);
        })?;
    // The thread sends nothing. It drops its end once it is confined, which ends this wait.
    let _ = is_confined.recv();
    let mut builder = builder(LevelFilter::Info, style());
    if is_journal() {
        // The journal has its own time stamps, and reads the level from the prefix
        // (`sd-daemon(3)`).
        builder.format(|line, record| {
            writeln!(line, "<{}>{}", priority(record.level()), record.args())
        });
    }
    builder.target(Target::Pipe(Box::new(queue.clone()))).init();
    warn_of_filter();
    let panics = queue.clone();
    std::panic::set_hook(Box::new(move |panic| {
        error!("{panic}");
        // The process ends with this thread. Other threads must not wait.
        if thread::current().name() == Some("main") {
            panics.flush();
        }
    }));
    Ok(queue)
}

/// Returns the style of lines for standard error. `env_logger` examines standard error only if it
/// writes to it itself.
fn style() -> WriteStyle {
    let is_dumb = variable("TERM").is_some_and(|terminal| terminal == "dumb");
    let is_plain = variable("NO_COLOR").is_some() || is_dumb;
    match stderr().is_terminal() && !is_plain {
        true => WriteStyle::Always,
        false => WriteStyle::Never,
    }
}

/// Returns a builder with this level and style, unless the environment has others.
fn builder(level: LevelFilter, style: WriteStyle) -> Builder {
    let mut builder = Builder::new();
    builder.write_style(style);
    // These crates log hostile input without a rate limit, so they are silent unless RUST_LOG names
    // them.
    for chatty in ["vhost", "virtio_queue"] {
        builder.filter_module(chatty, LevelFilter::Off);
    }
    match text("RUST_LOG").filter(|filters| is_filter(filters)) {
        Some(filters) => builder.parse_filters(&filters),
        None => builder.filter_level(level),
    };
    if let Some(style) = text("RUST_LOG_STYLE") {
        builder.parse_write_style(&style);
    }
    builder
}

/// Returns whether each part of a filter is a level, a level of a module, or a module of the crates
/// that log. `env_logger` takes any other word for the name of a module, and leaves out the lines
/// of all others.
fn is_filter(filters: &str) -> bool {
    let is_level = |text: &str| text.parse::<LevelFilter>().is_ok();
    let is_module = |name: &str| {
        let known = ["barlink", "vfio", "vhost", "virtio"];
        known.iter().any(|start| name.starts_with(start))
    };
    let parts = filters.split('/').next().unwrap_or_default().split(',');
    let mut parts = parts.map(str::trim).filter(|part| !part.is_empty());
    let is_part = |part: &str| match part.split_once('=') {
        Some((_, level)) => is_level(level.trim()),
        None => is_level(part) || is_module(part),
    };
    // Without any part, `env_logger` shows errors alone.
    parts.next().is_some_and(is_part) && parts.all(is_part)
}

/// Warns that RUST_LOG has no effect, because it is no filter.
fn warn_of_filter() {
    if let Some(filters) = text("RUST_LOG").filter(|filters| !is_filter(filters)) {
        warn!(
            "RUST_LOG has no effect, because `{}` is no filter: use off, error, warn, info, debug or trace, or MODULE=LEVEL",
            filters.escape_default()
        );
    }
}

/// Returns whether standard error is the journal: `JOURNAL_STREAM` then has its device and inode
/// (`systemd.exec(5)`).
fn is_journal() -> bool {
    let Some(stream) = text("JOURNAL_STREAM") else {
        return false;
    };
    fstat(stderr()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Returns the priority of a level, as in `syslog(3)`.
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// The lines that wait to be written.
#[derive(Clone)]
pub struct LineQueue {
    entries: SyncSender<Entry>,
    left_out: Arc<AtomicU64>,
}

enum Entry {
    Line(Vec<u8>),
    /// All earlier entries are written when the sender is dropped.
    Flush(#[expect(dead_code, reason = "its drop is the answer")] SyncSender<()>),
}

impl LineQueue {
    /// Waits until all lines are written, for at most a second.
    pub fn flush(&self) {
        let (done, written) = sync_channel(0);
        // A full queue cannot be written: standard error takes no bytes.
        if self.entries.try_send(Entry::Flush(done)).is_ok() {
            let _ = written.recv_timeout(FLUSH);
        }
    }
}

impl Write for LineQueue {
    /// Adds one line: `env_logger` writes each with one call.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.entries.try_send(Entry::Line(line.to_vec())).is_err() {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_entries(
    entries: &Receiver<Entry>,
    left_out: &AtomicU64,
    mut write: impl FnMut(&[u8]) -> Result<usize, Errno>,
) {
    // True if the last line was written in part only.
    let mut is_torn = false;
    let mut write_line = |mut line: Vec<u8>| {
        if is_torn {
            line.insert(0, b'\n');
        }
        let written = write_all(&line, &mut write);
        is_torn = match written {
            Ok(()) => false,
            Err(0) => is_torn,
            Err(written) => line[written - 1] != b'\n',
        };
        written.is_ok()
    };
    for entry in entries {
        if let Entry::Line(line) = entry {
            if !write_line(line) {
                left_out.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let count = left_out.swap(0, Ordering::Relaxed);
            if count > 0 {
                let line = format!(
                    "barlink: {count} log lines were left out, because standard error did not take them in time\n"
                );
                if !write_line(line.into()) {
                    left_out.fetch_add(count, Ordering::Relaxed);
                }
            }
        }
    }
}

/// Writes all bytes. The error is the number of bytes that were written before a write failed.
fn write_all(
    bytes: &[u8],
    mut write: impl FnMut(&[u8]) -> Result<usize, Errno>,
) -> Result<(), usize> {
    let mut written = 0;
    while written < bytes.len() {
        match write(&bytes[written..]) {
            Ok(0) | Err(_) => return Err(written),
            Ok(count) => written += count,
        }
    }
    Ok(())
}

/// Writes to standard error once. Waits for it if another process made it non-blocking.
fn write_some(bytes: &[u8]) -> Result<usize, Errno> {
    let stderr = stderr();
    loop {
        match retry_on_intr(|| rustix::io::write(&stderr, bytes)) {
            Err(Errno::AGAIN) => {
                let mut writable = [PollFd::new(&stderr, PollFlags::OUT)];
                retry_on_intr(|| poll(&mut writable, None))?;
            }
            written => return written,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_queue_counts_lines() {
        let (entries, _unread) = sync_channel(QUEUE);
        let left_out = Arc::default();
        let mut queue = LineQueue { entries, left_out };
        for _ in 0..QUEUE + 7 {
            queue.write_all(b"line\n").unwrap();
        }
        assert_eq!(queue.left_out.load(Ordering::Relaxed), 7);
    }

    /// Writes lines to a disk that is full for a while.
    #[test]
    fn failed_writes_count_lines() {
        let (queue, entries) = sync_channel(QUEUE);
        for line in ["one\n", "two\n", "three\n", "four\n", "five\n"] {
            queue.send(Entry::Line(line.into())).unwrap();
        }
        drop(queue);
        let left_out = AtomicU64::new(2);
        let full = Err(Errno::NOSPC);
        let mut results = [Ok(4), full, Ok(1), full, full, Ok(6), full, Ok(100)].into_iter();
        let mut written = Vec::new();
        write_entries(&entries, &left_out, |bytes| {
            let count: usize = results.next().unwrap_or(Ok(bytes.len()))?;
            let count = count.min(bytes.len());
            written.extend_from_slice(&bytes[..count]);
            Ok(count)
        });
        let text = String::from_utf8(written).unwrap();
        let lines: Vec<_> = text.lines().collect();
        // The disk refused the second and the third line, and the first two reports of lines left
        // out.
        assert_eq!(lines[..4], ["one", "t", "four", "five"], "{text}");
        assert!(lines[4].contains(" 4 log lines were left out"), "{text}");
        assert_eq!(lines.len(), 5, "{text}");
        assert_eq!(left_out.load(Ordering::Relaxed), 0);
    }
}
