// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A further reader of a channel, which holds up neither end.

use std::ffi::{c_char, c_int};
use std::os::fd::AsRawFd;
use std::time::Duration;

use barlink::{OwnedRecord, Tap};

use crate::arguments::{place, text, timeout};
use crate::failure::{Code, Failure, guard};
use crate::handles::Handles;
use crate::receiver::{PlainRecord, no_record};
use crate::side::{SideHandle, side};

/// A further reader of a channel, a tap. One thread at a time uses it.
#[derive(Debug)]
pub struct TapHandle {
    _private: [u8; 0],
}

struct Further {
    tap: Tap,
    record: OwnedRecord,
}

static TAPS: Handles<Further> = Handles::new(4, "tap");

/// Makes a tap of a channel, which begins behind the newest record. Stores a handle, which
/// `barlink_tap_close` closes.
///
/// # Safety
///
/// `channel` ends with a 0; `out` has room for a pointer; no thread closes `side` meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_tap_new(
    side: *mut SideHandle,
    channel: *const c_char,
    out: *mut *mut TapHandle,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let out = unsafe { place(out) }?;
        // SAFETY: the caller's.
        let (side, channel) =
            unsafe { (self::side(side)?, text(channel, "the name of the channel")?) };
        let (tap, record) = (side.tap(channel)?, OwnedRecord::default());
        *out = TAPS.insert(Further { tap, record })?;
        Ok(())
    })
}

/// Closes a tap, and frees the record that it copied last.
///
/// # Safety
///
/// No other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_tap_close(tap: *mut TapHandle) -> Code {
    // SAFETY: the caller's.
    guard(|| unsafe { TAPS.remove(tap) }.map(drop))
}

/// Copies the next record. Waits for it up to `timeout` nanoseconds: for ever if it is negative,
/// not at all if it is 0. The result is then `BARLINK_TIMED_OUT`. The bytes are the tap's, and
/// valid until the next call with this tap.
///
/// # Safety
///
/// `record` has room for a record; no other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_tap_next(
    tap: *mut TapHandle,
    timeout: i64,
    record: *mut PlainRecord,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (further, record) = unsafe { (TAPS.get(tap)?, place(record)?) };
        let Further { tap, record: own } = further;
        let limit = self::timeout(timeout);
        loop {
            let found = tap.recv_into(own, limit.unwrap_or(Duration::MAX))?;
            if found {
                *record = PlainRecord::of(own);
                return Ok(());
            }
            if limit.is_some() {
                return Err(no_record(timeout));
            }
        }
    })
}

/// Copies the newest record, also if this tap has copied it before. The result is
/// `BARLINK_TIMED_OUT` if there is none. The bytes are the tap's, and valid until the next call
/// with this tap.
///
/// # Safety
///
/// `record` has room for a record; no other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_tap_latest(tap: *mut TapHandle, record: *mut PlainRecord) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (further, record) = unsafe { (TAPS.get(tap)?, place(record)?) };
        if !further.tap.latest_into(&mut further.record)? {
            return Err(Failure::new(Code::TimedOut, "there is no record now"));
        }
        *record = PlainRecord::of(&further.record);
        Ok(())
    })
}

/// Stores the numbers of records that the tap missed, and that the sender dropped, since it began.
///
/// # Safety
///
/// `missed` and `dropped` have room for a number each; no other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_tap_missed(
    tap: *mut TapHandle,
    missed: *mut u64,
    dropped: *mut u64,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (further, missed, dropped) =
            unsafe { (TAPS.get(tap)?, place(missed)?, place(dropped)?) };
        (*missed, *dropped) = (further.tap.missed(), further.tap.dropped());
        Ok(())
    })
}

/// Stores a descriptor for `poll`: readable when it is time to look for a record. It belongs to the
/// handle: do not close it.
///
/// # Safety
///
/// `descriptor` has room for a number; no other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_tap_descriptor(
    tap: *mut TapHandle,
    descriptor: *mut c_int,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (further, descriptor) = unsafe { (TAPS.get(tap)?, place(descriptor)?) };
        *descriptor = further.tap.as_raw_fd();
        Ok(())
    })
}
