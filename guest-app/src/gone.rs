// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The end of a program whose device goes away. A call fails, or an access to the device's memory
//! is SIGBUS. Both look the same to the user.
#![expect(
    unsafe_code,
    reason = "registers a signal handler, which may do few things"
)]

use std::io;

use barlink::EventError;
use signal_hook::consts::SIGBUS;
use signal_hook::low_level::{exit, register};

/// The exit code of a program without a device.
pub const CODE: u8 = 3;

/// Makes SIGBUS end the program with the text and the code of [`EventError::Gone`].
pub fn handle() -> io::Result<()> {
    let words = format!("barlink-guest: {}\n", EventError::Gone);
    let end = move || {
        // A failed write leaves the exit code.
        let _ = rustix::io::write(rustix::stdio::stderr(), words.as_bytes());
        exit(CODE.into());
    };
    // SAFETY: the handler calls write(2) and _exit(2), which are async-signal-safe
    // (signal-safety(7)), and reads bytes that do not change.
    unsafe { register(SIGBUS, end) }.map(drop)
}
