// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Round trips: the guest asks and the host answers, or two processes on the host do.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result};
use barlink_bench_load::{Sleeps, Trips, Wait};
use indicatif::BinaryBytes;
use serde::Serialize;

use super::case::Way;
use super::host;
use super::peer::first_line;
use super::scene::{Load, Scene, Side};
use super::spread::Spread;
use super::stream::endpoints;
use barlink_vm::broker::Transport;

/// Options for ends that sleep, in microseconds: the time for which the answering end thinks, and
/// the pause of the asking end before a question. They let each end find the other one asleep.
/// Under TCG and over vfio-user a process of a VM takes longer to ring and to fall asleep than a
/// process of the host.
const THINK: &str = "--think=1000";
const PAUSE: &str = "--pause=500";

/// A kind of round trip.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trip {
    /// Through a pair of channels, whose ends wait this way.
    Channels(Transport, Wait),
    /// A bare ring each way, without a record.
    Doorbells(Transport),
    /// Between two processes on the host, whose ends wait this way, with this many bytes of
    /// payload.
    Host(Way, Wait, u64),
    /// Through a peer.
    Peer(Way),
}

impl Trip {
    /// Returns all kinds, with records of these sizes between processes on the host.
    pub fn all(sizes: &[u64]) -> Vec<Trip> {
        let mut all = Vec::new();
        for transport in Transport::ALL {
            let waits = [Wait::Spin, Wait::Prompt, Wait::Sleep];
            all.extend(waits.map(|wait| Trip::Channels(transport, wait)));
            all.push(Trip::Doorbells(transport));
        }
        let peers = [Way::VirtioSerial, Way::Tcp, Way::Vsock, Way::Virtiofs];
        all.extend(peers.map(Trip::Peer));
        for &size in sizes {
            for way in [Way::Within, Way::Iceoryx2] {
                all.extend([Wait::Spin, Wait::Sleep].map(|wait| Trip::Host(way, wait, size)));
            }
            all.push(Trip::Host(Way::Unix, Wait::Sleep, size));
        }
        all
    }

    /// Returns the way that they go.
    pub fn way(self) -> Way {
        match self {
            Trip::Channels(transport, _) | Trip::Doorbells(transport) => Way::Channel(transport),
            Trip::Peer(way) | Trip::Host(way, ..) => way,
        }
    }

    /// Returns the bytes of payload of a question and of its answer.
    pub fn record_size(self) -> u64 {
        match self {
            Trip::Host(_, _, size) => size,
            Trip::Doorbells(_) => 0,
            _ => 64,
        }
    }

    /// Returns the way in which the ends wait.
    pub fn wait(self) -> &'static str {
        match self {
            Trip::Channels(_, Wait::Spin) => "spin",
            Trip::Host(_, Wait::Spin, _) => "poll",
            Trip::Channels(_, Wait::Prompt) | Trip::Host(_, Wait::Prompt, _) => "spin, sleep",
            Trip::Peer(Way::Virtiofs) => "poll",
            _ => "sleep",
        }
    }

    /// Returns further arguments of the asking end and of the answering end. If the ends should
    /// sleep, the arguments let each end find the other one asleep.
    pub(super) fn rests(self) -> (&'static [&'static str], &'static [&'static str]) {
        match self.is_asleep() {
            true => (&[PAUSE, THINK], &[THINK]),
            false => (&[], &[]),
        }
    }

    /// Returns whether the ends should sleep, and do nothing else while they wait.
    fn is_asleep(self) -> bool {
        self.wait() == "sleep"
    }

    /// Returns whether the way belongs to another project.
    fn is_peer(self) -> bool {
        match self {
            Trip::Peer(way) | Trip::Host(way, ..) => way.is_peer(),
            _ => false,
        }
    }

    /// Makes trips for some time.
    fn make(self, scene: &Scene, time: Duration) -> Result<(Trips, Sleeps)> {
        let rests = self.rests();
        if let Trip::Host(way, wait, size) = self {
            return host::trips(scene, way, wait, rests, size, time);
        }
        let time = format!("--time={}", time.as_millis());
        let control = format!("--control={}", scene.control().display());
        let words = |words: &[&str]| {
            words
                .iter()
                .map(|&word| word.to_owned())
                .collect::<Vec<_>>()
        };
        let (mut asks, mut answers) = match self {
            Trip::Channels(transport, wait) => {
                let [up, down, device] = names(transport);
                let wait = host::option(wait);
                (
                    words(&["ask", &up, &down, &device, wait, &time]),
                    words(&["answer", &down, &up, &control, wait]),
                )
            }
            Trip::Doorbells(transport) => {
                let [up, _, device] = names(transport);
                (
                    words(&["doorbell-ask", &up, &device, &time]),
                    words(&["doorbell-answer", &up, &control]),
                )
            }
            // `Trip::Host` returns above.
            Trip::Peer(way) | Trip::Host(way, ..) => {
                let [host, guest] = endpoints(scene, way)?;
                (
                    words(&["pipe-ask", &guest, &time]),
                    words(&["pipe-answer", &host]),
                )
            }
        };
        asks.extend(words(rests.0));
        answers.extend(words(rests.1));
        let answers = scene.start(Side::Host, &answers)?;
        let asks = scene.start(Side::Guest, &asks)?;
        finish(asks, answers)
    }
}

impl fmt::Display for Trip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trip::Channels(transport, wait) => {
                let wait = match wait {
                    Wait::Spin => "spin",
                    Wait::Prompt => "spin for up to 50 µs, then sleep",
                    Wait::Sleep => "asleep",
                };
                write!(f, "{}, ends {wait}", transport.name())
            }
            Trip::Doorbells(transport) => {
                write!(f, "{}, bare doorbell and interrupt", transport.name())
            }
            Trip::Host(way, wait, size) => {
                let wait = match wait {
                    Wait::Spin => "polled",
                    _ => "asleep",
                };
                write!(
                    f,
                    "within the host, {}, {wait}, {}",
                    way.name(),
                    BinaryBytes(*size)
                )
            }
            Trip::Peer(way) => f.write_str(way.name()),
        }
    }
}

/// The results of one kind of trip.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub(super) trip: Trip,
    /// Median, 99 %, 99.9 % and longest of each round, in nanoseconds. A round with too few trips
    /// lacks the two in the middle.
    pub(super) times: [Spread; 4],
    /// Trips in all rounds.
    count: u64,
    /// Waits and sleeps of the asking end and of the answering end, if the ends should sleep.
    slept_of_who_asks_and_who_answers: [Sleeps; 2],
    /// The error that ended the measurements of this kind.
    pub(super) failure: Option<String>,
}

impl Row {
    /// Creates a row without results.
    pub fn new(trip: Trip) -> Self {
        Row {
            trip,
            times: Default::default(),
            count: 0,
            slept_of_who_asks_and_who_answers: Default::default(),
            failure: None,
        }
    }

    /// Returns whether there are results.
    pub(super) fn is_measured(&self) -> bool {
        self.failure.is_none() && self.times[0].median() > 0.0
    }

    /// Returns the medians of the rounds' figures, in microseconds, in the order of
    /// [`Row::times`]. A figure is missing if a round had too few trips for it.
    pub(super) fn medians(&self) -> [Option<f64>; 4] {
        let rounds = self.times[0].count();
        let median = |time: &Spread| (time.count() == rounds).then(|| time.median() / 1e3);
        self.times.each_ref().map(median)
    }

    /// Returns the least part of the trips in which both ends slept. Each end counts its own
    /// sleeps, and their trips are not known. Returns `None` if the ends should not sleep.
    pub fn asleep(&self) -> Option<f64> {
        let is_to = self.trip.is_asleep() && self.is_measured();
        let ends = self.slept_of_who_asks_and_who_answers;
        let parts = ends.map(|end| end.slept as f64 / end.waits.max(1) as f64);
        is_to.then(|| (parts[0] + parts[1] - 1.0).max(0.0))
    }

    /// Returns whether the trips go through a pair of channels.
    pub fn is_of_channels(&self) -> bool {
        matches!(self.trip, Trip::Channels(..) | Trip::Host(Way::Within, ..))
    }

    /// Measures one round. If a peer fails, stores the error and measures the kind no more; other
    /// failures are errors.
    pub fn measure(&mut self, scene: &Scene, time: Duration) -> Result<()> {
        if self.failure.is_some() {
            return Ok(());
        }
        match self.trip.make(scene, time) {
            Ok((trips, answers)) => {
                self.count += trips.count;
                let ends = &mut self.slept_of_who_asks_and_who_answers;
                for (sum, end) in ends.iter_mut().zip([trips.sleeps, answers]) {
                    sum.waits += end.waits;
                    sum.slept += end.slept;
                }
                let times = [Some(trips.median), trips.p99, trips.p999, Some(trips.max)];
                for (spread, time) in self.times.iter_mut().zip(times) {
                    time.iter().for_each(|&time| spread.add(time as f64));
                }
            }
            Err(error) if self.trip.is_peer() => {
                self.failure = Some(first_line(&error));
            }
            Err(error) => return Err(error.context(self.trip.to_string())),
        }
        Ok(())
    }
}

impl fmt::Display for Row {
    /// Formats a line of a table, in microseconds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "| {} |", self.trip)?;
        if let Some(failure) = &self.failure {
            return writeln!(f, " failed: {failure} | | | | | | | |");
        }
        let [low, high] = self.times[0].range().map(|time| time / 1e3);
        let [median, p99, p999, max] = self.medians().map(|time| match time {
            Some(time) => format!("{time:.1}"),
            None => "n too small".to_owned(),
        });
        let asleep = self.asleep();
        let asleep = asleep.map_or_else(String::new, |part| format!("{:.0} %", 100.0 * part));
        writeln!(
            f,
            " {median} | {low:.1} to {high:.1} | {p99} | {p999} | {max} | {} | {asleep} | {} |",
            self.count,
            self.trip.wait()
        )
    }
}

/// Waits until both ends have ended, and returns their results.
pub(super) fn finish(asks: Load, answers: Load) -> Result<(Trips, Sleeps)> {
    let trips = asks.wait().context("the end that asks failed")?;
    let sleeps = answers.wait().context("the end that answers failed")?;
    Ok((trips, sleeps))
}

/// Returns the two channels of a transport's slot, and the option for the guest's device.
fn names(transport: Transport) -> [String; 3] {
    let slot = transport.index();
    [
        format!("up{slot}"),
        format!("down{slot}"),
        format!("--device=/dev/barlink{slot}"),
    ]
}
