// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A client's session, on a thread of its own: it answers messages, forwards rings for the VM to
//! the client's eventfds, and answers requests for guest memory.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::device::Device;
use super::session_state::SessionState;
use super::stream::{Stream, StreamError};
use super::wire::Reply;
use crate::memory::Region;
use crate::slot::Slot;
use crate::socket::disconnect;
use crate::transport::{Departure, TransportError};

/// The time within which a client must send its first message. QEMU sends it at once. After that a
/// client may be idle forever.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Vectors have small numbers.
const SOCKET: u64 = u64::MAX;
const REQUESTS: u64 = u64::MAX - 1;
/// Read requests that are answered before the next message, for whose answer a vCPU may wait.
const REQUESTS_A_ROUND: usize = 4;
/// Events that are received at once.
const EVENTS: usize = 16;

/// Serves a client until it leaves, from the progress on that is in the session's state.
pub fn run(
    vm: &UnixStream,
    slot: &Slot,
    region: &Region,
    guest_memory: bool,
) -> Result<Departure, TransportError> {
    let state = SessionState::new(region);
    if !state.is_known() {
        return Err(TransportError::OtherVersion);
    }
    let mut device = Device::new(slot, &state, guest_memory);
    let mut stream = Stream::new(vm);
    let mut reply = Reply::default();
    let epoll = watch(vm, slot).map_err(TransportError::Receive)?;
    let mut events = [EpollEvent::default(); EVENTS];
    let start = Instant::now();
    // True if the queue may have requests that no further ring announces.
    let mut more = false;
    loop {
        let mut timeout =
            (!device.is_negotiated()).then(|| IDLE_TIMEOUT.saturating_sub(start.elapsed()));
        if timeout == Some(Duration::ZERO) {
            return Ok(Departure::Misbehaved("it does not say its version"));
        }
        if more {
            timeout = Some(Duration::ZERO);
        }
        let ready = match epoll.wait(milliseconds(timeout), &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(TransportError::Receive(error)),
        };
        let (mut has_message, mut has_request) = (false, more);
        for event in &events[..ready] {
            match event.data() {
                SOCKET => has_message = true,
                REQUESTS => has_request = true,
                // CAST: one of the vectors that were registered.
                vector => device.fire(vector as u32),
            }
        }
        if !has_message && !has_request {
            continue;
        }
        // The lock is held until the reply is sent, because a successor must not find half a
        // message.
        let lock = slot.lock_session();
        if has_request {
            let requests = (0..REQUESTS_A_ROUND).map_while(|_| slot.requests().take());
            let answered = requests.map(|request| {
                let bytes = device.read_guest(request.source, request.length);
                request.answer(bytes);
            });
            more = answered.count() == REQUESTS_A_ROUND;
        }
        if !has_message {
            continue;
        }
        let answered = match stream.receive(|command| device.receives_descriptors(command)) {
            Ok(None) => return Ok(Departure::Left),
            Ok(Some(mut message)) => {
                let wants_reply = message.header.wants_reply;
                let descriptor = device.answer(&mut message, &mut reply);
                // The effect of an answered command must outlive this broker.
                slot.wait_until_stored();
                if wants_reply {
                    stream.send(reply.finish(), descriptor)
                } else {
                    Ok(())
                }
            }
            Err(error) => Err(error),
        };
        if answered.is_err() {
            // The client is disconnected before the lock is released, so that a successor finds a
            // client that has left, and not half a message.
            disconnect(vm);
        }
        drop(lock);
        // A descriptor can be slow to close, which delays this session alone.
        stream.close_descriptors();
        std::thread::sleep(slot.delay());
        match answered {
            Ok(()) => (),
            Err(StreamError::Gone) => return Ok(Departure::Left),
            Err(StreamError::Header(_)) => {
                return Ok(Departure::Misbehaved(
                    "it sent something else than commands",
                ));
            }
            Err(StreamError::Stalled) => {
                return Ok(Departure::Misbehaved("it stopped within a message"));
            }
            Err(StreamError::Socket(error)) => return Err(TransportError::Receive(error)),
        }
    }
}

/// Creates an epoll that waits for messages, and for edges of eventfds, because no process on the
/// host reads an eventfd.
fn watch(vm: &UnixStream, slot: &Slot) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    let add = |descriptor: RawFd, event| epoll.ctl(ControlOperation::Add, descriptor, event);
    add(vm.as_raw_fd(), EpollEvent::new(EventSet::IN, SOCKET))?;
    let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
    let requests = slot.requests().eventfd().as_raw_fd();
    add(requests, EpollEvent::new(edge, REQUESTS))?;
    for (vector, eventfd) in (0..).zip(slot.region().eventfds(slot.id())) {
        add(eventfd.as_raw_fd(), EpollEvent::new(edge, vector))?;
    }
    Ok(epoll)
}

/// Converts a timeout for `epoll_wait`, rounded up.
fn milliseconds(timeout: Option<Duration>) -> i32 {
    timeout.map_or(-1, |time| {
        let milliseconds = i32::try_from(time.as_millis()).unwrap_or(i32::MAX);
        milliseconds.saturating_add(1)
    })
}
