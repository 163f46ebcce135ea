// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Faults of taps and channels while records flow: a tap is killed, a channel is reset by force, a
//! channel is added.

use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use barlink_crash_load::Note;
use barlink_protocol::wire::layout::{End, Policy};

use super::fault::{Role, Side};
use super::scene::Scene;
use super::watch::{CHANNELS, Watched};
use super::worker::Task;

/// Longest time for which a tap lives, and longest time after which the broker is killed.
const LIFE: Duration = Duration::from_millis(50);
const MOMENT: Duration = Duration::from_millis(20);

/// Fewest records that a tap copies before it is killed, and that an added channel carries.
const RECORDS: u64 = 3;

/// Capacity of an added channel, in bytes.
const CAPACITY: u64 = 4096;

impl Scene<'_> {
    /// Starts a tap of any channel on this side, and kills it. The streams and the other tap go on.
    /// On the host the broker keeps nothing of the tap.
    pub(super) fn kill_tap(&mut self, side: Side) -> Result<Duration> {
        let name = CHANNELS[self.random.below(CHANNELS.len() as u64) as usize];
        let before = self.descriptors()?;
        let notes = self.watch().channel(name)?.killed_tap.clone();
        notes.write(Note::Received, 0);
        let mut tap = self.launch(Task::LateTap(side), name)?;
        self.wait_until("a tap copies nothing", |_| {
            ensure!(!tap.has_ended()?, "a tap has ended");
            Ok(notes.read(Note::Received) >= RECORDS)
        })?;
        thread::sleep(self.moment(LIFE));
        let start = Instant::now();
        tap.kill()?;
        self.wait_until_all_flow()?;
        let recovery = start.elapsed();
        self.wait_until_taps_follow()?;
        if side == Side::Host {
            self.wait_until("the broker keeps descriptors of a tap", |scene| {
                Ok(scene.descriptors()? <= before)
            })?;
        }
        Ok(recovery)
    }

    /// Counts the broker's open descriptors.
    fn descriptors(&self) -> Result<usize> {
        let folder = format!("/proc/{}/fd", self.broker.process());
        Ok(std::fs::read_dir(folder)?.count())
    }

    /// Resets a channel while its ends hold it. They notice the reset and end, and others begin.
    pub(super) fn reset_by_force(&mut self, channel: &str) -> Result<Duration> {
        let start = Instant::now();
        self.broker.run(["reset-channel", channel, "--force"])?;
        let roles = Role::ALL.into_iter();
        let roles: Vec<_> = roles.filter(|role| role.channel() == channel).collect();
        for &role in &roles {
            self.worker(role)?.wait_reset()?;
            self.dismiss(role);
        }
        // An end can store one word after the reset, before it notices (`docs/protocol.md`,
        // 4.4.10). Another reset repairs that. The ends have left, so it needs no force.
        if !self.watch.is_empty(channel)? {
            self.watch.resets.repeated += 1;
            self.wait_until("the ends are not free", |scene| {
                let again = scene.broker.app(["reset-channel", channel]).output()?;
                Ok(again.status.success())
            })?;
            ensure!(self.watch.is_empty(channel)?, "`{channel}` is not empty");
        }
        self.watch.begin_anew(channel)?;
        let mark = self.watch.mark(&[channel]);
        for role in roles {
            self.start(role)?;
        }
        self.wait_beyond(&mark)?;
        Ok(start.elapsed())
    }

    /// Adds a channel, which carries records at once. If there is no room for it, the broker
    /// refuses. The ends of the other channels go on.
    pub(super) fn add_channel(&mut self) -> Result<Duration> {
        let plan = self.plan_channel();
        let has_room = self.watch.room(CAPACITY)? > 0;
        let start = Instant::now();
        let added = self.broker.app(plan.add()).output()?;
        ensure!(
            added.status.success() == has_room,
            "`channel add`, with room: {has_room}, ended with {}: {}",
            added.status,
            String::from_utf8_lossy(&added.stderr)
        );
        if has_room {
            self.use_channel(&plan)?;
        }
        self.wait_until_all_flow()?;
        self.check_workers()?;
        Ok(start.elapsed())
    }

    /// Kills the broker while it adds a channel. Its successor has the channel, or can add it.
    pub(super) fn kill_amid_adding(&mut self) -> Result<Duration> {
        let plan = self.plan_channel();
        let roll = self.roll()?;
        let mut command = self.broker.app(plan.add());
        let mut adding = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        thread::sleep(self.moment(MOMENT));
        let start = Instant::now();
        self.broker.kill()?;
        self.broker.start_again()?;
        self.is_as_before(&roll)?;
        let recovery = start.elapsed();
        // The command waits for an answer for a few seconds, which may come from the successor.
        let was_added = adding.wait()?.success();
        let is_there = self.watch.added(&plan.name)?.is_some();
        ensure!(
            is_there || !was_added,
            "`{}` is not there any more",
            plan.name
        );
        match is_there {
            true => self.use_channel(&plan)?,
            false => drop(self.add_channel()?),
        }
        Ok(recovery)
    }

    /// Chooses the name and the direction of a new channel.
    fn plan_channel(&mut self) -> Plan {
        self.added += 1;
        let name = format!("added-{}", self.added);
        let (producer, direction) = match self.random.below(2) {
            0 => (Side::Host, "down"),
            _ => (Side::Guest, "up"),
        };
        Plan {
            argument: format!("{name}={direction},{CAPACITY}"),
            name,
            producer,
        }
    }

    /// Sends records through a new channel, from one side to the other, and ends in good order.
    fn use_channel(&mut self, plan: &Plan) -> Result<()> {
        let watched = self.watch.added(&plan.name)?;
        let watched = watched.context("the new channel is not there")?;
        let ends = [End::Producer, End::Consumer].map(|end| {
            let side = match (plan.producer, end) {
                (side, End::Producer) => side,
                (Side::Host, End::Consumer) => Side::Guest,
                (Side::Guest, End::Consumer) => Side::Host,
            };
            Task::End(Role::new(side, end, Policy::Wait))
        });
        let mut workers = Vec::new();
        for task in ends {
            workers.push(self.launch(task, &plan.name)?);
        }
        let carries = |watched: &Watched| watched.notes.read(Note::Delivered) >= RECORDS;
        self.wait_until("a new channel carries no records", |_| {
            for worker in &mut workers {
                if worker.has_ended()? {
                    let ended = worker.wait()?;
                    bail!("{}", worker.describe(&ended));
                }
            }
            Ok(carries(&watched))
        })?;
        watched.notes.write(Note::Stop, 1);
        for worker in &mut workers {
            worker.wait_done()?;
        }
        let faults = [Note::Lost, Note::Twice, Note::Again, Note::Torn];
        let are_good = faults.map(|note| watched.notes.read(note)) == [0; 4];
        ensure!(are_good && watched.is_complete(false), "{watched}");
        Ok(())
    }

    /// Returns a random time up to this one.
    pub(super) fn moment(&mut self, longest: Duration) -> Duration {
        longest.mul_f64(self.random.below(1000) as f64 / 1000.0)
    }
}

/// A channel that is added.
struct Plan {
    name: String,
    /// The channel, as `barlink channel add` takes it.
    argument: String,
    /// The side of its producer. The consumer is on the other one.
    producer: Side,
}

impl Plan {
    /// Returns the arguments of the command that adds the channel.
    fn add(&self) -> [&str; 3] {
        ["channel", "add", &self.argument]
    }
}
