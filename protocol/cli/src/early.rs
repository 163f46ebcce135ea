// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The part of a program that runs before Rust's runtime.
//!
//! The runtime opens /dev/null in place of each standard descriptor that is closed. A later look
//! cannot tell that file from one that the user has chosen, and bytes for it would be lost without
//! an error. So this part looks first.
#![expect(
    unsafe_code,
    reason = "runs before the runtime, and sets a signal's action"
)]

use std::sync::atomic::{AtomicU8, Ordering};

/// A bit for each standard descriptor that was closed when the program started.
static CLOSED: AtomicU8 = AtomicU8::new(0);

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
