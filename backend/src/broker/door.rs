// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A slot's door: a thread that listens at the slot's socket, lets one VM in at a time, and turns others away.

use std::io;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use log::{error, info, warn};
use rustix::net::SocketFlags;

use super::{Listener, Peer, Shared};
use crate::transport::{Departure, Transport};

/// How long to wait when the kernel has no descriptor for a connection.
const PAUSE: Duration = Duration::from_millis(100);

/// Starts to listen for the VM of a slot.
pub fn open(
    id: u32,
    transport: Arc<dyn Transport>,
    listener: Arc<Listener>,
    shared: Arc<Shared>,
) -> io::Result<()> {
    thread::Builder::new()
        .name(format!("door {id}"))
        .spawn(move || {
            loop {
                match listener.accept(SocketFlags::empty()) {
                    Ok(stream) => knock(id, &transport, UnixStream::from(stream), &shared),
                    Err(error) => {
                        warn!("slot {id}: cannot accept a VM: {error}");
                        thread::sleep(PAUSE);
                    }
                }
            }
        })?;
    Ok(())
}

fn knock(id: u32, transport: &Arc<dyn Transport>, vm: UnixStream, shared: &Arc<Shared>) {
    let peer = match Peer::of(&vm) {
        Ok(peer) if shared.policy().admits(peer) => peer,
        Ok(peer) => {
            warn!(
                "slot {id}: {peer} is refused: not the broker's user, nor allowed (--allow-user)"
            );
            return transport.refuse(vm);
        }
        Err(error) => {
            warn!("slot {id}: a VM is refused: {error}");
            return transport.refuse(vm);
        }
    };
    let (transport, shared) = (Arc::clone(transport), Arc::clone(shared));
    let session = move || {
        let Some(slot) = shared.occupy(id, peer) else {
            warn!("slot {id}: {peer} is refused: the slot is taken");
            return transport.refuse(vm);
        };
        info!("slot {id}: {peer} is here");
        // The session may panic; the slot is free again whatever happens, and the broker goes on.
        match catch_unwind(AssertUnwindSafe(|| transport.serve(vm, &slot))) {
            Ok(Ok(Departure::Left)) => info!("slot {id}: {peer} has left"),
            Ok(Ok(Departure::Misbehaved(how))) => warn!("slot {id}: {peer} is let go: {how}"),
            Ok(Err(problem)) => warn!(
                "slot {id}: {peer} is let go: {:#}",
                anyhow::Error::from(problem)
            ),
            Err(_) => {
                error!("slot {id}: the session of {peer} has failed, which is a fault of barlink");
            }
        }
    };
    if let Err(error) = thread::Builder::new()
        .name(format!("slot {id}"))
        .spawn(session)
    {
        error!("slot {id}: no thread for a VM: {error}");
    }
}
