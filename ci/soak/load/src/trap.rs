// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Death at the points that are hardest to survive. At each point an end checks whether it must die
//! there, and then kills itself with SIGKILL, as another process might at that moment.

use std::cell::Cell;
use std::ops::Deref;
use std::rc::Rc;
use std::time::Duration;

use barlink_protocol::wire::layout::End;
use barlink_protocol::{AtomicU64, Events};
use rustix::process::{Signal, getpid, kill_process};

use crate::{Note, Notes};

/// A point at which an end can die. The note of a trap holds its number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Point {
    /// Producer: the record is written, but not committed.
    BeforeCommit = 1,
    /// Producer: the record is committed, but the sleeping consumer is not rung. Consumer: the
    /// record is released, but the producer is not rung.
    BeforeRing = 2,
    /// Consumer: the record is found, but not read.
    BeforeDelivery = 3,
    /// Consumer: the record is delivered, but not released.
    BeforeRelease = 4,
}

/// The trap of one end.
pub struct Trap<M> {
    notes: Notes<M>,
    end: End,
    /// The number of committed or released records during a commit or release. A ring in this time
    /// follows from it, and not from the other end's arrival or departure.
    moved: Cell<Option<u64>>,
}

impl<M: Deref<Target = [AtomicU64]>> Trap<M> {
    /// Creates the trap of this end. It writes the end's notes about commits, releases and wake-ups
    /// into `notes`.
    pub fn new(notes: Notes<M>, end: End) -> Rc<Self> {
        Rc::new(Self {
            notes,
            end,
            moved: Cell::new(None),
        })
    }

    /// Kills this process if its note holds this point. The note is 0 again just before its death.
    pub fn pass(&self, point: Point) {
        let note = match self.end {
            End::Producer => Note::ProducerTrap,
            End::Consumer => Note::ConsumerTrap,
        };
        if self.notes.read(note) == point as u64 {
            // The commit or release is already done, so it must be noted: the successor goes on
            // after it.
            if let Some(count) = self.moved.get() {
                self.note_done(count);
            }
            self.notes.write(note, 0);
            let killed = kill_process(getpid(), Signal::KILL);
            unreachable!("this process is dead: {killed:?}");
        }
    }

    /// Runs a commit or a release, which rings if the other end has armed a wake-up. Notes the new
    /// count.
    pub fn moving<T, X>(&self, count: u64, work: impl FnOnce() -> Result<T, X>) -> Result<T, X> {
        self.moved.set(Some(count));
        let done = work();
        self.moved.set(None);
        if done.is_ok() {
            self.note_done(count);
        }
        done
    }

    fn note_done(&self, count: u64) {
        let note = match self.end {
            End::Producer => Note::Sent,
            End::Consumer => Note::Released,
        };
        self.notes.write(note, count);
    }

    fn note_woken(&self) {
        let note = match self.end {
            End::Producer => Note::ProducerWoken,
            End::Consumer => Note::ConsumerWoken,
        };
        self.notes.add(note, 1);
    }
}

/// The events of an end that can die before it rings. They also count the sleeps that rings end.
pub struct Trapped<E, M> {
    events: E,
    trap: Rc<Trap<M>>,
}

impl<E, M> Trapped<E, M> {
    /// Creates events with this trap.
    pub fn new(events: E, trap: Rc<Trap<M>>) -> Self {
        Self { events, trap }
    }
}

impl<E: Events, M: Deref<Target = [AtomicU64]>> Events for Trapped<E, M> {
    type Error = E::Error;

    fn ring(&mut self) -> Result<(), E::Error> {
        if self.trap.moved.get().is_some() {
            self.trap.pass(Point::BeforeRing);
        }
        self.events.ring()
    }

    fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, E::Error> {
        let rung = self.events.sleep(timeout)?;
        if rung {
            self.trap.note_woken();
        }
        Ok(rung)
    }

    fn now(&self) -> Duration {
        self.events.now()
    }

    fn can_spin(&self) -> bool {
        self.events.can_spin()
    }
}
