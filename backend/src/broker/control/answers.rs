// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The answers to host apps' requests, in the types of the control protocol.

use std::fmt::Arguments;
use std::os::fd::AsFd;
use std::sync::Arc;

use barlink_protocol::wire::layout;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use log::Level;

use crate::broker::state::{BrokerState, Emptied};
use crate::persistence::ClientId;
use crate::rate_limit::CONNECTIONS;
use crate::slot::{ReadError, ReadResult, Vm};
use crate::socket::Peer;
use barlink::control::message::{
    Answer, Ask, BufferStatus, ClaimStatus, Entry, GuestMemoryStatus, Refusal, RegionInfo,
    SlotStatus, Status, VmStatus,
};

/// An answer, and the descriptors that are sent with it.
pub type Answered = (Answer, Vec<Box<dyn AsFd>>);

/// Answers a request that needs no other thread.
pub fn answer(
    ask: &Ask,
    peer: Peer,
    client: ClientId,
    state: &BrokerState,
) -> Result<Answered, Refusal> {
    let log = |level, message: Arguments<'_>| peer.log(&CONNECTIONS, level, message);
    let (region, roster) = (&*state.region, &state.roster);
    let name = |channel| region.channel(channel).map(|entry| entry.name);
    let name = |channel| name(channel).ok_or(Refusal::NoChannel(channel));
    match *ask {
        Ask::Attach { access } => {
            let memory = Arc::clone(region.memory(access));
            log(Level::Debug, format_args!("{peer} attaches"));
            let info = RegionInfo::from(region.layout());
            Ok((Answer::Region(info), vec![Box::new(memory)]))
        }
        Ask::Claim { channel, end } => {
            roster.claim(client, peer.pid.unsigned_abs(), channel, end)?;
            let eventfds = claimed_eventfds(state, channel, end)?;
            let name = name(channel)?;
            log(
                Level::Debug,
                format_args!("{peer} holds the {end} of `{name}`"),
            );
            Ok((Answer::Claimed, eventfds))
        }
        Ask::Release { channel, end } => {
            roster.release(client, channel, end)?;
            Ok((Answer::Done, Vec::new()))
        }
        Ask::Status => Ok((Answer::Status(status(state)), Vec::new())),
        Ask::Reset { channel, force } => {
            let Emptied { generation, broken } = roster.reset(&state.slots, channel, force)?;
            let name = name(channel)?;
            let breaks = match &broken[..] {
                [] => String::new(),
                broken => format!(" by force, which breaks {}", broken.join(" and ")),
            };
            log(
                Level::Info,
                format_args!("{peer} resets `{name}`{breaks}: generation {generation}"),
            );
            Ok((Answer::Reset { generation, broken }, Vec::new()))
        }
        Ask::AddChannel(Entry(wanted)) => {
            let added = roster.add_channel(wanted)?;
            log(
                Level::Info,
                format_args!("{peer} adds the channel `{}`", wanted.name),
            );
            Ok((Answer::Added(added), Vec::new()))
        }
        // The server handles the first three. A broker that hands over handles the last one.
        Ask::HandOver | Ask::ReadGuest { .. } | Ask::ReadBuffer { .. } | Ask::Retire => {
            Err(Refusal::Busy)
        }
    }
}

/// Returns the eventfds of an end: those that its holder waits on, of control and channel vector,
/// and those of the other end, which it rings.
fn claimed_eventfds(
    state: &BrokerState,
    channel: usize,
    end: layout::End,
) -> Result<Vec<Box<dyn AsFd>>, Refusal> {
    let entry = state.region.channel(channel);
    let entry = entry.ok_or(Refusal::NoChannel(channel))?;
    let mut all: Vec<Box<dyn AsFd>> = Vec::new();
    let own = entry.peer(end);
    // A producer without a consumer never rings: it gets its own eventfds once more.
    let other = match entry.has_consumer() {
        true => entry.peer(end.other()),
        false => own,
    };
    for peer in [own, other] {
        let eventfds = state.region.eventfds(peer);
        for eventfd in [eventfds.first(), eventfds.get(entry.vector as usize)] {
            let eventfd = eventfd.ok_or_else(|| Refusal::Failed("no such vector".to_owned()))?;
            all.push(Box::new(Arc::clone(eventfd)));
        }
    }
    Ok(all)
}

/// Describes the broker, its VMs and its host apps.
fn status(state: &BrokerState) -> Status {
    let slots = state.slots.iter().map(|slot| {
        let (transport, socket) = (slot.transport().to_owned(), slot.socket().to_owned());
        let vm = slot.vm();
        let mut status = SlotStatus::new(slot.id(), transport, socket, vm.as_ref().map(vm_status));
        status.former = slot.former_vmm().map(|vmm| vmm.pid());
        status
    });
    let claims = state.roster.claims().into_iter();
    let claims = claims.map(|claim| ClaimStatus::new(claim.channel, claim.end, claim.pid));
    Status::new(
        std::process::id(),
        state.roster.epoch(),
        state.start.elapsed().as_secs_f64(),
        slots.collect(),
        claims.collect(),
    )
}

fn vm_status(vm: &Vm) -> VmStatus {
    let mut status = VmStatus::new(vm.vmm.pid.unsigned_abs(), vm.vmm.uid, vm.connection);
    let memory = vm.guest_memory;
    status.guest_memory = memory.map(|size| GuestMemoryStatus::new(size.readable, size.unreadable));
    let buffer = vm.buffer;
    status.buffer = buffer.map(|buffer| BufferStatus::new(buffer.address, buffer.size));
    status
}

/// Answers a request for bytes of the guest's memory in a slot.
pub fn bytes(slot: u32, result: ReadResult) -> Answer {
    match result {
        Ok(bytes) => Answer::Bytes(BASE64_STANDARD.encode(bytes)),
        Err(error) => Answer::Refused(refusal(slot, error)),
    }
}

/// Tells a host app why bytes of the guest's memory in a slot cannot be read.
pub fn refusal(slot: u32, error: ReadError) -> Refusal {
    match error {
        ReadError::NoVm => Refusal::NoVm(slot),
        ReadError::NoGuestMemory => Refusal::NoGuestMemory(slot),
        ReadError::NoBuffer => Refusal::NoBuffer(slot),
        ReadError::OutsideBuffer {
            offset,
            length,
            size,
        } => Refusal::OutsideBuffer {
            offset,
            length,
            size,
        },
        ReadError::NotShared { address, length } => Refusal::NotThere { address, length },
        ReadError::Busy => Refusal::Busy,
    }
}
