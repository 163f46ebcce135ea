// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Error codes, the text of the last error of each thread, and the border that no panic crosses.

use std::cell::RefCell;
use std::error::Error as _;
use std::ffi::{CStr, CString, c_char};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use barlink::{Error, ErrorKind};

/// The result of a call: 0, or the class of its error. `barlink_error_text` has the details.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The call did what it is for.
    Ok = 0,
    /// There is no broker, device or channel of that name.
    NotFound = 1,
    /// The process lacks a permission for the call.
    PermissionDenied = 2,
    /// Another process uses the end of the channel or the device, which may be free later.
    InUse = 3,
    /// The broker or the driver is of another release.
    Incompatible = 4,
    /// An argument is not valid, or the handle is closed, of another type, or busy with a
    /// reservation or a stream.
    InvalidInput = 5,
    /// The broker closed the connection, or does not answer.
    Disconnected = 6,
    /// The device was unplugged, its driver was unbound, or it has lost its region.
    Gone = 7,
    /// The channel has no room, and had none until the timeout.
    Full = 8,
    /// The record is larger than the channel carries, or than the buffer.
    TooLarge = 9,
    /// The other end wrote invalid words to the channel.
    Corrupt = 10,
    /// The channel was reset while the end was in use. The program can claim the end anew.
    Reset = 11,
    /// Parts of a stream are missing, or the next record is not of the stream.
    Incomplete = 12,
    /// No record came until the timeout.
    TimedOut = 13,
    /// The process that this one was forked from made the handle. This process makes its own.
    Inherited = 14,
    /// The channel drops records that find no room, and dropped this one.
    Dropped = 15,
    /// The stream has ended.
    End = 16,
    /// A system call failed, or something else.
    Other = 17,
}

/// An error for the caller.
#[derive(Debug)]
pub(crate) struct Failure {
    code: Code,
    text: String,
}

impl Failure {
    pub(crate) fn new(code: Code, text: impl Into<String>) -> Self {
        let text = text.into();
        Failure { code, text }
    }

    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Failure::new(Code::InvalidInput, text)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match error.kind() {
            ErrorKind::NotFound => Code::NotFound,
            ErrorKind::PermissionDenied => Code::PermissionDenied,
            ErrorKind::InUse => Code::InUse,
            ErrorKind::Incompatible => Code::Incompatible,
            ErrorKind::InvalidInput => Code::InvalidInput,
            ErrorKind::Disconnected => Code::Disconnected,
            ErrorKind::Gone => Code::Gone,
            ErrorKind::Full => Code::Full,
            ErrorKind::TooLarge => Code::TooLarge,
            ErrorKind::Corrupt => Code::Corrupt,
            ErrorKind::Reset => Code::Reset,
            ErrorKind::Incomplete => Code::Incomplete,
            ErrorKind::TimedOut => Code::TimedOut,
            ErrorKind::Inherited => Code::Inherited,
            _ => Code::Other,
        };
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            // Some errors show their cause already.
            if !text.ends_with(&cause_text) {
                text.push_str(": ");
                text.push_str(&cause_text);
            }
            source = cause.source();
        }
        Failure { code, text }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.downcast::<Error>() {
            Ok(error) => error.into(),
            Err(error) => {
                let code = match error.kind() {
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => Code::Incomplete,
                    _ => Code::Other,
                };
                Failure::new(code, error.to_string())
            }
        }
    }
}

thread_local! {
    static TEXT: RefCell<CString> = RefCell::default();
}

/// Calls a function of the library. No panic leaves it.
pub(crate) fn guard(call: impl FnOnce() -> Result<(), Failure>) -> Code {
    let done = catch_unwind(AssertUnwindSafe(call));
    match done {
        Ok(Ok(())) => Code::Ok,
        Ok(Err(failure)) => report(failure),
        Err(_) => report(Failure::new(
            Code::Other,
            "a fault in barlink itself, which standard error describes",
        )),
    }
}

#[cold]
fn report(failure: Failure) -> Code {
    let mut text = failure.text.into_bytes();
    text.retain(|byte| *byte != 0);
    // A thread that ends has no text any more, and the code is enough.
    let _ = TEXT.try_with(|place| place.replace(CString::new(text).unwrap_or_default()));
    failure.code
}

/// Returns the text of this thread's last error: one line of UTF-8 that says what failed, on what,
/// and what to do. It is empty before the first error, and valid until the next call of the thread
/// that fails.
#[unsafe(no_mangle)]
pub extern "C" fn barlink_error_text() -> *const c_char {
    TEXT.try_with(|text| text.borrow().as_ptr())
        .unwrap_or(c"".as_ptr())
}

/// Returns the version of the library, as "1.2.3". It lives as long as the program.
#[unsafe(no_mangle)]
pub extern "C" fn barlink_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => c"",
        };
    VERSION.as_ptr()
}
