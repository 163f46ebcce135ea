// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The connections of clients that were rejected and have not disconnected.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags};

use super::listener::Listener;
use crate::socket::is_disconnected;
use crate::transport::{Rejection, Transport};
use barlink::notifier::Notifier;

/// Most rejected clients that stay connected. A further one disconnects the oldest.
const MAX_REJECTED: usize = 8;

/// The rejected clients of one slot.
pub struct RejectedClients {
    clients: Mutex<VecDeque<(Arc<UnixStream>, Rejection)>>,
    /// Rings when a client is added.
    more: Notifier,
}

impl RejectedClients {
    /// Creates an empty list.
    pub fn new() -> io::Result<Self> {
        Ok(RejectedClients {
            clients: Mutex::default(),
            more: Notifier::new()?,
        })
    }

    /// Adds a client.
    pub fn add(&self, client: Arc<UnixStream>, rejection: Rejection) {
        let mut clients = self.clients.lock();
        if clients.len() == MAX_REJECTED {
            clients.pop_front();
        }
        clients.push_back((client, rejection));
        // An error of this call does not matter, because a full eventfd wakes the thread as well.
        let _ = self.more.ring();
    }

    /// Waits for a connection at a listener. Meanwhile sends each pending rejection once its client
    /// has sent a message, and removes clients that have disconnected.
    pub fn wait(&self, listener: &Listener, transport: &dyn Transport) -> io::Result<()> {
        loop {
            let clients = self.clients.lock().clone();
            let mut all = vec![
                PollFd::new(listener, PollFlags::IN),
                PollFd::new(&self.more, PollFlags::IN),
            ];
            let events = |rejection| match rejection {
                Rejection::Sent => PollFlags::empty(),
                Rejection::Pending => PollFlags::IN,
            };
            let polled = clients.iter();
            all.extend(polled.map(|(client, rejection)| PollFd::new(client, events(*rejection))));
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut all, None))?;
            let is_connected = !all[0].revents().is_empty();
            drop(all);
            self.more.drain();
            self.clients.lock().retain_mut(|(client, rejection)| {
                if *rejection == Rejection::Pending {
                    *rejection = transport.reject(client);
                }
                !is_disconnected(client)
            });
            if is_connected {
                return Ok(());
            }
        }
    }
}
