// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Dying exactly where it is hardest to survive: an end asks at each of these points whether it is to die there, and does
//! so by SIGKILL, as if somebody had killed it just then.

use std::cell::Cell;
use std::ops::Deref;
use std::rc::Rc;
use std::time::Duration;

use barlink_protocol::{AtomicU64, Events};
use rustix::process::{Signal, getpid, kill_process};

use crate::{Note, Notes};

/// Where an end can die. Its number is what the note of a trap holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Point {
    /// Producer: the record is written, and not committed.
    BeforeCommit = 1,
    /// Producer: committed, and the consumer, which sleeps, not rung. Consumer: released, and the producer not rung.
    BeforeRing = 2,
    /// Consumer: the record is found, and not looked at.
    BeforeDelivery = 3,
    /// Consumer: it is delivered, and not released.
    BeforeRelease = 4,
}

/// The trap of one end.
pub struct Trap<M> {
    notes: Notes<M>,
    note: Note,
    /// A ring now follows from a commit or a release, and not from the other end's coming or going.
    moved: Cell<bool>,
}

impl<M: Deref<Target = [AtomicU64]>> Trap<M> {
    /// The trap that this note sets.
    pub fn new(notes: Notes<M>, note: Note) -> Rc<Self> {
        Rc::new(Self {
            notes,
            note,
            moved: Cell::new(false),
        })
    }

    /// Dies, if it is to die here. That the note is 0 again tells when.
    pub fn pass(&self, point: Point) {
        if self.notes.read(self.note) == point as u64 {
            self.notes.write(self.note, 0);
            let killed = kill_process(getpid(), Signal::KILL);
            unreachable!("this process is dead: {killed:?}");
        }
    }

    /// Does a commit or a release, which rings if the other end asked for that.
    pub fn moving<T>(&self, work: impl FnOnce() -> T) -> T {
        self.moved.set(true);
        let done = work();
        self.moved.set(false);
        done
    }
}

/// Events of an end that can die before it rings.
pub struct Trapped<E, M> {
    events: E,
    trap: Rc<Trap<M>>,
}

impl<E, M> Trapped<E, M> {
    /// These events, with this trap.
    pub fn new(events: E, trap: Rc<Trap<M>>) -> Self {
        Self { events, trap }
    }
}

impl<E: Events, M: Deref<Target = [AtomicU64]>> Events for Trapped<E, M> {
    type Error = E::Error;

    fn ring(&mut self) -> Result<(), E::Error> {
        if self.trap.moved.get() {
            self.trap.pass(Point::BeforeRing);
        }
        self.events.ring()
    }

    fn sleep(&mut self, timeout: Option<Duration>) -> Result<bool, E::Error> {
        self.events.sleep(timeout)
    }

    fn now(&self) -> Duration {
        self.events.now()
    }

    fn can_spin(&self) -> bool {
        self.events.can_spin()
    }
}
