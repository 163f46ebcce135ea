// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The receiver of a stream.

use core::ops::Deref;
use core::time::Duration;

use libc::c_int;

use super::files::{check, is_fault, is_invalid, retry};
use super::position::{Accept, Part, Position};
use super::wait::Wait;
use super::{Progress, StreamError, Watch};
use crate::aligned::AlignedBuffer;
use crate::channel::Receiver;
use crate::consumer::Record;
use crate::link::{Events, Wakeup};
use crate::strategy::Strategy;
use crate::sync::AtomicU64;
use crate::{io, region};

/// Size of the private buffer of a receiver, in bytes.
const BUFFER_BYTES: usize = 256 << 10;

/// Receives a stream, from the channel's next record to the end of the stream, and writes its bytes
/// from the region to `target`. The next record must be the beginning of a stream, unless
/// `position` is within one or `accept` permits another. A record that is not of the stream stays
/// in the channel. A target that is not open for writing is an error at once. At the end, also
/// after an error, closes a copy of `target`, because a file can report a write error as late as
/// that.
///
/// ```
/// use std::fs::File;
/// use std::ops::Deref;
/// use std::os::fd::AsRawFd;
///
/// use barlink_protocol::stream::{self, Accept, Position, StreamError};
/// use barlink_protocol::{AtomicU64, Events, Receiver};
///
/// /// Receives a stream into a file. Returns the number of bytes.
/// fn receive<M, E>(
///     receiver: &mut Receiver<M, E>,
///     file: &File,
/// ) -> Result<u64, StreamError<E::Error>>
/// where
///     M: Deref<Target = [AtomicU64]> + Clone,
///     E: Events,
/// {
///     let (accept, mut position) = (Accept::default(), Position::new(None));
///     let fd = file.as_raw_fd();
///     Ok(stream::receive(receiver, fd, accept, &mut position, &mut ())?.bytes)
/// }
/// ```
pub fn receive<M, E>(
    receiver: &mut Receiver<M, E>,
    target: c_int,
    accept: Accept,
    position: &mut Position,
    watch: &mut impl Watch,
) -> Result<Progress, StreamError<E::Error>>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events,
{
    let mut total = Progress::default();
    let outcome = receive_records(receiver, target, accept, position, watch, &mut total);
    match region::flush(target) {
        Err(source) if total.records > 0 => Err(StreamError::Close {
            source,
            progress: total,
        }),
        _ => outcome,
    }
}

/// Receives a stream as [`receive`] does, without closing the target.
fn receive_records<M, E>(
    receiver: &mut Receiver<M, E>,
    target: c_int,
    accept: Accept,
    position: &mut Position,
    watch: &mut impl Watch,
    total: &mut Progress,
) -> Result<Progress, StreamError<E::Error>>
where
    M: Deref<Target = [AtomicU64]> + Clone,
    E: Events,
{
    region::check_writable(target).map_err(|source| failed(source, 0))?;
    receiver.set_strategy(Strategy::STREAM);
    let mut has_broker = true;
    let mut buffer = PrivateBuffer::default();
    let mut wait = Wait::default();
    loop {
        // If the sender has left, the channel still has the records that it committed, and no
        // further ones come. Its presence is looked at only while there is no record, because each
        // look goes over the bus in a guest. The look is stored, so that the wait notices a sender
        // that leaves after it.
        let away = position.begun && !receiver.poll()? && receiver.look_at_peer()?;
        let had_broker = has_broker;
        has_broker = !receiver.peer().is_without_broker();
        if had_broker && !has_broker {
            watch.broker_ended();
        }
        let report_after = watch.report_after().filter(|_| total.records == 0);
        let time = match away {
            true => Some(Duration::ZERO),
            false => wait.next(report_after, watch.timeout(), || receiver.events().now()),
        };
        match receiver.wait(time)? {
            Wakeup::Ready => wait = Wait::default(),
            Wakeup::TimedOut if away => {
                position.end();
                return match accept.is_raw() {
                    true => finish(*total, accept),
                    false => Err(StreamError::Incomplete(total.bytes)),
                };
            }
            Wakeup::TimedOut => {
                wait.check(watch.timeout(), || receiver.events().now(), total)?;
                if total.records == 0 && watch.report_after().is_some() {
                    watch.waits(receiver.peer_is_away());
                }
                continue;
            }
            Wakeup::PeerChanged => continue,
        }
        let Some(record) = receiver.record() else {
            continue;
        };
        let header = *record.header();
        let part = position.take_up(&header, accept)?;
        if part == Part::NextBegin {
            // The next stream's records stay in the channel for the next receiver.
            position.end();
            return Err(StreamError::Incomplete(total.bytes));
        }
        (total.dropped, total.headless) = (position.dropped, position.headless);
        total.went_back = position.went_back;
        let watched = watch.record(header.sequence);
        watched.map_err(|source| failed(source, 0))?;
        if part == Part::Data || accept.is_raw() {
            // A hostile producer can repeat the number of a record that was taken in part.
            let first = position.done.min(record.length());
            buffer.write_all(receiver, &record, target, first)?;
            total.bytes += (record.length() - first) as u64;
            total.records += u64::from(part == Part::Data);
        }
        position.release();
        receiver.release()?;
        if part == Part::End {
            position.end();
            return finish(*total, accept);
        }
        watch.progress(total);
    }
}

/// Returns the result of a stream that was received to its end.
fn finish<X>(total: Progress, accept: Accept) -> Result<Progress, StreamError<X>> {
    match total.dropped > 0 && !accept.is_partial() {
        true => Err(StreamError::Missing(total)),
        false => Ok(total),
    }
}

/// A private buffer between the region and files to which the kernel cannot write from the region.
/// It is empty until such a file is met.
#[derive(Default)]
struct PrivateBuffer(AlignedBuffer);

impl PrivateBuffer {
    /// Writes the payload of a record, from byte `done` on.
    fn write_all<M, E>(
        &mut self,
        receiver: &Receiver<M, E>,
        record: &Record<'_, M>,
        target: c_int,
        mut done: usize,
    ) -> Result<(), StreamError<E::Error>>
    where
        M: Deref<Target = [AtomicU64]> + Clone,
        E: Events,
    {
        let first = done;
        while done < record.length() {
            let written = retry(target, libc::POLLOUT, || match self.0.is_empty() {
                true => record.write_to(target, done),
                false => record.write_copy(target, done, self.0.bytes()),
            });
            done += match written {
                Err(error) if self.0.is_empty() && (is_fault(&error) || is_invalid(&error)) => {
                    check(receiver.events())?;
                    self.0 = AlignedBuffer::new(BUFFER_BYTES)
                        .map_err(|source| failed(source, done - first))?;
                    0
                }
                // A file with O_DIRECT refuses less than a block, and all that follows it.
                Err(error) if is_invalid(&error) && region::clear_direct(target) => 0,
                Ok(0) => return Err(failed(io::ErrorKind::WriteZero.into(), done - first)),
                written => written.map_err(|source| failed(source, done - first))?,
            };
        }
        Ok(())
    }
}

fn failed<X>(source: io::Error, done: usize) -> StreamError<X> {
    StreamError::Write {
        source,
        partial: done as u64,
    }
}
