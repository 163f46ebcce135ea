// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The part of a program that runs before Rust's runtime.
//!
//! The runtime opens /dev/null in place of each standard descriptor that is closed. A later look
//! cannot tell that file from one that the user has chosen, and bytes for it would be lost without
//! an error. A program that handles a signal can no longer tell that it was started with the signal
//! ignored. So this part looks first.
#![expect(
    unsafe_code,
    reason = "runs before the runtime, looks at signals, sets the action of one, removes a variable"
)]

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};

use libc::c_int;

/// A bit for each standard descriptor that was closed when the program started.
static CLOSED: AtomicU8 = AtomicU8::new(0);

/// A bit for each of [`SIGNALS`] that was ignored when the program started.
static IGNORED: AtomicU8 = AtomicU8::new(0);

/// Signals from a terminal. A shell without job control starts a program in the background with
/// some of them ignored, so that Ctrl-C is for the program in the foreground.
const SIGNALS: [c_int; 3] = [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP];

/// The variable for output without colors.
const NO_COLOR: &CStr = c"NO_COLOR";

/// The loader of programs calls the functions of this section, before the runtime and `main`.
// SAFETY: the section has pointers to functions of this type (`elf(5)`, `.init_array`). The C
// libraries pass three arguments, which a function of the C calling convention can ignore.
#[used]
#[unsafe(link_section = ".init_array")]
static EARLY: extern "C" fn() = look;

extern "C" fn look() {
    for fd in 0..3 {
        // SAFETY: the call takes no memory, and changes nothing.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1 {
            CLOSED.fetch_or(1 << fd, Ordering::Relaxed);
        }
    }
    for (bit, signal) in SIGNALS.into_iter().enumerate() {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: without a new action the call changes nothing, and writes the present one.
        let looked = unsafe { libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) };
        // SAFETY: zeros are a valid value of this structure of numbers and an optional function.
        let action = unsafe { action.assume_init() };
        if looked == 0 && action.sa_sigaction == libc::SIG_IGN {
            IGNORED.fetch_or(1 << bit, Ordering::Relaxed);
        }
    }
    // An empty value counts as none (https://no-color.org), but not for the crate that draws the
    // progress of a stream.
    // SAFETY: the name is a C string, and no other thread uses the environment yet. The value is a
    // C string as well, and is not used after its removal.
    unsafe {
        let value = libc::getenv(NO_COLOR.as_ptr());
        if !value.is_null() && *value == 0 {
            libc::unsetenv(NO_COLOR.as_ptr());
        }
    }
    // A file that becomes too large for `ulimit -f` is then an error of write(2), which a program
    // can describe, and no signal that kills it.
    // SAFETY: the action runs no code of this program.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Returns whether a standard descriptor was closed when the program started: 0 is the input, 1 the
/// output.
pub(crate) fn was_closed(fd: u8) -> bool {
    CLOSED.load(Ordering::Relaxed) >> fd & 1 == 1
}

/// Returns whether SIGINT, SIGQUIT or SIGHUP was ignored when the program started. A program that
/// handles such a signal all the same would end by a Ctrl-C that is for another one.
pub fn was_ignored(signal: c_int) -> bool {
    let bit = SIGNALS.iter().position(|known| *known == signal);
    bit.is_some_and(|bit| IGNORED.load(Ordering::Relaxed) >> bit & 1 == 1)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    /// The crate `console` looks only whether the variable is there.
    #[test]
    fn empty_no_color_counts_as_unset() {
        const EXPECTED: &str = "BARLINK_TEST_NO_COLOR";
        if let Ok(expected) = std::env::var(EXPECTED) {
            assert_eq!(std::env::var("NO_COLOR").unwrap_or("none".into()), expected);
            return;
        }
        for (value, expected) in [("", "none"), ("1", "1")] {
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", "early::tests::empty_no_color_counts_as_unset"]);
            child.env("NO_COLOR", value).env(EXPECTED, expected);
            assert!(child.status().unwrap().success());
        }
    }
}
