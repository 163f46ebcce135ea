// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest's serial console: a log file, and on request a terminal.

use std::fs;
use std::io::{Read, Write, stdin, stdout};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// The log's name in the VM's folder. QEMU writes it.
pub(super) const LOG: &str = "console.log";

/// Ctrl-], which ends a connection to the console.
const LEAVE: u8 = 0x1d;

/// How many lines of a log a failure shows.
const SHOWN_LINES: usize = 30;

/// How often a connected terminal looks whether the VM has ended.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};

/// The console of one VM.
#[derive(Debug)]
pub(super) struct Console {
    log: PathBuf,
    stream: Option<UnixStream>,
    attached: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

impl Console {
    /// The console that logs to `folder`; `stream` leads to it if it is interactive.
    pub(super) fn new(folder: &Path, stream: Option<UnixStream>) -> Result<Self> {
        let console = Self {
            log: folder.join(LOG),
            stream,
            attached: Arc::default(),
            ended: Arc::default(),
        };
        if let Some(stream) = &console.stream {
            let stream = stream.try_clone()?;
            let (attached, ended) = (Arc::clone(&console.attached), Arc::clone(&console.ended));
            // Always read, or the guest would stop at its next line once the socket is full.
            thread::spawn(move || {
                forward(stream, &attached);
                ended.store(true, Ordering::Release);
            });
        }
        Ok(console)
    }

    /// What has been printed so far.
    pub(super) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Connects standard input and output until the user presses Ctrl-], or either side ends.
    pub(super) fn attach_terminal(&self) -> Result<()> {
        let mut stream = self
            .stream
            .as_ref()
            .context("this VM's console is not interactive")?;
        let _raw = RawTerminal::enter()?;
        self.attached.store(true, Ordering::Release);
        // The shell shows its prompt again.
        stream.write_all(b"\n")?;
        let mut bytes = [0; 4096];
        while !self.ended.load(Ordering::Acquire) {
            let input = stdin();
            if poll(&mut [PollFd::new(&input, PollFlags::IN)], Some(&LOOK))? == 0 {
                continue;
            }
            // Not by the standard library, whose buffer `poll` does not see.
            let length = rustix::io::read(input.as_fd(), &mut bytes)?;
            let typed = bytes.get(..length).unwrap_or_default();
            let left = typed.iter().position(|byte| *byte == LEAVE);
            stream.write_all(typed.get(..left.unwrap_or(length)).unwrap_or_default())?;
            if left.is_some() || length == 0 {
                break;
            }
        }
        self.attached.store(false, Ordering::Release);
        Ok(())
    }
}

/// Reads `stream` to its end; what comes while `attached` goes to standard output.
fn forward(mut stream: UnixStream, attached: &AtomicBool) {
    let mut bytes = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut bytes) {
        if attached.load(Ordering::Acquire) {
            let mut terminal = stdout();
            // Without a terminal there is nobody to tell.
            let _ = terminal
                .write_all(&bytes[..length])
                .and_then(|()| terminal.flush());
        }
    }
}

/// Standard input in raw mode, if it is a terminal; as it was when dropped.
struct RawTerminal(Option<Termios>);

impl RawTerminal {
    fn enter() -> Result<Self> {
        let Ok(before) = tcgetattr(stdin()) else {
            return Ok(Self(None));
        };
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw)
            .context("the terminal cannot be switched to raw mode")?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(stdin(), OptionalActions::Now, before);
        }
    }
}

/// The ends of the logs in a VM's folder, for a failure's message.
pub(super) fn tail(folder: &Path) -> String {
    let mut text = String::new();
    for (name, what) in [("qemu.log", "QEMU says"), (LOG, "the console ends")] {
        let log = fs::read(folder.join(name)).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        if !lines.is_empty() {
            let shown = &lines[lines.len().saturating_sub(SHOWN_LINES)..];
            text += &format!("{what}:\n  {}\n", shown.join("\n  "));
        }
    }
    if text.is_empty() {
        "neither QEMU nor the guest said anything".to_owned()
    } else {
        text
    }
}
