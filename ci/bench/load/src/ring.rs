// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A limit: the same channel between two threads of one process, in the process's own memory.

use std::convert::Infallible;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use barlink_protocol::region::Region;
use barlink_protocol::state::{self, ChannelState};
use barlink_protocol::wire::layout::{
    BROKER_PAGE, Channel, End, FIRST_FREE, Layout, NO_PEER, Name, Policy, presence,
};
use barlink_protocol::{AtomicU64, Events, Receiver, Sender, Tap};
use clap::Args;

use crate::{CAPACITY, Measured, Receive, Send};

/// Sends and receives within this process.
#[derive(Args, Debug)]
pub struct Ring {
    #[command(flatten)]
    send: Send,
}

impl Ring {
    /// Streams from one thread to the other.
    pub fn run(&self) -> Result<Measured> {
        let Ends {
            sender, receiver, ..
        } = Ends::new()?;
        thread::scope(|scope| {
            let receive = Receive {
                batch: self.send.batch,
            };
            let receiving = scope.spawn(move || receive.run(receiver));
            self.send.run(sender)?;
            let received = receiving.join();
            received.map_err(|_| anyhow!("the receiver panicked"))?
        })
    }
}

type Memory = &'static [AtomicU64];

/// Returns new memory of this size in bytes, which begins at a page as that of a region does, so
/// that the words of a channel lie on the same lines. It lives as long as the process.
fn memory(size: u64) -> Memory {
    const PAGE: usize = 4096;
    let count = size as usize / 8;
    let words = (0..count + PAGE / 8).map(|_| AtomicU64::new(0));
    let words = Vec::leak(words.collect());
    let start = words.as_ptr().align_offset(PAGE);
    &words[start..start + count]
}

/// The producer's end of a channel in this process's memory.
pub(crate) struct Alone {
    pub(crate) sender: Sender<Memory, Notifiers>,
    region: Region<Memory>,
    layout: Layout,
    /// The doorbells of the other end.
    other: Notifiers,
}

impl Alone {
    pub(crate) fn new(policy: Policy) -> Result<Self> {
        let channel = Channel {
            name: Name::new("ring").context("a name that cannot be")?,
            producer: 0,
            consumer: match policy {
                Policy::Overwrite => NO_PEER,
                Policy::Wait | Policy::Drop => 1,
            },
            vector: 0,
            policy,
            offset: FIRST_FREE,
            capacity: CAPACITY,
        };
        let size = (channel.end() + 4096).next_power_of_two();
        let layout = Layout::new(size, 1, 1, channel.end(), 0, &[channel])?;
        let region = Region::new(memory(size));
        state::publish(&region, &layout);
        // These words show that the VM and both ends are present, as the driver would write them.
        region.store(BROKER_PAGE + presence::CONNECTIONS, 1);
        let page = layout.presence_page(0);
        region.store(page + presence::EPOCH, 1);
        region.store(page + presence::holder(0, End::Producer), 1);
        let (one, other) = Notifiers::pair();
        Ok(Alone {
            sender: Sender::attach(region.clone(), &layout, 0, one)?,
            region,
            layout,
            other,
        })
    }

    /// Creates a tap of the channel.
    pub(crate) fn tap(&self) -> Tap<Memory> {
        Tap::attach(self.region.clone(), &self.layout.channels()[0])
    }
}

/// Both ends of a channel in this process's memory.
pub(crate) struct Ends {
    pub(crate) sender: Sender<Memory, Notifiers>,
    pub(crate) receiver: Receiver<Memory, Notifiers>,
    region: Region<Memory>,
    channel: Channel,
}

impl Ends {
    pub(crate) fn new() -> Result<Self> {
        let Alone {
            sender,
            region,
            layout,
            other,
        } = Alone::new(Policy::Wait)?;
        Ok(Ends {
            sender,
            receiver: Receiver::attach(region.clone(), &layout, 0, other)?,
            channel: layout.channels()[0],
            region,
        })
    }

    /// Creates a tap of the channel.
    pub(crate) fn tap(&self) -> Tap<Memory> {
        Tap::attach(self.region.clone(), &self.channel)
    }

    /// Returns how often both ends have rung.
    pub(crate) fn rings(&self) -> u64 {
        let state = ChannelState::read(&self.region, &self.channel);
        state.producer_rung + state.consumer_rung
    }
}

#[derive(Clone, Default)]
struct Notifier(Arc<(Mutex<bool>, Condvar)>);

/// The doorbells of one end.
pub(crate) struct Notifiers {
    own: Notifier,
    other: Notifier,
    start: Instant,
}

impl Notifiers {
    fn pair() -> (Self, Self) {
        let (own, other) = (Notifier::default(), Notifier::default());
        let start = Instant::now();
        let one = |own: &Notifier, other: &Notifier| Notifiers {
            own: own.clone(),
            other: other.clone(),
            start,
        };
        (one(&own, &other), one(&other, &own))
    }
}

impl Events for Notifiers {
    type Error = Infallible;

    fn ring(&mut self) -> Result<(), Infallible> {
        let (rung, condvar) = &*self.other.0;
        *rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        condvar.notify_one();
        Ok(())
    }

    fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, Infallible> {
        let (rung, condvar) = &*self.own.0;
        let rung = rung.lock().unwrap_or_else(PoisonError::into_inner);
        let timeout = timeout.unwrap_or(Duration::MAX);
        let waited = condvar.wait_timeout_while(rung, timeout, |rung| !*rung);
        let (mut rung, _) = waited.unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut *rung))
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn can_spin(&self) -> bool {
        thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1)
    }
}
