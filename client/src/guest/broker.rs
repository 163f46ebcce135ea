// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The question whether the broker is alive (`docs/protocol.md`, section 3). A guest whose broker
//! was killed, and started anew with another region, streams into memory that no other process has.
//!
//! A program asks when it begins to watch, and an end asks once for each sleep that is longer than
//! a second. A question or its ring can be lost, and a busy host is slow, so each is repeated, and
//! only a broker that has not answered for ten seconds is silent. Without a driver, a question
//! needs the lock of the presence page: a question that was not asked says nothing about the
//! broker.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use barlink_protocol::wire::layout::{BROKER_PAGE, Layout, PAGE_SIZE, presence};
use rustix::io::Errno;

use crate::event_error::EventError;
use crate::guest::direct::LOCK_TIMEOUT;
use crate::guest::interface::Interface;
use crate::memory::RingRegion;

/// Length of a sleep before the end asks.
const SLEEP: Duration = Duration::from_secs(1);
/// Times after the first question at which it is repeated: after one, two and four seconds.
const REPEATED: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(7),
];
/// Time without an answer after which the broker is silent.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// First and longest pause between two looks for an answer.
const LOOK: Duration = Duration::from_millis(1);
const LONGEST_LOOK: Duration = Duration::from_millis(100);
/// Two sleeps with less time between them are parts of one wait, unless the second is shorter.
const GAP: Duration = Duration::from_millis(50);
/// Time after which an end that polls asks again. Its waits cannot be told apart.
const POLLING: Duration = Duration::from_secs(60);

/// The next step of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Ask.
    Ask,
    /// Look again after this time at the latest.
    Wait(Duration),
    /// The broker has not answered within [`ANSWER_TIMEOUT`].
    Unanswered,
}

/// The course of one question, by a clock that the caller reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Course {
    /// Time of the first question.
    first: Option<Duration>,
    /// Number of repetitions.
    repeated: usize,
}

impl Course {
    /// Returns the next step at the time `now`, if there is no answer.
    fn step(&self, now: Duration) -> Step {
        let Some(first) = self.first else {
            return Step::Ask;
        };
        let passed = now.saturating_sub(first);
        match REPEATED.get(self.repeated) {
            Some(at) if passed >= *at => Step::Ask,
            _ if passed >= ANSWER_TIMEOUT => Step::Unanswered,
            Some(at) => Step::Wait(*at - passed),
            None => Step::Wait(ANSWER_TIMEOUT - passed),
        }
    }

    /// Notes that a question was asked at the time `now`.
    fn asked(&mut self, now: Duration) {
        match self.first {
            None => self.first = Some(now),
            Some(_) => self.repeated += 1,
        }
    }
}

/// Asks whether the broker is alive. A device and its ends share this value.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    interface: Interface,
    region: RingRegion,
    /// Offset of the answer word.
    answer: u64,
    /// Offset of the broker's own epoch, if that is mapped.
    epoch: Option<u64>,
    unanswered: Arc<Unanswered>,
}

/// Whether the last question had no answer.
#[derive(Debug, Default)]
struct Unanswered {
    is_set: Mutex<bool>,
    changed: Condvar,
}

impl Unanswered {
    fn set(&self, is_set: bool) {
        let mut state = self.is_set.lock().unwrap_or_else(PoisonError::into_inner);
        *state = is_set;
        self.changed.notify_all();
    }
}

impl Asker {
    /// Creates an asker for the device of a slot. The interface must be open for writing.
    pub(crate) fn new(
        interface: Interface,
        region: RingRegion,
        layout: &Layout,
        slot: u32,
    ) -> Self {
        let page = layout.presence_page(layout.host());
        let is_mapped = page + PAGE_SIZE <= region.size();
        Asker {
            interface,
            region,
            answer: BROKER_PAGE + presence::ANSWERS + 8 * u64::from(slot),
            epoch: is_mapped.then_some(page + presence::EPOCH),
            unanswered: Arc::default(),
        }
    }

    /// Returns whether the broker has ended in good order: its epoch is even then. The epoch is in
    /// the device's memory, so a device that is gone cannot tell.
    pub(crate) fn has_ended(&self) -> bool {
        if self.interface.wait_until_gone(Some(Duration::ZERO)) != Ok(false) {
            return false;
        }
        let epoch = self.epoch.map_or(0, |epoch| self.region.load(epoch));
        epoch != 0 && epoch.is_multiple_of(2)
    }

    /// Asks once. Returns the number of the question.
    fn ask(&self) -> Result<u64, Errno> {
        self.interface.ask()
    }

    /// Returns whether a question was answered: by its own number, or by that of a later one. The
    /// answer is in the device's memory, so the device must still be there.
    fn is_answered(&self, question: u64) -> Result<bool, Errno> {
        if self.interface.wait_until_gone(Some(Duration::ZERO))? {
            return Err(Errno::NODEV);
        }
        let answer = self.region.load(self.answer);
        Ok(answer.wrapping_sub(question) < 1 << 63)
    }

    /// Returns whether the device has lost its region, which then has no answers.
    pub(crate) fn has_lost_region(&self) -> bool {
        let checked = self.interface.check(&self.region);
        checked.is_err_and(|error| matches!(error, EventError::Lost))
    }

    /// Asks until there is an answer, or the broker is silent. Returns whether there is one. The
    /// error is EBUSY if another program keeps the lock for [`LOCK_TIMEOUT`].
    pub(crate) fn wait_for_answer(&self) -> Result<bool, Errno> {
        let start = Instant::now();
        let (mut course, mut question) = (Course::default(), None);
        let mut pause = LOOK;
        // Time since which another program has the lock.
        let mut locked = None;
        loop {
            if let Some(question) = question
                && self.is_answered(question)?
            {
                self.unanswered.set(false);
                return Ok(true);
            }
            if self.has_lost_region() {
                return Ok(false);
            }
            let now = start.elapsed();
            let longest = match course.step(now) {
                Step::Ask => match self.ask() {
                    Ok(number) => {
                        course.asked(now);
                        (question, locked) = (Some(number), None);
                        continue;
                    }
                    Err(Errno::BUSY) if now - *locked.get_or_insert(now) < LOCK_TIMEOUT => {
                        LONGEST_LOOK
                    }
                    Err(error) => return Err(error),
                },
                Step::Wait(longest) => longest,
                Step::Unanswered => {
                    self.unanswered.set(true);
                    return Ok(false);
                }
            };
            self.interface.wait_until_gone(Some(pause.min(longest)))?;
            pause = (pause * 2).min(LONGEST_LOOK);
        }
    }

    /// Waits until an end has found that the broker is silent. Meanwhile this keeps no device open,
    /// so that a program without driver ends its epoch when it ends.
    pub(crate) fn wait_until_unanswered(self) {
        let unanswered = Arc::clone(&self.unanswered);
        drop(self);
        let guard = unanswered.is_set.lock();
        let guard = guard.unwrap_or_else(PoisonError::into_inner);
        let changed = unanswered.changed.wait_while(guard, |is_set| !*is_set);
        drop(changed.unwrap_or_else(PoisonError::into_inner));
    }
}

/// The questions of one end, which it asks while it sleeps.
#[derive(Debug)]
pub(crate) struct SleepQuestions {
    asker: Asker,
    /// The wait that the next sleep can be a part of.
    wait: Option<Wait>,
    course: Course,
    question: Option<u64>,
    /// Whether this wait needs no further question.
    is_done: bool,
}

/// Sleeps that follow each other.
#[derive(Clone, Copy, Debug)]
struct Wait {
    begin: Instant,
    /// The end of the last sleep.
    end: Instant,
    /// The longest time of the last sleep.
    timeout: Duration,
}

impl Wait {
    /// Returns whether a sleep with this timeout is a part of the wait. An end sleeps for longer
    /// each time while it finds nothing, and begins with a short sleep when it has found something.
    fn goes_on(&self, now: Instant, timeout: Duration) -> bool {
        now.saturating_duration_since(self.end) < GAP
            && timeout >= self.timeout
            && now.saturating_duration_since(self.begin) < POLLING
    }
}

impl SleepQuestions {
    pub(crate) fn new(asker: Asker) -> Self {
        SleepQuestions {
            asker,
            wait: None,
            course: Course::default(),
            question: None,
            is_done: false,
        }
    }

    /// Notes that a sleep of at most this time begins, `None` for one without a limit.
    pub(crate) fn begin(&mut self, now: Instant, timeout: Option<Duration>) {
        let timeout = timeout.unwrap_or(Duration::MAX);
        if let Some(wait) = self.wait.as_mut().filter(|it| it.goes_on(now, timeout)) {
            wait.timeout = timeout;
            return;
        }
        self.end();
        self.wait = Some(Wait {
            begin: now,
            end: now,
            timeout,
        });
    }

    /// Does the next step of the questions within a sleep. Returns the time until the next such
    /// call, `None` if there is nothing more to do in this wait.
    pub(crate) fn step(&mut self, now: Instant) -> Option<Duration> {
        if self.is_done {
            return None;
        }
        let slept = now.saturating_duration_since(self.wait?.begin);
        if slept < SLEEP {
            return Some(SLEEP - slept);
        }
        loop {
            let answered = self.question.map(|it| self.asker.is_answered(it));
            let step = match answered {
                Some(Ok(true)) => None,
                Some(Ok(false)) | None => Some(self.course.step(slept)),
                // The end learns elsewhere that its device is gone.
                Some(Err(_)) => break,
            };
            match step {
                Some(Step::Wait(time)) => return Some(time),
                Some(Step::Ask) => match self.asker.ask() {
                    Ok(question) => {
                        self.course.asked(slept);
                        self.question = Some(question);
                    }
                    // Another program has the lock.
                    Err(Errno::BUSY) => return Some(LONGEST_LOOK),
                    // The driver does not know the call, or the end learns elsewhere that its
                    // device is gone.
                    Err(_) => break,
                },
                Some(Step::Unanswered) => {
                    self.asker.unanswered.set(true);
                    break;
                }
                None => {
                    self.asker.unanswered.set(false);
                    break;
                }
            }
        }
        self.is_done = true;
        None
    }

    /// Notes the end of a sleep. A ring ends the wait.
    pub(crate) fn slept(&mut self, now: Instant, was_rung: bool) {
        match &mut self.wait {
            Some(wait) if !was_rung => wait.end = now,
            _ => self.end(),
        }
    }

    fn end(&mut self) {
        self.wait = None;
        self.course = Course::default();
        self.question = None;
        self.is_done = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::direct::sysfs::tests::Fake;

    /// Returns an asker for the device of slot 1, which needs the lock of its page.
    fn asker(fake: &Fake) -> Asker {
        let opened = fake.open_for_writing();
        let layout = opened.session.layout();
        let region = opened.mapping.region();
        Asker::new(Interface::Direct(opened.session), region, &layout, 1)
    }

    #[test]
    fn locked_page_only_delays_question() {
        let fake = Fake::new();
        let asker = asker(&fake);
        let lock = fake.lock();
        std::thread::scope(|scope| {
            let answered = scope.spawn(|| asker.wait_for_answer());
            // Longer than the second after which a question is repeated.
            std::thread::sleep(Duration::from_millis(1100));
            assert_eq!(fake.answer(), 0, "nothing was asked");
            drop(lock);
            let start = Instant::now();
            while fake.answer() == 0 {
                assert!(start.elapsed() < Duration::from_secs(1));
                std::thread::sleep(LOOK);
            }
            assert_eq!(answered.join().unwrap(), Ok(true));
        });
    }

    #[test]
    fn stalled_lock_is_no_silence() {
        let fake = Fake::new();
        let asker = asker(&fake);
        let _lock = fake.lock();
        assert_eq!(asker.wait_for_answer(), Err(Errno::BUSY));
        assert!(!*asker.unanswered.is_set.lock().unwrap());
    }

    #[test]
    fn sleeping_end_asks_once_lock_is_free() {
        let fake = Fake::new();
        let mut questions = SleepQuestions::new(asker(&fake));
        let lock = fake.lock();
        let begin = Instant::now();
        questions.begin(begin, None);
        // Longer than the time after which a question without an answer is silence.
        for second in 1..15 {
            let step = questions.step(begin + Duration::from_secs(second));
            assert_eq!(step, Some(LONGEST_LOOK));
        }
        drop(lock);
        let late = begin + Duration::from_secs(20);
        assert_eq!(questions.step(late), Some(REPEATED[0]));
        assert_eq!(fake.answer(), 1);
        assert_eq!(questions.step(late), None);
    }

    /// Follows a course second by second. Returns the seconds of its questions, and that of its
    /// end.
    fn follow(from: u64) -> (Vec<u64>, u64) {
        let mut course = Course::default();
        let mut asked = Vec::new();
        for second in from.. {
            let now = Duration::from_secs(second);
            loop {
                match course.step(now) {
                    Step::Ask => {
                        asked.push(second);
                        course.asked(now);
                    }
                    Step::Wait(time) => {
                        assert!(time > Duration::ZERO);
                        break;
                    }
                    Step::Unanswered => return (asked, second),
                }
            }
        }
        unreachable!("a course ends");
    }

    #[test]
    fn question_is_repeated_until_ten_seconds() {
        assert_eq!(follow(0), (vec![0, 1, 3, 7], 10));
        assert_eq!(follow(5), (vec![5, 6, 8, 12], 15));
    }

    #[test]
    fn waits_are_told_apart_by_their_sleeps() {
        let begin = Instant::now();
        let at = |milliseconds| begin + Duration::from_millis(milliseconds);
        let second = Duration::from_secs(1);
        let wait = Wait {
            begin,
            end: at(5000),
            timeout: second,
        };
        assert!(wait.goes_on(at(5001), second));
        assert!(wait.goes_on(at(5001), Duration::MAX));
        assert!(!wait.goes_on(at(5001), second / 2), "a new wait is short");
        assert!(!wait.goes_on(at(5060), second), "the end was busy");
        assert!(!wait.goes_on(at(60_000), second));
    }

    #[test]
    fn delayed_program_still_asks_before_silence() {
        let mut course = Course::default();
        assert_eq!(course.step(Duration::ZERO), Step::Ask);
        course.asked(Duration::ZERO);
        // The program was stopped for a minute. Its questions come first.
        let late = Duration::from_secs(60);
        for _ in REPEATED {
            assert_eq!(course.step(late), Step::Ask);
            course.asked(late);
        }
        assert_eq!(course.step(late), Step::Unanswered);
    }
}
