// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The times for which an end spins and sleeps in its back-off. The clock advances only when the
//! end reads it or sleeps. The other end is a script.

use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

use crate::heap::{Memory, region};
use barlink_protocol::cursor::Kind;
use barlink_protocol::{
    ChannelError, Consumer, Events, Notify, Producer, Receiver, Sender, Sent, Strategy, Wakeup,
};

const MICROSECOND: Duration = Duration::from_micros(1);
/// A record with this payload takes 64 bytes with its header, and 64 such records fill the channel.
const PAYLOAD: [u8; 40] = [0; 40];

/// The end that is a script.
enum Other {
    Producer(Producer<Memory>),
    Consumer(Consumer<Memory>),
}

impl Other {
    /// Commits or releases a record, if that is possible, and returns whether the end must then
    /// ring.
    fn go_on(&mut self) -> Option<Notify> {
        match self {
            Other::Producer(producer) => {
                let mut room = producer.reserve(PAYLOAD.len()).ok()?;
                room.write(0, &PAYLOAD);
                Some(room.commit(Kind::DATA, PAYLOAD.len() as u32, 0).unwrap().0)
            }
            Other::Consumer(consumer) => {
                if !consumer.poll().unwrap() {
                    return None;
                }
                consumer.advance();
                Some(consumer.release().unwrap())
            }
        }
    }
}

/// The other end, and the clock of the tested end.
struct World {
    now: Duration,
    other: Other,
    /// Time of the other end's next action, and the time between its actions.
    due: Duration,
    pace: Duration,
    /// Number of its actions that were impossible.
    stuck: u32,
    /// Number of its rings.
    rings: u32,
    /// The tested end's number of sleeps, the longest timeout of a sleep, and the last timeout.
    sleeps: u32,
    longest: Duration,
    last: Option<Duration>,
    /// Whether a ring ends a sleep of the tested end.
    can_wake: bool,
}

impl World {
    /// Runs all actions that are due, and returns whether one of them rings.
    fn go_on(&mut self) -> bool {
        let before = self.rings;
        while self.due <= self.now {
            self.due = self.due.saturating_add(self.pace);
            match self.other.go_on() {
                Some(notify) => self.rings += u32::from(notify == Notify::Ring),
                None => self.stuck += 1,
            }
        }
        self.rings > before
    }
}

#[derive(Clone)]
struct Script(Rc<RefCell<World>>);

impl Events for Script {
    type Error = Infallible;

    fn ring(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, Infallible> {
        let mut world = self.0.borrow_mut();
        world.sleeps += 1;
        world.longest = world.longest.max(timeout.unwrap_or(Duration::MAX));
        world.last = timeout;
        let end = world.now + timeout.unwrap_or(Duration::from_secs(1));
        while world.now < end {
            world.now += MICROSECOND;
            if world.go_on() && world.can_wake {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn now(&self) -> Duration {
        let mut world = self.0.borrow_mut();
        world.now += MICROSECOND;
        world.go_on();
        world.now
    }

    fn can_spin(&self) -> bool {
        true
    }

    fn can_wake(&self) -> bool {
        self.0.borrow().can_wake
    }
}

impl Script {
    fn of(other: Other) -> Script {
        Script(Rc::new(RefCell::new(World {
            now: Duration::ZERO,
            other,
            due: Duration::MAX,
            pace: Duration::MAX,
            stuck: 0,
            rings: 0,
            sleeps: 0,
            longest: Duration::ZERO,
            last: None,
            can_wake: true,
        })))
    }

    /// Schedules the other end's next action after `begins`, and further actions at this pace.
    fn goes_on(&self, begins: Duration, pace: Duration) {
        let mut world = self.0.borrow_mut();
        world.due = world.now + begins;
        world.pace = pace;
    }
}

/// Returns a receiver with this strategy, and the script of its producer.
fn receiver(strategy: Strategy) -> (Receiver<Memory, Script>, Script) {
    let (region, layout) = region(4096, false);
    let producer = Producer::attach(region.clone(), &layout.channels()[0]).unwrap();
    let script = Script::of(Other::Producer(producer));
    let mut receiver = Receiver::attach(region, &layout, 0, script.clone()).unwrap();
    receiver.set_strategy(strategy);
    (receiver, script)
}

/// Returns a sender with this strategy, whose channel is full, and the script of its consumer.
fn sender(strategy: Strategy) -> (Sender<Memory, Script>, Script) {
    let (region, layout) = region(4096, false);
    let consumer = Consumer::attach(region.clone(), &layout.channels()[0]).unwrap();
    let script = Script::of(Other::Consumer(consumer));
    let mut sender = Sender::attach(region, &layout, 0, script.clone()).unwrap();
    sender.set_strategy(strategy);
    // No attempt fails, because a failed attempt would arm a wake-up.
    for _ in 0..64 {
        assert_eq!(send(&mut sender), Sent::Committed);
    }
    (sender, script)
}

fn send(sender: &mut Sender<Memory, Script>) -> Sent {
    sender.send(Kind::DATA, &PAYLOAD, None).unwrap()
}

/// Waits `count` times for a record that is committed after `delay`. Returns the number of sleeps,
/// and the total time of spinning.
fn waits(count: u32, delay: Duration) -> (u32, Duration) {
    let (mut receiver, script) = receiver(Strategy::PROMPT);
    let mut spun = Duration::ZERO;
    for _ in 0..count {
        script.goes_on(delay, Duration::MAX);
        let (start, sleeps) = {
            let world = script.0.borrow();
            (world.now, world.sleeps)
        };
        assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
        receiver.release().unwrap();
        let world = script.0.borrow();
        let slept = if world.sleeps > sleeps {
            delay
        } else {
            Duration::ZERO
        };
        spun += (world.now - start).saturating_sub(slept);
    }
    (script.0.borrow().sleeps, spun)
}

#[test]
fn end_keeps_probing_whether_spinning_pays() {
    // The delay is longer than the first spin, and shorter than the longest.
    let (sleeps, _) = waits(100, 20 * MICROSECOND);
    assert_eq!(sleeps, 7, "it takes one wait of eight to find out");
    // The delay is longer than the longest spin.
    let (sleeps, spun) = waits(800, 500 * MICROSECOND);
    assert_eq!(sleeps, 800);
    assert!(spun < 800 * 12 * MICROSECOND, "it spun for {spun:?}");
}

/// Start times of the other end, in microseconds, within the third back-off sleep. The whole
/// channel would fill or drain in less time than this sleep takes.
const IN_A_BACK_OFF: [u32; 3] = [310, 330, 350];

#[test]
fn producer_rings_back_off_sleeper_before_waiting() {
    let (mut receiver, script) = receiver(Strategy::STREAM);
    for begins in IN_A_BACK_OFF {
        script.goes_on(begins * MICROSECOND, 3 * MICROSECOND);
        for _ in 0..32 {
            assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
            receiver.release().unwrap();
        }
        script.0.borrow_mut().due = Duration::MAX;
        // These records came in the meantime.
        while receiver.wait(Some(Duration::ZERO)) == Ok(Wakeup::Ready) {
            receiver.release().unwrap();
        }
    }
    let world = script.0.borrow();
    assert_eq!((world.stuck, world.rings), (0, 3));
}

#[test]
fn consumer_rings_back_off_sleeper_before_waiting() {
    for begins in IN_A_BACK_OFF {
        let (mut sender, script) = sender(Strategy::STREAM);
        script.goes_on(begins * MICROSECOND, 3 * MICROSECOND);
        assert_eq!(send(&mut sender), Sent::Committed);
        let world = script.0.borrow();
        assert_eq!((world.stuck, world.rings), (0, 1));
    }
}

#[test]
fn awake_consumer_gets_no_back_off_ring() {
    let (mut receiver, script) = receiver(Strategy::STREAM);
    // Some records come during the first back-off sleep, and then one at each read of the clock.
    script.goes_on(80 * MICROSECOND, MICROSECOND);
    for _ in 0..1000 {
        assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
        receiver.release().unwrap();
    }
    let world = script.0.borrow();
    assert_eq!((world.sleeps, world.rings, world.stuck), (1, 0, 0));
}

#[test]
fn awake_producer_gets_no_back_off_ring() {
    let (mut sender, script) = sender(Strategy::STREAM);
    script.goes_on(80 * MICROSECOND, MICROSECOND);
    for _ in 0..1000 {
        assert_eq!(send(&mut sender), Sent::Committed);
    }
    let world = script.0.borrow();
    assert_eq!((world.sleeps, world.rings, world.stuck), (1, 0, 0));
}

/// Shows that such an end looks as often in each wait as in the first one.
#[test]
fn end_without_interrupts_arms_no_wake_up() {
    let late = 20_000 * MICROSECOND;
    for strategy in [Strategy::SLEEP, Strategy::PROMPT, Strategy::STREAM] {
        let (mut receiver, script) = receiver(strategy);
        script.0.borrow_mut().can_wake = false;
        for _ in 0..3 {
            script.goes_on(late, Duration::MAX);
            assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
            receiver.release().unwrap();
            let last = script.0.borrow().last;
            assert!(last < Some(late), "{strategy:?}: {last:?}");
        }
        assert_eq!(receiver.wait(Some(Duration::ZERO)), Ok(Wakeup::TimedOut));
        script.goes_on(late, Duration::MAX);
        assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
        assert_eq!(script.0.borrow().rings, 0, "{strategy:?}");

        let (mut sender, script) = sender(strategy);
        script.0.borrow_mut().can_wake = false;
        script.goes_on(late, MICROSECOND);
        for _ in 0..64 {
            assert_eq!(send(&mut sender), Sent::Committed);
        }
        assert_eq!(script.0.borrow().rings, 0, "{strategy:?}");
    }
}

#[test]
fn back_off_sleeps_grow_to_a_limit() {
    let (mut receiver, script) = receiver(Strategy::STREAM);
    let waited = receiver.wait(Some(5000 * MICROSECOND));
    assert_eq!(waited, Ok(Wakeup::TimedOut));
    let world = script.0.borrow();
    assert_eq!(world.longest, 800 * MICROSECOND);
    assert!(world.sleeps > 6, "{} sleeps", world.sleeps);
}

/// Shows that back-off sleeps, in which nothing comes, end with the second long wait, and begin
/// again with the first short one.
#[test]
fn receiver_of_slow_stream_sleeps_once() {
    let (mut receiver, script) = receiver(Strategy::STREAM);
    let mut receive = |records: u32| {
        let (sleeps, rings) = {
            let world = script.0.borrow();
            (world.sleeps, world.rings)
        };
        for _ in 0..records {
            assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
            receiver.release().unwrap();
        }
        let world = script.0.borrow();
        (world.sleeps - sleeps, world.rings - rings)
    };
    let pace = 20_000 * MICROSECOND;
    script.goes_on(pace, pace);
    receive(4);
    assert_eq!(receive(50), (50, 50));
    let pace = 200 * MICROSECOND;
    script.goes_on(pace, pace);
    let (_, rings) = receive(50);
    assert_eq!(rings, 1);
}

/// Shows that the pause between two frames is no slow stream: only the first record of a frame
/// rings.
#[test]
fn pauses_of_fast_stream_keep_back_off() {
    let (mut receiver, script) = receiver(Strategy::STREAM);
    for _ in 0..50 {
        script.goes_on(20_000 * MICROSECOND, 200 * MICROSECOND);
        for _ in 0..4 {
            assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
            receiver.release().unwrap();
        }
    }
    let world = script.0.borrow();
    assert_eq!((world.rings, world.stuck), (50, 0));
}

/// Shows that a ring during a back-off sleep does not prove that doorbells arrive, because it may
/// be a ring that this end did not ask for.
#[test]
fn back_off_ring_does_not_prove_doorbells() {
    let (mut receiver, script) = receiver(Strategy::STREAM);
    script.goes_on(310 * MICROSECOND, 3 * MICROSECOND);
    assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
    script.0.borrow_mut().due = Duration::MAX;
    while receiver.wait(Some(Duration::ZERO)) == Ok(Wakeup::Ready) {
        receiver.release().unwrap();
    }
    assert_eq!(script.0.borrow().rings, 1);
    // The end goes to sleep, and still uses the fallback poll.
    script.goes_on(10_000 * MICROSECOND, Duration::MAX);
    assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
    assert!(script.0.borrow().last.is_some());
    // That ring came during a normal sleep, so the end relies on rings from now on.
    receiver.release().unwrap();
    script.goes_on(10_000 * MICROSECOND, Duration::MAX);
    assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
    assert_eq!(script.0.borrow().last, None);
}

/// Shows that a producer is rung as soon as its record fits. A consumer that keeps more than half
/// of the channel may wait for this very producer, so a ring at half of the channel would never
/// come.
#[test]
fn consumer_rings_producer_once_record_fits() {
    for strategy in [Strategy::SLEEP, Strategy::PROMPT, Strategy::STREAM] {
        let (mut sender, script) = sender(strategy);
        // The consumer starts late, so that the sender sleeps and is rung, and relies on rings from
        // then on.
        script.goes_on(20_000 * MICROSECOND, MICROSECOND);
        assert_eq!(send(&mut sender), Sent::Committed);
        script.0.borrow_mut().due = Duration::MAX;
        while sender.send(Kind::DATA, &PAYLOAD, Some(Duration::ZERO)) == Ok(Sent::Committed) {}
        let start = script.0.borrow().now;
        script.goes_on(20_000 * MICROSECOND, Duration::MAX);
        assert_eq!(send(&mut sender), Sent::Committed);
        let world = script.0.borrow();
        assert_eq!(world.last, None, "it relies on rings");
        let took = world.now - start;
        assert!(took < 21_000 * MICROSECOND, "{strategy:?}: {took:?}");
    }
}

#[test]
fn slow_consumer_rings_once_per_half_channel() {
    let (mut sender, script) = sender(Strategy::SLEEP);
    // Half of the channel is free before the sender lowers its wake threshold.
    script.goes_on(10 * MICROSECOND, 30 * MICROSECOND);
    for _ in 0..1000 {
        assert_eq!(send(&mut sender), Sent::Committed);
    }
    let rings = script.0.borrow().rings;
    assert!((28..=34).contains(&rings), "{rings} rings for 1000 records");
}

/// Shows that a look without a wait consumes a ring. A program that waits for several sources polls
/// a descriptor, which stays readable until the ring is consumed.
#[test]
fn zero_timeout_wait_consumes_ring() {
    let (mut receiver, script) = receiver(Strategy::PROMPT);
    let looked = receiver.wait(Some(Duration::ZERO));
    assert_eq!(looked, Ok(Wakeup::TimedOut));
    let world = script.0.borrow();
    assert_eq!((world.sleeps, world.last), (1, Some(Duration::ZERO)));
}

#[test]
fn wait_accepts_endless_durations() {
    let (mut receiver, script) = receiver(Strategy {
        least_spin: Duration::MAX,
        most_spin: Duration::MAX,
        back_off: Duration::MAX,
    });
    for _ in 0..2 {
        script.goes_on(900 * MICROSECOND, Duration::MAX);
        assert_eq!(receiver.wait(Some(Duration::MAX)), Ok(Wakeup::Ready));
        receiver.release().unwrap();
    }
    assert_eq!(script.0.borrow().sleeps, 0);
    receiver.set_strategy(Strategy {
        most_spin: Duration::ZERO,
        back_off: Duration::MAX,
        ..Strategy::SPIN
    });
    script.goes_on(10_000 * MICROSECOND, Duration::MAX);
    assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
    assert_eq!(script.0.borrow().longest, 800 * MICROSECOND);
}

/// The events of a device that goes at some time.
#[derive(Clone)]
struct Leaving {
    script: Script,
    gone_at: Duration,
}

impl Events for Leaving {
    type Error = Duration;

    fn ring(&mut self) -> Result<(), Duration> {
        Ok(())
    }

    fn sleep(&mut self, _timeout: Option<Duration>) -> Result<bool, Duration> {
        panic!("it slept")
    }

    fn now(&self) -> Duration {
        self.script.now()
    }

    fn check_device(&self) -> Result<(), Duration> {
        match self.script.0.borrow().now {
            now if now >= self.gone_at => Err(now),
            _ => Ok(()),
        }
    }

    fn can_spin(&self) -> bool {
        true
    }
}

/// An access to the memory of a device that is gone would end the process.
#[test]
fn spinning_end_notices_removal() {
    let (region, layout) = region(4096, false);
    let producer = Producer::attach(region.clone(), &layout.channels()[0]).unwrap();
    let gone_at = 5_000 * MICROSECOND;
    let leaving = Leaving {
        script: Script::of(Other::Producer(producer)),
        gone_at,
    };
    let mut receiver = Receiver::attach(region, &layout, 0, leaving).unwrap();
    receiver.set_strategy(Strategy::SPIN);
    match receiver.wait(None) {
        Err(ChannelError::Device(now)) => assert!(now <= gone_at + 101 * MICROSECOND, "{now:?}"),
        woken => panic!("{woken:?}"),
    }
}
