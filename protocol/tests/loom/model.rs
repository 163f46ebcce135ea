// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The parts of the models: a region with one channel, doorbells, and a driver and a broker that
//! write the presence pages.

use std::convert::Infallible;
use std::ops::Deref;
use std::sync::Arc as StdArc;
use std::time::Duration;

use barlink_protocol::cursor::Kind;
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{
    BROKER_PAGE, Channel, End, FIRST_FREE, Layout, NO_PEER, Name, Policy, presence,
};
use barlink_protocol::{AtomicU64, Events, Ordering, PresenceWords, Producer};
use loom::sync::atomic::fence;
use loom::sync::{Arc, Condvar, Mutex};

/// Bytes of the channel, in which two records of one word fit.
const CAPACITY: u64 = 64;
/// Time for which a producer sleeps with a wake threshold at half of the channel, as in
/// `src/link.rs`.
const HALF: Duration = Duration::from_millis(2);
/// The guest's slot.
const SLOT: u32 = 0;
const HOST: u32 = 1;

#[derive(Clone)]
pub struct Memory(StdArc<Vec<AtomicU64>>);

impl Deref for Memory {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        &self.0
    }
}

pub type Words = Region<Memory>;

/// Creates a region in which no end is present. `region::index` in loom builds maps its offsets to
/// words.
pub fn region() -> Words {
    region_for(CAPACITY)
}

/// Creates a region for a channel of this capacity.
pub fn region_for(capacity: u64) -> Words {
    region_of(8 + 17 + capacity as usize / 8)
}

/// Creates a region of this number of words.
pub fn region_of(words: usize) -> Words {
    Region::new(Memory(StdArc::new(
        (0..words).map(|_| AtomicU64::new(0)).collect(),
    )))
}

/// Returns a channel from the guest to the host.
pub fn channel() -> Channel {
    Channel {
        name: Name::new("loom").unwrap(),
        producer: SLOT,
        consumer: HOST,
        vector: 0,
        policy: Policy::Wait,
        offset: FIRST_FREE,
        capacity: CAPACITY,
    }
}

/// Returns a channel without a consumer. A record of one word takes a quarter of its capacity.
pub fn overwriting() -> Channel {
    Channel {
        consumer: NO_PEER,
        policy: Policy::Overwrite,
        capacity: 2 * CAPACITY,
        ..channel()
    }
}

/// Returns a channel whose limit moves ahead of its records: two records of one word take a
/// sixteenth of its capacity.
pub fn stepping() -> Channel {
    Channel {
        capacity: 1024,
        ..channel()
    }
}

/// Returns a channel from the host to the guest.
pub fn channel_to_guest() -> Channel {
    Channel {
        producer: HOST,
        consumer: SLOT,
        ..channel()
    }
}

/// Returns a layout that contains a channel. The channel in the layout has a larger capacity,
/// because a valid layout needs one.
fn layout(channel: &Channel) -> Layout {
    let channel = Channel {
        capacity: 4096,
        ..*channel
    };
    Layout::new(1 << 15, 1, 1, FIRST_FREE + 8192, 0, &[channel]).unwrap()
}

/// Returns the words that show the presence of one end of a channel.
pub fn words(channel: &Channel, end: End) -> Option<PresenceWords> {
    let layout = layout(channel);
    PresenceWords::find(&layout, 0, end, layout.region_size)
}

pub fn model(test: impl Fn() + Sync + Send + 'static) {
    model_of(3, test);
}

/// Checks a model with at most this number of preemptions, and with at most two unless
/// `BARLINK_TIER` is `soak`.
pub fn model_of(preemptions: usize, test: impl Fn() + Sync + Send + 'static) {
    let is_soak = std::env::var("BARLINK_TIER").is_ok_and(|tier| tier == "soak");
    let most = if is_soak { usize::MAX } else { 2 };
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions.min(most));
    builder.check(test);
}

/// The doorbell on which the ends of one side sleep. It stands for the channel's vector and vector
/// 0.
#[derive(Clone)]
pub struct Notifier(Arc<(Mutex<bool>, Condvar)>);

impl Notifier {
    pub fn ring(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_one();
    }

    /// Sleeps until it is rung, without a time limit.
    pub fn sleep(&self) {
        let (flag, condvar) = &*self.0;
        let mut rung = flag.lock().unwrap();
        while !*rung {
            rung = condvar.wait(rung).unwrap();
        }
        *rung = false;
    }

    fn drain(&self) {
        *self.0.0.lock().unwrap() = false;
    }
}

#[derive(Clone)]
pub struct Notifiers {
    pub own: Notifier,
    pub other: Notifier,
}

impl Notifiers {
    /// Returns the doorbells of the guest and of the host.
    pub fn pair() -> (Notifiers, Notifiers) {
        let notifier = || Notifier(Arc::new((Mutex::new(false), Condvar::new())));
        let (own, other) = (notifier(), notifier());
        let host = Notifiers {
            own: other.clone(),
            other: own.clone(),
        };
        (Notifiers { own, other }, host)
    }
}

impl Events for Notifiers {
    type Error = Infallible;

    fn ring(&mut self) -> Result<(), Infallible> {
        self.other.ring();
        Ok(())
    }

    fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, Infallible> {
        // This sleep always times out before half of the channel is free. The other case is the
        // same as with a wake threshold for room.
        if timeout == Some(HALF) {
            return Ok(false);
        }
        self.own.sleep();
        Ok(true)
    }

    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn can_spin(&self) -> bool {
        false
    }
}

/// The guest's driver. It stores and rings in the order of `guest-driver/hardware.rs` and
/// `device.rs`.
pub struct Driver {
    region: Words,
    /// The end that the guest has.
    end: End,
    host: Notifier,
    page: u64,
}

impl Driver {
    pub fn new(region: &Words, channel: &Channel, notifiers: &Notifiers) -> Self {
        Driver {
            region: region.clone(),
            end: if channel.producer == SLOT {
                End::Producer
            } else {
                End::Consumer
            },
            host: notifiers.other.clone(),
            page: layout(channel).presence_page(SLOT),
        }
    }

    /// Announces the driver, as at its probe.
    pub fn arrive(&self) {
        let old = self.region.load(self.page + presence::EPOCH);
        self.announce(old + if old.is_multiple_of(2) { 1 } else { 2 });
    }

    /// Announces that the driver is unbound. No process of its guest accesses the region any more.
    pub fn leave(&self) {
        self.announce(self.region.load(self.page + presence::EPOCH) + 1);
    }

    fn announce(&self, epoch: u64) {
        self.write(presence::holder(0, self.end), 0);
        self.write(presence::EPOCH, epoch);
        self.host.ring();
    }

    /// Sets the holder of the guest's end; 0 means that no process holds it.
    pub fn hold(&self, holder: u64) {
        self.write(presence::holder(0, self.end), holder);
        self.host.ring();
    }

    fn write(&self, offset: u64, word: u64) {
        // `writeq` also stores after all earlier stores.
        self.region
            .word(self.page + offset)
            .store(word, Ordering::Release);
    }
}

/// The broker. It stores and rings in the order of `backend/src/slot/presence.rs`.
pub struct Broker {
    region: Words,
    /// The end that the host has.
    end: End,
    guest: Notifier,
    host: Notifier,
    driver_page: u64,
}

impl Broker {
    /// Creates a broker that is present.
    pub fn new(region: &Words, channel: &Channel, notifiers: &Notifiers) -> Self {
        let broker = Broker {
            region: region.clone(),
            end: if channel.producer == HOST {
                End::Producer
            } else {
                End::Consumer
            },
            guest: notifiers.other.clone(),
            host: notifiers.own.clone(),
            driver_page: layout(channel).presence_page(SLOT),
        };
        broker.write(presence::EPOCH, 1);
        broker
    }

    /// Announces a new VM.
    pub fn occupy(&self, connection: u64) {
        self.guest.drain();
        self.restart(connection);
    }

    /// Announces a reset of the VM.
    pub fn restart(&self, connection: u64) {
        let epoch = self.region.word(self.driver_page + presence::EPOCH);
        let old = epoch.load(Ordering::Acquire);
        if old % 2 == 1 {
            epoch.store(old + 1, Ordering::Release);
        }
        self.write(presence::CONNECTIONS, connection);
        self.host.ring();
    }

    /// Announces that the VM is gone.
    pub fn vacate(&self) {
        self.write(presence::CONNECTIONS, 0);
        self.host.ring();
    }

    /// Sets the holder of the host's end; 0 means that no process holds it.
    pub fn hold(&self, holder: u64) {
        self.write(presence::holder(0, self.end), holder);
        fence(Ordering::SeqCst);
        let load = |offset| self.region.word(offset).load(Ordering::Acquire);
        let has_driver = load(BROKER_PAGE + presence::CONNECTIONS) != 0
            && load(self.driver_page + presence::EPOCH) % 2 == 1;
        if has_driver {
            self.guest.ring();
        }
    }

    fn write(&self, offset: u64, word: u64) {
        self.region
            .word(BROKER_PAGE + offset)
            .store(word, Ordering::Release);
    }
}

/// Bytes of a record of one word, with its header. Two of them fill the channel.
pub const SPAN: u64 = 32;

/// Commits a record of one word.
pub fn commit(producer: &mut Producer<Memory>, number: u64) {
    let mut room = producer.reserve(8).unwrap();
    room.write(0, &number.to_le_bytes());
    let _ = room.commit(Kind::DATA, 8, 0);
}
