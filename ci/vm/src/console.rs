// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest's serial console: a log file, and a terminal on request.

use std::fs;
use std::io::{Read, Write, stdout};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGTERM};
use signal_hook::flag;

/// Name of the console's log in the VM's folder. QEMU writes it.
pub(crate) const LOG: &str = "console.log";

/// Name of the file in the VM's folder with the output of QEMU itself.
pub(crate) const ERRORS: &str = "qemu.log";

/// The byte of Ctrl-], which disconnects the terminal from the console.
const LEAVE: u8 = 0x1d;

/// Number of lines of a log that a failure shows.
const SHOWN_LINES: usize = 30;

/// Time between two checks of a connected terminal whether the VM has ended.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};

/// The console of one VM.
#[derive(Debug)]
pub(crate) struct Console {
    log: PathBuf,
    stream: Option<UnixStream>,
    attached: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

impl Console {
    /// Makes the console that logs to `folder`. `stream` is the socket of an interactive console.
    pub(crate) fn new(folder: &Path, stream: Option<UnixStream>) -> Result<Self> {
        let console = Self {
            log: folder.join(LOG),
            stream,
            attached: Arc::default(),
            ended: Arc::default(),
        };
        if let Some(stream) = &console.stream {
            let stream = stream.try_clone()?;
            let (attached, ended) = (Arc::clone(&console.attached), Arc::clone(&console.ended));
            // Always reads, because the guest would block at its next line once the socket is full.
            thread::spawn(move || {
                forward(stream, &attached);
                ended.store(true, Ordering::Release);
            });
        }
        Ok(console)
    }

    /// Reads everything that the console has printed so far.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Connects `input` and standard output to the console until the user presses Ctrl-], an end
    /// closes, or a signal reports that the terminal is gone. The signals are caught so that the
    /// caller can clean up.
    pub(crate) fn attach_terminal(&self, input: BorrowedFd) -> Result<()> {
        let mut stream = self
            .stream
            .as_ref()
            .context("this VM's console is not interactive")?;
        for signal in [SIGHUP, SIGTERM] {
            flag::register(signal, Arc::clone(&self.ended)).context("signals cannot be caught")?;
        }
        let _raw = RawTerminal::enter(input)?;
        self.attached.store(true, Ordering::Release);
        // Makes the shell print its prompt again.
        stream.write_all(b"\n")?;
        let mut bytes = [0; 4096];
        while !self.ended.load(Ordering::Acquire) {
            match poll(&mut [PollFd::new(&input, PollFlags::IN)], Some(&LOOK)) {
                Ok(0) | Err(Errno::INTR) => continue,
                ready => ready?,
            };
            // Does not read by the standard library, because `poll` does not see data in its
            // buffer.
            let length = rustix::io::read(input, &mut bytes)?;
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

/// Reads `stream` to its end, and copies it to standard output while `attached`.
fn forward(mut stream: UnixStream, attached: &AtomicBool) {
    let mut bytes = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut bytes) {
        if attached.load(Ordering::Acquire) {
            let mut terminal = stdout();
            // Ignores errors, because there is nowhere to report them without a terminal.
            let _ = terminal
                .write_all(&bytes[..length])
                .and_then(|()| terminal.flush());
        }
    }
}

/// An input in raw mode, if it is a terminal. Dropping this restores the old mode.
struct RawTerminal<'a> {
    input: BorrowedFd<'a>,
    before: Option<Termios>,
}

impl<'a> RawTerminal<'a> {
    fn enter(input: BorrowedFd<'a>) -> Result<Self> {
        let before = tcgetattr(input).ok();
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.make_raw();
            tcsetattr(input, OptionalActions::Now, &raw)
                .context("the terminal cannot be switched to raw mode")?;
        }
        Ok(Self { input, before })
    }
}

impl Drop for RawTerminal<'_> {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(self.input, OptionalActions::Now, before);
        }
    }
}

/// Returns the ends of the logs in a VM's folder, for an error message.
pub(crate) fn tail(folder: &Path) -> String {
    let mut text = String::new();
    for (name, what) in [(ERRORS, "QEMU says"), (LOG, "the console ends")] {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    use rustix::process::{Signal, getpid, kill_process};

    #[test]
    fn hangup_ends_terminal_but_not_process() {
        let folder = tempfile::tempdir().unwrap();
        let (ours, _qemus) = UnixStream::pair().unwrap();
        let console = Console::new(folder.path(), Some(ours)).unwrap();
        // The test never writes to this input.
        let (input, _keyboard) = std::io::pipe().unwrap();
        thread::scope(|scope| {
            let attached = scope.spawn(|| console.attach_terminal(input.as_fd()));
            while !console.attached.load(Ordering::Acquire) {
                assert!(!attached.is_finished(), "it is not attached");
                thread::yield_now();
            }
            kill_process(getpid(), Signal::HUP).unwrap();
            attached.join().unwrap().unwrap();
        });
    }
}
