// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A client's session, on a thread of its own: it answers messages, and forwards what is rung for the VM to the eventfds
//! that the client last set.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::device::Device;
use super::memory::Memory;
use super::stream::{Stream, StreamError};
use super::wire::Reply;
use crate::broker::{Slot, hang_up};
use crate::memory::Region;
use crate::transport::{Departure, TransportError};

/// How long a client may take for its first message, which QEMU sends at once. After that it may say nothing for ever.
const SILENCE: Duration = Duration::from_secs(10);

/// Vectors have small numbers.
const SOCKET: u64 = u64::MAX;
const WISHES: u64 = u64::MAX - 1;
/// Wishes that are granted before the next message is looked for: a vCPU may wait for the answer to that.
const WISHES_A_TURN: usize = 4;
/// Events that are taken at once.
const EVENTS: usize = 16;

/// Serves a client until it leaves, from the begin or from wherever the session's memory says that it is.
pub fn run(
    vm: &UnixStream,
    slot: &Slot,
    region: &Region,
    guest_memory: bool,
) -> Result<Departure, TransportError> {
    let memory = Memory::new(region);
    if !memory.is_known() {
        return Err(TransportError::OtherVersion);
    }
    let mut device = Device::new(slot, &memory, guest_memory);
    let mut stream = Stream::new(vm);
    let mut reply = Reply::default();
    let epoll = watch(vm, slot).map_err(TransportError::Receive)?;
    let mut events = [EpollEvent::default(); EVENTS];
    let start = Instant::now();
    // Wishes may be left, of which their bell tells no more.
    let mut more = false;
    loop {
        let mut patience = (!device.has_agreed()).then(|| SILENCE.saturating_sub(start.elapsed()));
        if patience == Some(Duration::ZERO) {
            return Ok(Departure::Misbehaved("it does not say its version"));
        }
        if more {
            patience = Some(Duration::ZERO);
        }
        let ready = match epoll.wait(milliseconds(patience), &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(TransportError::Receive(error)),
        };
        let (mut heard, mut wished) = (false, more);
        for event in &events[..ready] {
            match event.data() {
                SOCKET => heard = true,
                WISHES => wished = true,
                // CAST: it is one of those that were registered.
                vector => device.fire(vector as u32),
            }
        }
        if !heard && !wished {
            continue;
        }
        // From here to the reply no successor takes over: it would find half a message.
        let within = slot.within_a_message();
        if wished {
            let wishes = (0..WISHES_A_TURN).map_while(|_| slot.next_wish());
            let granted = wishes.map(|wish| device.grant(wish)).count();
            more = granted == WISHES_A_TURN;
        }
        if !heard {
            continue;
        }
        let answered = match stream.receive(|command| device.takes_descriptors(command)) {
            Ok(None) => return Ok(Departure::Left),
            Ok(Some(mut message)) => {
                let wants_reply = message.header.wants_reply;
                let along = device.answer(&mut message, &mut reply);
                // What was answered is not lost with this broker.
                slot.wait_until_kept();
                if wants_reply {
                    stream.send(reply.finish(), along)
                } else {
                    Ok(())
                }
            }
            Err(error) => Err(error),
        };
        if answered.is_err() {
            // A successor that takes over before this session has ended finds that the client has left, and not half a message.
            hang_up(vm);
        }
        drop(within);
        // This can wait, and so does this session alone.
        stream.close_descriptors();
        std::thread::sleep(slot.owed());
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

/// Waits for messages, and for the edges of what is rung for the VM: nobody on the host reads an eventfd.
fn watch(vm: &UnixStream, slot: &Slot) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    let add = |descriptor: RawFd, event| epoll.ctl(ControlOperation::Add, descriptor, event);
    add(vm.as_raw_fd(), EpollEvent::new(EventSet::IN, SOCKET))?;
    let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
    if let Some(bell) = slot.wishes_bell() {
        add(bell.as_raw_fd(), EpollEvent::new(edge, WISHES))?;
    }
    for (vector, bell) in (0..).zip(slot.bells(slot.id())) {
        add(bell.as_raw_fd(), EpollEvent::new(edge, vector))?;
    }
    Ok(epoll)
}

/// As `epoll_wait` takes it, rounded up.
fn milliseconds(patience: Option<Duration>) -> i32 {
    patience.map_or(-1, |time| {
        let milliseconds = i32::try_from(time.as_millis()).unwrap_or(i32::MAX);
        milliseconds.saturating_add(1)
    })
}
