// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Dying exactly where it is hardest to survive: an end asks at each of these points whether it is to die there, and does
//! so by SIGKILL, as if somebody had killed it just then.

use std::cell::Cell;
use std::ops::Deref;
use std::rc::Rc;
use std::time::Duration;

use barlink_protocol::wire::layout::End;
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
    end: End,
    /// How many records are committed or released, if a ring now follows from that, and not from the other end's coming
    /// or going.
    moved: Cell<Option<u64>>,
}

impl<M: Deref<Target = [AtomicU64]>> Trap<M> {
    /// The trap of this end, and those notes of its channel that it takes itself.
    pub fn new(notes: Notes<M>, end: End) -> Rc<Self> {
        Rc::new(Self {
            notes,
            end,
            moved: Cell::new(None),
        })
    }

    /// Dies, if it is to die here. That the note is 0 again tells when.
    pub fn pass(&self, point: Point) {
        let note = match self.end {
            End::Producer => Note::ProducerTrap,
            End::Consumer => Note::ConsumerTrap,
        };
        if self.notes.read(note) == point as u64 {
            // What is done is done, and is to be told so: the successor must go on behind it.
            if let Some(count) = self.moved.get() {
                self.note_done(count);
            }
            self.notes.write(note, 0);
            let killed = kill_process(getpid(), Signal::KILL);
            unreachable!("this process is dead: {killed:?}");
        }
    }

    /// Does a commit or a release, which rings if the other end asked for that, and notes that there are now `count`.
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

/// Events of an end that can die before it rings, and that notes what wakes it.
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
