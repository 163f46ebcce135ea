//! How long an end spins and naps, by a clock that stands still unless somebody looks at it or sleeps.

use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

use crate::heap::{Memory, region};
use barlink_protocol::cursor::Kind;
use barlink_protocol::{Events, Notify, Producer, Receiver, Strategy, Wakeup};

const MICROSECOND: Duration = Duration::from_micros(1);
/// Records of this payload are of 64 bytes with their headers, and 64 of them fill the channel.
const PAYLOAD: [u8; 40] = [0; 40];

/// The producer, as a script, and the consumer's clock.
struct World {
    now: Duration,
    producer: Producer<Memory>,
    /// When it commits its next record, and how long it then takes for a further one.
    due: Duration,
    pace: Duration,
    /// Records that found no room.
    full: u32,
    /// Its rings, and the consumer's sleeps.
    rings: u32,
    sleeps: u32,
}

impl World {
    /// Commits what is due by now: whether it rings.
    fn go_on(&mut self) -> bool {
        let before = self.rings;
        while self.due <= self.now {
            self.due = self.due.saturating_add(self.pace);
            match self.producer.reserve(PAYLOAD.len()) {
                Ok(mut room) => {
                    room.write(0, &PAYLOAD);
                    let (notify, _) = room.commit(Kind::DATA, PAYLOAD.len() as u32, 0);
                    self.rings += u32::from(notify == Notify::Ring);
                }
                Err(_) => self.full += 1,
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
        let end = world.now + timeout.unwrap_or(Duration::from_secs(1));
        while world.now < end {
            world.now += MICROSECOND;
            if world.go_on() {
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
}

/// A consumer that waits so, and its producer.
fn receiver(strategy: Strategy) -> (Receiver<Memory, Script>, Script) {
    let (region, layout) = region(4096, false);
    let world = World {
        now: Duration::ZERO,
        producer: Producer::attach(region.clone(), &layout.channels()[0]).unwrap(),
        due: Duration::MAX,
        pace: Duration::MAX,
        full: 0,
        rings: 0,
        sleeps: 0,
    };
    let script = Script(Rc::new(RefCell::new(world)));
    let mut receiver = Receiver::attach(region, &layout, 0, script.clone()).unwrap();
    receiver.set_strategy(strategy);
    (receiver, script)
}

/// Waits for a record so many times, each committed so long after it is waited for: how often it slept, and for how long it
/// spun in all.
fn waits(count: u32, delay: Duration) -> (u32, Duration) {
    let (mut receiver, script) = receiver(Strategy::PROMPT);
    let mut spun = Duration::ZERO;
    for _ in 0..count {
        let (start, sleeps) = {
            let mut world = script.0.borrow_mut();
            world.due = world.now + delay;
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
fn an_end_finds_out_again_and_again_whether_spinning_pays() {
    // Longer than it spins at first, and shorter than it may.
    let (sleeps, _) = waits(100, 20 * MICROSECOND);
    assert_eq!(sleeps, 7, "it takes one wait of eight to find out");
    // Longer than it may spin.
    let (sleeps, spun) = waits(800, 500 * MICROSECOND);
    assert_eq!(sleeps, 800);
    assert!(spun < 800 * 12 * MICROSECOND, "it spun for {spun:?}");
}

#[test]
fn an_end_that_naps_is_rung_before_the_other_one_has_to_wait() {
    let (mut receiver, script) = receiver(Strategy::STREAM);
    // The first comes during the third nap, which would be longer than it takes to fill the channel.
    let pace = 3 * MICROSECOND;
    for begins in [310, 330, 350].map(Duration::from_micros) {
        {
            let mut world = script.0.borrow_mut();
            world.due = world.now + begins;
            world.pace = pace;
        }
        for _ in 0..32 {
            assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
            receiver.release().unwrap();
        }
        script.0.borrow_mut().due = Duration::MAX;
        // What came in the meantime.
        while receiver.wait(Some(Duration::ZERO)) == Ok(Wakeup::Ready) {
            receiver.release().unwrap();
        }
    }
    let world = script.0.borrow();
    assert_eq!((world.full, world.rings), (0, 3));
}

#[test]
fn an_end_that_is_awake_again_is_not_rung_for_its_nap() {
    let (mut receiver, script) = receiver(Strategy::STREAM);
    {
        let mut world = script.0.borrow_mut();
        // Some come during the first nap, and then one at each look at the clock.
        world.due = world.now + 80 * MICROSECOND;
        world.pace = MICROSECOND;
    }
    for _ in 0..1000 {
        assert_eq!(receiver.wait(None), Ok(Wakeup::Ready));
        receiver.release().unwrap();
    }
    let world = script.0.borrow();
    assert_eq!((world.sleeps, world.rings, world.full), (1, 0, 0));
}
