// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Notices on standard error: lines for a person about a command that goes on. With `--json` there
//! are none, because a program reads standard error then. Errors are no notices.

use std::collections::BTreeSet;
use std::io::{IsTerminal, Write, stderr};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// Whether the command prints JSON, and no notices.
static SILENT: AtomicBool = AtomicBool::new(false);

/// Switches notices off, for a command with `--json`.
pub(crate) fn silence() {
    SILENT.store(true, Ordering::Relaxed);
}

/// Returns whether notices are off, because the command prints JSON.
pub fn is_silent() -> bool {
    SILENT.load(Ordering::Relaxed)
}

/// Prints a notice, as one line on standard error, unless the command prints JSON.
pub fn tell(text: &str) {
    if !is_silent() {
        // `eprintln` would panic where standard error is closed.
        let _ = writeln!(stderr(), "{text}");
    }
}

/// Says on standard error, once, that the broker has ended.
pub(crate) fn broker_ended() {
    say("the broker has ended: attached programs go on, and no further host app can attach");
}

/// Says on standard error, once, that the newest record has no content.
pub(crate) fn newest_is_mark() {
    say(
        "the newest record is a mark of a stream's begin or end: waiting for a record of data (`send --raw` sends one \
         without marks)",
    );
}

/// Says a text on standard error, once.
fn say(text: &'static str) {
    static SAID: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said.insert(text) {
        // A progress bar may stand in this line.
        let clear = if stderr().is_terminal() {
            "\r\x1b[2K"
        } else {
            ""
        };
        tell(&format!("{clear}{text}"));
    }
}

/// The finding at the socket of a broker after a connection to it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// A broker answers there, perhaps by a refusal. One that lives can have disconnected this
    /// program.
    Broker,
    /// No process listens there.
    Nothing,
    /// A fault that does not tell whether a broker is there.
    Unknown,
}

/// Says so when the connection to the broker ends. `look` then tells what is at the same socket. A
/// thread waits for the end, and does so without a timer. A broker's successor keeps the
/// connection. Without a thread, or with `--json`, there is no message.
pub fn watch_broker(connection: &impl AsFd, look: impl FnOnce() -> Found + Send + 'static) {
    if is_silent() {
        return;
    }
    let Ok(connection) = connection.as_fd().try_clone_to_owned() else {
        return;
    };
    let thread = std::thread::Builder::new().name("broker".to_owned());
    let _ = thread.spawn(move || {
        loop {
            let mut files = [PollFd::new(&connection, PollFlags::RDHUP)];
            match poll(&mut files, None) {
                Err(Errno::INTR) => (),
                Err(_) => return,
                Ok(_) => break,
            }
        }
        match look() {
            Found::Nothing => broker_ended(),
            Found::Broker => say(
                "the broker has closed the connection: this program goes on; see the broker's log, or attach anew if it was restarted",
            ),
            Found::Unknown => {
                say("the connection to the broker has ended, and no broker answers at its socket");
            }
        }
    });
}
