// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The receiving end of a channel.

use std::ffi::{c_char, c_int, c_void};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::ptr;

use barlink::{OwnedRecord, Receiver, Record};

use crate::arguments::{memory_mut, place, text, timeout};
use crate::failure::{Code, Failure, guard};
use crate::handles::Handles;
use crate::side::{SideHandle, side};

/// The receiving end of a channel. One thread at a time uses it.
#[derive(Debug)]
pub struct ReceiverHandle {
    _private: [u8; 0],
}

/// A record.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct PlainRecord {
    /// The bytes. How long they are valid is said by the function that found the record.
    pub data: *const c_void,
    /// Number of bytes.
    pub length: usize,
    /// Number of the record. A gap stands for records that were dropped.
    pub sequence: u64,
    /// Time of the record, in nanoseconds of `clock`.
    pub time: u64,
    /// Number of records that were dropped, or that a tap missed, just before this one. A tap
    /// counts them in `barlink_tap_missed` alone.
    pub missed: u64,
    /// The kind: `BARLINK_DATA`, or from `BARLINK_USER` on one of the sender's own.
    pub kind: u16,
    /// The clock: 0 for the sender's monotonic one.
    pub clock: u8,
}

impl PlainRecord {
    pub(crate) fn of(record: &OwnedRecord) -> Self {
        PlainRecord {
            data: record.bytes.as_ptr().cast(),
            length: record.bytes.len(),
            sequence: record.sequence,
            time: record.time,
            missed: 0,
            kind: record.kind.number(),
            clock: record.clock.number(),
        }
    }

    fn in_place(record: &Record<'_>) -> Self {
        PlainRecord {
            data: record.words().as_ptr().cast(),
            length: record.len(),
            sequence: record.sequence(),
            time: record.time(),
            missed: record.missed(),
            kind: record.kind().number(),
            clock: record.clock().number(),
        }
    }
}

struct End {
    receiver: Receiver,
    /// Whether a record was found and not released.
    holds: bool,
}

static RECEIVERS: Handles<End> = Handles::new(3, "receiver");

impl End {
    /// Waits for a record.
    fn wait(&mut self, nanoseconds: i64) -> Result<Record<'_>, Failure> {
        let found = match timeout(nanoseconds) {
            None => Some(self.receiver.recv()?),
            Some(timeout) if timeout.is_zero() => self.receiver.try_recv()?,
            Some(timeout) => self.receiver.recv_timeout(timeout)?,
        };
        found.ok_or_else(|| no_record(nanoseconds))
    }

    fn release(&mut self) -> Result<(), Failure> {
        if std::mem::take(&mut self.holds) {
            self.receiver.release()?;
        }
        Ok(())
    }
}

/// Returns the error of a wait that found nothing.
#[cold]
pub(crate) fn no_record(nanoseconds: i64) -> Failure {
    let text = match nanoseconds {
        0 => "there is no record now".to_owned(),
        nanoseconds => format!("no record came within {} s", nanoseconds as f64 / 1e9),
    };
    Failure::new(Code::TimedOut, text)
}

/// Claims the receiving end of a channel. Stores a handle, which `barlink_receiver_close` closes.
///
/// # Safety
///
/// `channel` ends with a 0; `out` has room for a pointer; no thread closes `side` meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_receiver_new(
    side: *mut SideHandle,
    channel: *const c_char,
    out: *mut *mut ReceiverHandle,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let out = unsafe { place(out) }?;
        // SAFETY: the caller's.
        let (side, channel) =
            unsafe { (self::side(side)?, text(channel, "the name of the channel")?) };
        let receiver = side.receiver(channel)?;
        let holds = false;
        *out = RECEIVERS.insert(End { receiver, holds })?;
        Ok(())
    })
}

/// Closes a receiver: releases the record that it holds, and gives the end back.
///
/// # Safety
///
/// No other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_receiver_close(receiver: *mut ReceiverHandle) -> Code {
    // SAFETY: the caller's.
    guard(|| unsafe { RECEIVERS.remove(receiver) }.map(drop))
}

/// Receives the next record in place, in the shared memory. Waits for it up to `timeout`
/// nanoseconds: for ever if it is negative, not at all if it is 0. The result is then
/// `BARLINK_TIMED_OUT`. The bytes are valid until `barlink_release`, or the next call that
/// receives, which releases the record first. A sender in another VM could still change them: copy
/// what must not change between a check and its use.
///
/// # Safety
///
/// `record` has room for a record; no other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_receive(
    receiver: *mut ReceiverHandle,
    timeout: i64,
    record: *mut PlainRecord,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (end, record) = unsafe { (RECEIVERS.get(receiver)?, place(record)?) };
        end.release()?;
        let found = end.wait(timeout)?;
        *record = PlainRecord::in_place(&found);
        found.advance();
        end.holds = true;
        Ok(())
    })
}

/// Releases the record that `barlink_receive` found, so that the sender can use its room.
///
/// # Safety
///
/// No other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_release(receiver: *mut ReceiverHandle) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let end = unsafe { RECEIVERS.get(receiver) }?;
        match end.holds {
            true => end.release(),
            false => Err(Failure::invalid("the receiver holds no record")),
        }
    })
}

/// Receives the next record into a buffer of `capacity` bytes, and releases it. If the buffer is
/// too small, the result is `BARLINK_TOO_LARGE`, `record` has the length, and the record stays in
/// the channel. Waits as `barlink_receive` does.
///
/// # Safety
///
/// `buffer` has `capacity` bytes; `record` has room for a record; no other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_receive_copy(
    receiver: *mut ReceiverHandle,
    buffer: *mut c_void,
    capacity: usize,
    timeout: i64,
    record: *mut PlainRecord,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (end, buffer, record) = unsafe {
            (
                RECEIVERS.get(receiver)?,
                memory_mut(buffer, capacity)?,
                place(record)?,
            )
        };
        end.release()?;
        let found = end.wait(timeout)?;
        *record = PlainRecord::in_place(&found);
        let length = found.len();
        if length > capacity {
            record.data = ptr::null();
            found.keep();
            return Err(Failure::new(
                Code::TooLarge,
                format!("the record has {length} bytes, and the buffer {capacity}"),
            ));
        }
        found.copy_to(buffer);
        record.data = buffer.as_ptr().cast();
        Ok(found.release()?)
    })
}

/// Reads bytes of a stream, as `barlink recv` does. Waits for some, and stores how many there are.
/// The result is `BARLINK_END` at the end of the stream, and the next call reads the next stream.
/// It is `BARLINK_INCOMPLETE` if the sender left before, or if records are missing.
///
/// # Safety
///
/// `buffer` has `capacity` bytes; `length` has room for a number; no other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_read(
    receiver: *mut ReceiverHandle,
    buffer: *mut c_void,
    capacity: usize,
    length: *mut usize,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (end, buffer, length) = unsafe {
            (
                RECEIVERS.get(receiver)?,
                memory_mut(buffer, capacity)?,
                place(length)?,
            )
        };
        end.release()?;
        *length = match end.receiver.stream().read(buffer) {
            Ok(0) if capacity > 0 => return Err(Failure::new(Code::End, "the stream has ended")),
            Ok(length) => length,
            Err(error) => return Err(error.into()),
        };
        Ok(())
    })
}

/// Stores whether a program sends into the channel now: 1 or 0.
///
/// # Safety
///
/// `present` has room for a number; no other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_has_sender(
    receiver: *mut ReceiverHandle,
    present: *mut c_int,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (end, present) = unsafe { (RECEIVERS.get(receiver)?, place(present)?) };
        *present = end.receiver.is_peer_present().into();
        Ok(())
    })
}

/// Stores a descriptor for `poll`: readable when there may be a record. It belongs to the handle:
/// do not close it.
///
/// # Safety
///
/// `descriptor` has room for a number; no other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_receiver_descriptor(
    receiver: *mut ReceiverHandle,
    descriptor: *mut c_int,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (end, descriptor) = unsafe { (RECEIVERS.get(receiver)?, place(descriptor)?) };
        *descriptor = end.receiver.as_raw_fd();
        Ok(())
    })
}
