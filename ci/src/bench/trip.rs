// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Round trips: the guest asks, the host answers.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result};
use barlink_bench_load::{Trips, Wait};
use serde::Serialize;

use super::case::Way;
use super::peer::told;
use super::scene::{Scene, Side};
use super::spread::Spread;
use super::stream::endpoints;
use crate::broker::Transport;

/// For ends that sleep: long enough for them to be asleep.
const PAUSE: &str = "--pause=500";

/// What is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trip {
    /// Through a pair of channels, whose ends wait so.
    Channels(Transport, Wait),
    /// By a ring each way, and nothing else.
    Bells(Transport),
    /// Through a peer.
    Peer(Way),
}

impl Trip {
    /// All that is measured.
    pub fn all() -> Vec<Trip> {
        let mut all = Vec::new();
        for transport in Transport::ALL {
            let waits = [Wait::Spin, Wait::Prompt, Wait::Sleep];
            all.extend(waits.map(|wait| Trip::Channels(transport, wait)));
            all.push(Trip::Bells(transport));
        }
        let peers = [Way::VirtioSerial, Way::Tcp, Way::Vsock, Way::Virtiofs];
        all.extend(peers.map(Trip::Peer));
        all
    }

    /// The way that they go.
    pub fn way(self) -> Way {
        match self {
            Trip::Channels(transport, _) | Trip::Bells(transport) => Way::Channel(transport),
            Trip::Peer(way) => way,
        }
    }

    /// Makes trips for some time.
    fn make(self, scene: &Scene, time: Duration) -> Result<Trips> {
        let time = format!("--time={}", time.as_millis());
        let control = format!("--control={}", scene.control().display());
        let words = |words: &[&str]| {
            words
                .iter()
                .map(|&word| word.to_owned())
                .collect::<Vec<_>>()
        };
        let (asks, answers) = match self {
            Trip::Channels(transport, wait) => {
                let [up, down, device] = names(transport);
                let (wait, pause) = match wait {
                    Wait::Spin => ("--wait=spin", "--pause=0"),
                    Wait::Prompt => ("--wait=prompt", "--pause=0"),
                    Wait::Sleep => ("--wait=sleep", PAUSE),
                };
                (
                    words(&["ask", &up, &down, &device, wait, pause, &time]),
                    words(&["answer", &down, &up, &control, wait]),
                )
            }
            Trip::Bells(transport) => {
                let [up, _, device] = names(transport);
                (
                    words(&["bell-ask", &up, &device, PAUSE, &time]),
                    words(&["bell-answer", &up, &control]),
                )
            }
            Trip::Peer(way) => {
                let [host, guest] = endpoints(scene, way)?;
                (
                    words(&["pipe-ask", &guest, &time]),
                    words(&["pipe-answer", &host]),
                )
            }
        };
        let answers = scene.start(Side::Host, &answers)?;
        let asks = scene.start(Side::Guest, &asks)?;
        let trips = asks.wait().context("the end that asks failed")?;
        answers
            .wait_silently()
            .context("the end that answers failed")?;
        Ok(trips)
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
            Trip::Bells(transport) => {
                write!(f, "{}, bare doorbell and interrupt", transport.name())
            }
            Trip::Peer(way) => f.write_str(way.name()),
        }
    }
}

/// What was measured of one kind of trip.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub(super) trip: Trip,
    /// Median, 99 %, 99.9 % and longest of each round, in nanoseconds.
    times: [Spread; 4],
    /// Why it was not measured any further.
    failure: Option<String>,
}

impl Row {
    /// One without figures.
    pub fn new(trip: Trip) -> Self {
        Row {
            trip,
            times: Default::default(),
            failure: None,
        }
    }

    /// Does a round. A peer that fails is left alone from then on, and what it did is told.
    pub fn measure(&mut self, scene: &Scene, time: Duration) -> Result<()> {
        if self.failure.is_some() {
            return Ok(());
        }
        match self.trip.make(scene, time) {
            Ok(trips) => {
                let times = [trips.median, trips.p99, trips.p999, trips.max];
                for (spread, time) in self.times.iter_mut().zip(times) {
                    spread.add(time as f64);
                }
            }
            Err(error) if matches!(self.trip, Trip::Peer(_)) => {
                self.failure = Some(told(&error));
            }
            Err(error) => return Err(error.context(self.trip.to_string())),
        }
        Ok(())
    }
}

impl fmt::Display for Row {
    /// A line of a table, in microseconds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "| {} |", self.trip)?;
        if let Some(failure) = &self.failure {
            return writeln!(f, " {failure} | | | | |");
        }
        let [low, high] = self.times[0].quartiles().map(|time| time / 1e3);
        let [median, p99, p999, max] = self.times.each_ref().map(|time| time.median() / 1e3);
        writeln!(
            f,
            " {median:.1} | {low:.1} to {high:.1} | {p99:.1} | {p999:.1} | {max:.1} |"
        )
    }
}

/// The two channels of a transport's slot, and the guest's device.
fn names(transport: Transport) -> [String; 3] {
    let slot = transport.index();
    [
        format!("up{slot}"),
        format!("down{slot}"),
        format!("--device=/dev/barlink{slot}"),
    ]
}
