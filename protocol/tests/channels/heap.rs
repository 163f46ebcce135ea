// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A region on the heap, and ends whose doorbells are condition variables. Tests use them in place
//! of a BAR.

use std::cell::Cell;
use std::convert::Infallible;
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{
    BROKER_PAGE, Channel, End, FIRST_FREE, Layout, NO_PEER, Name, Policy, presence,
};
use barlink_protocol::{AtomicU64, Events, Receiver, Sender, state};

pub type Memory = Arc<[AtomicU64]>;
pub type Heap = Region<Memory>;

/// Creates a region with one channel, `test`, from slot 0 to the host. A process holds its end in
/// slot 0.
pub fn region(capacity: u64, drops: bool) -> (Heap, Layout) {
    let policy = if drops { Policy::Drop } else { Policy::Wait };
    region_of(capacity, policy)
}

/// Creates a region as [`region`] does, whose channel has this policy.
pub fn region_of(capacity: u64, policy: Policy) -> (Heap, Layout) {
    let consumer = match policy {
        Policy::Overwrite => NO_PEER,
        Policy::Wait | Policy::Drop => 1,
    };
    let channel = Channel {
        name: Name::new("test").unwrap(),
        producer: 0,
        consumer,
        vector: 0,
        policy,
        offset: FIRST_FREE,
        capacity,
    };
    let size = (channel.end() + 4096).next_power_of_two();
    let layout = Layout::new(size, 1, 1, channel.end(), 0, &[channel]).unwrap();
    let region = Region::new((0..size / 8).map(|_| AtomicU64::new(0)).collect());
    state::publish(&region, &layout);
    region.store(BROKER_PAGE + presence::CONNECTIONS, 1);
    region.store(layout.presence_page(0) + presence::EPOCH, 1);
    hold(&region, &layout, 1);
    assert_eq!(state::read_layout(&region, size), Ok(layout.clone()));
    (region, layout)
}

/// Writes the holder of the channel's end in slot 0 into the driver's page; 0 means that no process
/// holds it.
pub fn hold(region: &Heap, layout: &Layout, holder: u64) {
    let word = presence::holder(0, End::Producer);
    region.store(layout.presence_page(0) + word, holder);
}

/// Resets a channel whose ends are free, or are not.
pub fn reset(region: &Heap, entry: &Channel, are_free: bool) -> Option<u64> {
    state::reset(region, entry, 0, Duration::MAX, || are_free, drop)
}

/// An end's clock, which the test sets, and doorbells without effect.
pub struct Clock(pub Rc<Cell<Duration>>);

impl Events for Clock {
    type Error = Infallible;

    fn ring(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    fn sleep(&mut self, _: Option<Duration>) -> Result<bool, Infallible> {
        Ok(false)
    }

    fn now(&self) -> Duration {
        self.0.get()
    }

    fn can_spin(&self) -> bool {
        false
    }
}

#[derive(Default)]
struct State {
    rung: bool,
    /// Whether the end is in a sleep that is not a back-off sleep.
    asleep: bool,
}

#[derive(Clone, Default)]
struct Notifier(Arc<(Mutex<State>, Condvar)>);

/// The doorbells of one end.
pub struct Notifiers {
    own: Notifier,
    other: Notifier,
    start: Instant,
    /// Number of rings so far.
    pub rung: u32,
    /// Number of rings still to be lost on their way, as if QEMU were not ready.
    pub lost: u32,
}

/// The shortest sleep that is not a back-off sleep. In back-off sleeps an end is not rung for each
/// record.
const SLEEP: Duration = Duration::from_millis(1);
/// Time limit of every wait: longer than any step takes on a busy machine.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Returns the number of rounds of a loop that is repeated for depth: `full` if `BARLINK_TIER` is
/// `soak`, and otherwise `brief`.
pub fn rounds(brief: u32, full: u32) -> u32 {
    match std::env::var("BARLINK_TIER") {
        Ok(tier) if tier == "soak" => full,
        _ => brief,
    }
}

/// Waits until a condition holds, which an end in another thread makes true.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < TIMEOUT, "not within {TIMEOUT:?}: {what}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

impl Notifiers {
    /// Returns a function that tells whether this end sleeps and has not been rung yet.
    pub fn sleeper(&self) -> impl Fn() -> bool + Send + 'static {
        let own = self.own.clone();
        move || {
            let state = own.0.0.lock().unwrap();
            state.asleep && !state.rung
        }
    }
}

pub fn notifiers() -> (Notifiers, Notifiers) {
    let (a, b) = (Notifier::default(), Notifier::default());
    let start = Instant::now();
    let one = |own: &Notifier, other: &Notifier| Notifiers {
        own: own.clone(),
        other: other.clone(),
        start,
        rung: 0,
        lost: 0,
    };
    (one(&a, &b), one(&b, &a))
}

impl Events for Notifiers {
    type Error = Infallible;

    fn ring(&mut self) -> Result<(), Infallible> {
        self.rung += 1;
        if self.lost > 0 {
            self.lost -= 1;
            return Ok(());
        }
        self.other.0.0.lock().unwrap().rung = true;
        self.other.0.1.notify_one();
        Ok(())
    }

    fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, Infallible> {
        // This limit also ends the wait for an end that has failed.
        let age = self.start.elapsed();
        assert!(age < 2 * TIMEOUT, "this channel is used for too long");
        let (state, condvar) = &*self.own.0;
        let limit = timeout.unwrap_or(TIMEOUT);
        let mut guard = state.lock().unwrap();
        guard.asleep = limit >= SLEEP;
        let slept = condvar.wait_timeout_while(guard, limit, |state| !state.rung);
        let (mut state, _) = slept.unwrap();
        state.asleep = false;
        let rung = std::mem::take(&mut state.rung);
        drop(state);
        // A lost wake-up must show as a failure and not as a hang.
        assert!(rung || timeout.is_some(), "not rung within {TIMEOUT:?}");
        Ok(rung)
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn can_spin(&self) -> bool {
        true
    }
}

/// Creates a channel and both its ends.
pub fn ends(
    capacity: u64,
    drops: bool,
) -> (Sender<Memory, Notifiers>, Receiver<Memory, Notifiers>) {
    let (region, layout) = region(capacity, drops);
    let (a, b) = notifiers();
    ends_with(&region, &layout, a, b)
}

/// Attaches both ends to an existing channel.
pub fn ends_with(
    region: &Heap,
    layout: &Layout,
    a: Notifiers,
    b: Notifiers,
) -> (Sender<Memory, Notifiers>, Receiver<Memory, Notifiers>) {
    let sender = Sender::attach(region.clone(), layout, 0, a).unwrap();
    (
        sender,
        Receiver::attach(region.clone(), layout, 0, b).unwrap(),
    )
}
