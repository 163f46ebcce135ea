// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The sending end of a channel.

use std::ffi::{c_char, c_int, c_void};
use std::io::Write;
use std::mem;
use std::os::fd::AsRawFd;

use barlink::stream::StreamWriter;
use barlink::{Kind, Reservation, Sender, Sent};

use crate::arguments::{memory, place, text, timeout};
use crate::failure::{Code, Failure, guard};
use crate::handles::Handles;
use crate::side::{SideHandle, side};

/// The sending end of a channel. One thread at a time uses it.
#[derive(Debug)]
pub struct SenderHandle {
    _private: [u8; 0],
}

/// What a sender is in the middle of. It borrows the sender that stands behind it.
enum Busy {
    No,
    Reserved(Reservation<'static>),
    Streaming(StreamWriter<'static>),
}

struct End {
    // Dropped before the sender that it borrows.
    busy: Busy,
    /// Made by [`Box::into_raw`], so that `busy` can borrow what it points to.
    sender: *mut Sender,
}

// SAFETY: an `BARLINK_END` owns its sender, which may move between threads, as may what borrows it.
unsafe impl Send for End {}

impl Drop for End {
    fn drop(&mut self) {
        self.busy = Busy::No;
        // SAFETY: `new` made the pointer, and nothing borrows the sender any more.
        drop(unsafe { Box::from_raw(self.sender) });
    }
}

impl End {
    fn new(sender: Sender) -> Self {
        End {
            busy: Busy::No,
            sender: Box::into_raw(Box::new(sender)),
        }
    }

    /// Returns the sender, if it is not busy.
    fn free(&mut self) -> Result<&mut Sender, Failure> {
        let what = match self.busy {
            // SAFETY: the sender lives as long as `self`, and nothing else borrows it.
            Busy::No => return Ok(unsafe { &mut *self.sender }),
            Busy::Reserved(_) => "holds a reservation: commit or discard it first",
            Busy::Streaming(_) => "is within a stream: finish it first",
        };
        Err(Failure::invalid(format!("the sender {what}")))
    }

    /// Returns the sender for something that makes it busy.
    fn lend(&mut self) -> Result<&'static mut Sender, Failure> {
        self.free()?;
        // SAFETY: the borrow goes into `busy`, which ends before the sender does, and as long as it
        // is there `free` lends the sender to nobody else.
        Ok(unsafe { &mut *self.sender })
    }
}

/// The kind of records that are data of a stream.
pub const BARLINK_DATA: u16 = 1;
/// The first kind that belongs to programs.
pub const BARLINK_USER: u16 = 256;

fn kind(number: u16) -> Result<Kind, Failure> {
    Kind::new(number).ok_or_else(|| Failure::invalid(format!("a record has no kind {number}")))
}

static SENDERS: Handles<End> = Handles::new(2, "sender");

/// Claims the sending end of a channel. Stores a handle, which `barlink_sender_close` closes.
///
/// # Safety
///
/// `channel` ends with a 0; `out` has room for a pointer; no thread closes `side` meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_sender_new(
    side: *mut SideHandle,
    channel: *const c_char,
    out: *mut *mut SenderHandle,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let out = unsafe { place(out) }?;
        // SAFETY: the caller's.
        let (side, channel) =
            unsafe { (self::side(side)?, text(channel, "the name of the channel")?) };
        *out = SENDERS.insert(End::new(side.sender(channel)?))?;
        Ok(())
    })
}

/// Closes a sender: gives the end back, and discards a reservation. Records that were sent stay in
/// the channel.
///
/// # Safety
///
/// No other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_sender_close(sender: *mut SenderHandle) -> Code {
    // SAFETY: the caller's.
    guard(|| unsafe { SENDERS.remove(sender) }.map(drop))
}

/// Sends a record of so many bytes. If the channel has no room, waits up to `timeout` nanoseconds:
/// for ever if it is negative, not at all if it is 0. The result is then `BARLINK_FULL`. A channel
/// that drops does not wait, and the result is `BARLINK_DROPPED`. `kind` is `BARLINK_DATA`, or from
/// `BARLINK_USER` to 65534 a kind of your own.
///
/// # Safety
///
/// `data` has `length` bytes; no other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_send(
    sender: *mut SenderHandle,
    kind: u16,
    data: *const c_void,
    length: usize,
    timeout: i64,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (end, bytes) = unsafe { (SENDERS.get(sender)?, memory(data, length)?) };
        let (sender, kind) = (end.free()?, self::kind(kind)?);
        let sent = match self::timeout(timeout) {
            _ if sender.drops() => sender.send(kind, bytes)?,
            None => sender.send(kind, bytes)?,
            Some(timeout) => sender.send_timeout(kind, bytes, timeout)?,
        };
        match sent {
            Sent::Dropped => Err(Failure::new(
                Code::Dropped,
                "the channel was full, and dropped the record",
            )),
            _ => Ok(()),
        }
    })
}

/// Reserves room for a record of so many bytes in the shared memory, and stores where it is. Write
/// the record there, and commit it. Waits for room as `barlink_send` does, also in a channel that
/// drops. The memory is valid until the commit, the discard, or the close.
///
/// # Safety
///
/// `data` has room for a pointer; no other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_reserve(
    sender: *mut SenderHandle,
    length: usize,
    timeout: i64,
    data: *mut *mut c_void,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (end, data) = unsafe { (SENDERS.get(sender)?, place(data)?) };
        let sender = end.lend()?;
        let mut reservation = match self::timeout(timeout) {
            None => sender.reserve(length)?,
            Some(timeout) => sender.reserve_timeout(length, timeout)?,
        };
        *data = reservation.words().as_ptr().cast_mut().cast();
        end.busy = Busy::Reserved(reservation);
        Ok(())
    })
}

/// Commits the first `length` bytes of a reservation as a record.
///
/// # Safety
///
/// No other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_commit(
    sender: *mut SenderHandle,
    kind: u16,
    length: usize,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let end = unsafe { SENDERS.get(sender) }?;
        let Busy::Reserved(reservation) = &mut end.busy else {
            return Err(Failure::invalid("the sender holds no reservation"));
        };
        let (room, kind) = (reservation.capacity(), self::kind(kind)?);
        if length > room {
            return Err(Failure::invalid(format!(
                "{length} bytes are more than the {room} that were reserved"
            )));
        }
        reservation.set_len(length);
        if let Busy::Reserved(reservation) = mem::replace(&mut end.busy, Busy::No) {
            reservation.commit(kind)?;
        }
        Ok(())
    })
}

/// Gives up a reservation. The channel is as it was.
///
/// # Safety
///
/// No other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_discard(sender: *mut SenderHandle) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let end = unsafe { SENDERS.get(sender) }?;
        match end.busy {
            Busy::Reserved(_) => {
                end.busy = Busy::No;
                Ok(())
            }
            _ => Err(Failure::invalid("the sender holds no reservation")),
        }
    })
}

/// Sends bytes of a stream, as `barlink send` does: the first call begins the stream, and
/// `barlink_finish` ends it. Waits for room as long as it takes.
///
/// # Safety
///
/// `data` has `length` bytes; no other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_write(
    sender: *mut SenderHandle,
    data: *const c_void,
    length: usize,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (end, bytes) = unsafe { (SENDERS.get(sender)?, memory(data, length)?) };
        if !matches!(end.busy, Busy::Streaming(_)) {
            end.busy = Busy::Streaming(end.lend()?.stream());
        }
        if let Busy::Streaming(stream) = &mut end.busy {
            stream.write_all(bytes)?;
        }
        Ok(())
    })
}

/// Ends a stream. Without a `barlink_write` before, the stream has no bytes.
///
/// # Safety
///
/// No other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_finish(sender: *mut SenderHandle) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let end = unsafe { SENDERS.get(sender) }?;
        let stream = match mem::replace(&mut end.busy, Busy::No) {
            Busy::Streaming(stream) => stream,
            Busy::No => end.lend()?.stream(),
            reserved @ Busy::Reserved(_) => {
                end.busy = reserved;
                return end.free().map(drop);
            }
        };
        let dropped = stream.dropped();
        stream.finish()?;
        match dropped {
            0 => Ok(()),
            dropped => Err(Failure::new(
                Code::Dropped,
                format!("the channel was full, and dropped {dropped} records of the stream"),
            )),
        }
    })
}

/// Stores the most bytes that a record can have.
///
/// # Safety
///
/// `length` has room for a number; no other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_max_record(sender: *mut SenderHandle, length: *mut usize) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (end, length) = unsafe { (SENDERS.get(sender)?, place(length)?) };
        *length = end.free()?.max_record();
        Ok(())
    })
}

/// Stores whether a program receives from the channel now: 1 or 0.
///
/// # Safety
///
/// `present` has room for a number; no other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_has_receiver(
    sender: *mut SenderHandle,
    present: *mut c_int,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (end, present) = unsafe { (SENDERS.get(sender)?, place(present)?) };
        *present = end.free()?.is_peer_present().into();
        Ok(())
    })
}

/// Stores a descriptor for `poll`: readable when there may be room again, after a call that found
/// none. It belongs to the handle: do not close it.
///
/// # Safety
///
/// `descriptor` has room for a number; no other thread uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn barlink_sender_descriptor(
    sender: *mut SenderHandle,
    descriptor: *mut c_int,
) -> Code {
    guard(|| {
        // SAFETY: the caller's.
        let (end, descriptor) = unsafe { (SENDERS.get(sender)?, place(descriptor)?) };
        *descriptor = end.free()?.as_raw_fd();
        Ok(())
    })
}
