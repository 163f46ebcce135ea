// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of arguments: texts, memory, and times.

use std::ffi::{CStr, OsStr, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::slice;
use std::time::Duration;

use crate::failure::Failure;

/// Reads a text.
///
/// # Safety
///
/// `text` is NULL or ends with a 0, and does not change during `'a`.
pub(crate) unsafe fn bytes<'a>(text: *const c_char, what: &str) -> Result<&'a OsStr, Failure> {
    if text.is_null() {
        return Err(Failure::invalid(format!("{what} is NULL")));
    }
    // SAFETY: the caller's.
    let text = unsafe { CStr::from_ptr(text) };
    Ok(OsStr::from_bytes(text.to_bytes()))
}

/// Reads a text of UTF-8, such as the name of a channel.
///
/// # Safety
///
/// That of [`bytes`].
pub(crate) unsafe fn text<'a>(text: *const c_char, what: &str) -> Result<&'a str, Failure> {
    // SAFETY: the caller's.
    let text = unsafe { bytes(text, what) }?;
    let error = || Failure::invalid(format!("{what} is not UTF-8: {text:?}"));
    text.to_str().ok_or_else(error)
}

/// Returns the memory at a pointer.
///
/// # Safety
///
/// `data` is NULL, or has `length` bytes that do not change during `'a`.
pub(crate) unsafe fn memory<'a>(data: *const c_void, length: usize) -> Result<&'a [u8], Failure> {
    check(data, length)?;
    if length == 0 {
        return Ok(&[]);
    }
    // SAFETY: the caller's; neither NULL nor longer than memory can be.
    Ok(unsafe { slice::from_raw_parts(data.cast(), length) })
}

/// Returns the memory at a pointer, to be written.
///
/// # Safety
///
/// `data` is NULL, or has `length` bytes that nothing else uses during `'a`.
pub(crate) unsafe fn memory_mut<'a>(
    data: *mut c_void,
    length: usize,
) -> Result<&'a mut [u8], Failure> {
    check(data, length)?;
    if length == 0 {
        return Ok(&mut []);
    }
    // SAFETY: the caller's; neither NULL nor longer than memory can be.
    Ok(unsafe { slice::from_raw_parts_mut(data.cast(), length) })
}

fn check(data: *const c_void, length: usize) -> Result<(), Failure> {
    if data.is_null() && length > 0 {
        return Err(Failure::invalid(format!("{length} bytes at NULL")));
    }
    if isize::try_from(length).is_err() {
        return Err(Failure::invalid(format!("no memory has {length} bytes")));
    }
    Ok(())
}

/// Returns the place of a result.
///
/// # Safety
///
/// `place` is NULL, or has room for a value, and nothing else uses it during `'a`.
pub(crate) unsafe fn place<'a, T>(place: *mut T) -> Result<&'a mut T, Failure> {
    if !place.is_null() && !place.is_aligned() {
        return Err(Failure::invalid("the place of the result is not aligned"));
    }
    // SAFETY: the caller's; aligned.
    let place = unsafe { place.as_mut() };
    place.ok_or_else(|| Failure::invalid("the place of the result is NULL"))
}

/// Reads a timeout in nanoseconds: `None` for no limit.
pub(crate) fn timeout(nanoseconds: i64) -> Option<Duration> {
    u64::try_from(nanoseconds).ok().map(Duration::from_nanos)
}
