// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The end of a program whose device is gone. Either a call fails, or an access to the device's
//! memory raises SIGBUS. The user sees the same message and exit code in both cases.
#![expect(unsafe_code, reason = "registers a signal handler")]

use std::io;

use barlink::EventError;
use signal_hook::consts::SIGBUS;
use signal_hook::low_level::{exit, register};

/// Exit code of a program whose device does not exist or is gone.
pub const CODE: u8 = 3;

/// Makes SIGBUS end the program with the text and the code of [`EventError::Gone`].
pub fn handle() -> io::Result<()> {
    let words = format!("barlink-guest: {}\n", EventError::Gone);
    let end = move || {
        // The exit code does not depend on this write.
        let _ = rustix::io::write(rustix::stdio::stderr(), words.as_bytes());
        exit(CODE.into());
    };
    // SAFETY: the handler calls write(2) and _exit(2), which are async-signal-safe
    // (signal-safety(7)), and reads bytes that do not change.
    unsafe { register(SIGBUS, end) }.map(drop)
}
