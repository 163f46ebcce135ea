// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The answers to drivers that ask whether the broker is alive (`docs/protocol.md`, section 3).
//!
//! A driver counts its questions in its page and rings the host. The broker copies the count into
//! its own page. This is a level: an answer says nothing about a ring, so none is lost with one.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use log::warn;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::slot::SharedRegion;

/// Shortest time between two answers. Guests can ring without end.
const PAUSE: Duration = Duration::from_millis(1);

/// Starts the thread that answers: at once, and then after rings for the host.
pub fn answer_questions(region: &Arc<SharedRegion>) -> io::Result<()> {
    let region = Arc::clone(region);
    let epoll = Epoll::new()?;
    // The epoll waits for edges, because no process may read an eventfd of the host: host apps wait
    // on the same eventfd.
    if let Some(eventfd) = region.eventfds(region.layout().host()).first() {
        let events = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        epoll.ctl(ControlOperation::Add, eventfd.as_raw_fd(), events)?;
    }
    thread::Builder::new()
        .name("questions".to_owned())
        .spawn(move || {
            let mut answered = Vec::new();
            loop {
                region.answer_drivers(&mut answered);
                thread::sleep(PAUSE);
                match epoll.wait(-1, &mut [EpollEvent::default()]) {
                    Ok(_) => (),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                    Err(error) => {
                        warn!(
                            "drivers that ask whether the broker is alive get no answer: {error}"
                        );
                        return;
                    }
                }
            }
        })?;
    Ok(())
}
