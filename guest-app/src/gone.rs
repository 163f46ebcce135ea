// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What ends a program whose device goes: a call that fails, or the memory, to touch which is then SIGBUS. To its user
//! both are to be the same.
#![expect(
    unsafe_code,
    reason = "registers a signal handler, which may do few things"
)]

use std::io;

use barlink::EventError;
use signal_hook::consts::SIGBUS;
use signal_hook::low_level::{exit, register};

/// The exit code of a program whose device is not there.
pub const CODE: u8 = 3;

/// From now on, SIGBUS ends the program with the words and the code of [`EventError::Gone`].
pub fn handle() -> io::Result<()> {
    let words = format!("barlink-guest: {}\n", EventError::Gone);
    let end = move || {
        // A failed write leaves the exit code.
        let _ = rustix::io::write(rustix::stdio::stderr(), words.as_bytes());
        exit(CODE.into());
    };
    // SAFETY: the handler calls write(2) and _exit(2), which are async-signal-safe (signal-safety(7)), and reads bytes that
    // do not change.
    unsafe { register(SIGBUS, end) }.map(drop)
}
