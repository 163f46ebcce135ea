// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One stream of records over any way.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlink_bench_load::Measured;
use indicatif::BinaryBytes;
use serde::Serialize;

use super::case::{Case, Direction, Way};
use super::host;
use super::peer::first_line;
use super::scene::{Load, PORT, Scene, Side};
use super::spread::Spread;

/// The results of one stream.
pub(super) struct Streamed {
    pub(super) sent: Measured,
    pub(super) received: Measured,
    /// Number of rings of the producer, if they are counted.
    pub(super) rung: Option<u64>,
}

/// The results of one case.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub(super) case: Case,
    /// Rates of the rounds, in bytes of payload a second.
    pub(super) rate: Spread,
    /// Processor seconds for a GiB, of the sender and of the receiver.
    cpu_seconds_per_gib_of_sender_and_receiver: [Spread; 2],
    /// Records in all rounds.
    pub(super) records: u64,
    /// Rings of the producer in all rounds, if they are counted.
    pub(super) rung: Option<u64>,
    /// The error that ended the measurements of this case.
    pub(super) failure: Option<String>,
}

impl Row {
    /// Creates a row without results.
    pub fn new(case: Case) -> Self {
        Row {
            case,
            rate: Spread::default(),
            cpu_seconds_per_gib_of_sender_and_receiver: Default::default(),
            records: 0,
            rung: None,
            failure: None,
        }
    }

    /// Measures one round. If a peer fails, stores the error and measures the case no more; other
    /// failures are errors.
    pub fn measure(&mut self, scene: &Scene, time: Duration) -> Result<()> {
        if self.failure.is_some() {
            return Ok(());
        }
        match stream(scene, &self.case, time) {
            Ok(streamed) => self.add(&streamed),
            Err(error) if self.case.way.is_peer() => self.failure = Some(first_line(&error)),
            Err(error) => return Err(error.context(self.case.to_string())),
        }
        Ok(())
    }

    /// Returns the median rate in bytes a second, or the error that ended the measurements.
    pub fn outcome(&self) -> Result<f64, &str> {
        match &self.failure {
            Some(failure) => Err(failure),
            None => Ok(self.rate.median()),
        }
    }

    /// Returns whether there are results.
    pub(super) fn is_measured(&self) -> bool {
        self.failure.is_none() && self.records > 0
    }

    /// Returns the processor time, in seconds for a GiB, of the ends that run on this side.
    /// `None` if neither end does.
    pub(super) fn cpu(&self, side: Side) -> Option<f64> {
        let sides = self.case.direction.sides();
        let ends = sides
            .iter()
            .zip(&self.cpu_seconds_per_gib_of_sender_and_receiver);
        let here = ends.filter(|(end, _)| **end == side);
        let cpu = here.map(|(_, spread)| spread.median());
        if matches!(self.case.way, Way::Copy | Way::Ring | Way::OneByOne) {
            // Both ends are one process.
            return cpu.reduce(|_, last| last);
        }
        cpu.reduce(|one, other| one + other)
    }

    /// Returns how often the producer woke the consumer for 1,000 records, if that is counted.
    pub(super) fn wakeups(&self) -> Option<f64> {
        Some(self.rung? as f64 * 1e3 / self.records as f64)
    }

    fn add(&mut self, streamed: &Streamed) {
        let Streamed {
            sent,
            received,
            rung,
        } = streamed;
        self.rate.add(received.rate());
        for (spread, end) in self
            .cpu_seconds_per_gib_of_sender_and_receiver
            .iter_mut()
            .zip([sent, received])
        {
            let seconds = end.cpu as f64 / 1e9;
            spread.add(seconds * f64::from(1 << 30) / end.bytes as f64);
        }
        self.records += sent.records;
        if let Some(rung) = rung {
            *self.rung.get_or_insert(0) += rung;
        }
    }
}

impl fmt::Display for Row {
    /// Formats a line of a table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case {
            way,
            direction,
            record_size,
        } = &self.case;
        let (direction, way, way_waits) = (direction.name(), way.name(), way.wait());
        write!(f, "| {direction} | {way} | {} |", BinaryBytes(*record_size))?;
        if let Some(failure) = &self.failure {
            return writeln!(f, " failed: {failure} | | | | | | |");
        }
        let rate = self.rate.median();
        let [low, high] = self.rate.range().map(mib);
        let cell =
            |figure: Option<f64>| figure.map_or(String::new(), |figure| format!("{figure:.2}"));
        let [host, guest] = [Side::Host, Side::Guest].map(|side| cell(self.cpu(side)));
        let (wakeups, wait) = (cell(self.wakeups()), way_waits);
        writeln!(
            f,
            " {:.0} | {low:.0} to {high:.0} | {:.0} | {wakeups} | {host} | {guest} | {wait} |",
            mib(rate),
            rate / *record_size as f64,
        )
    }
}

/// Converts a rate from bytes a second to MiB a second.
pub(super) fn mib(rate: f64) -> f64 {
    rate / f64::from(1 << 20)
}

/// The side and the arguments of a process.
type Order = (Side, Vec<String>);

/// Streams for some time, and checks that every byte has arrived.
fn stream(scene: &Scene, case: &Case, time: Duration) -> Result<Streamed> {
    let size = format!("--record-size={}", case.record_size);
    let duration = time;
    let time = format!("--time={}", time.as_millis());
    let sides = case.direction.sides();
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    match case.way {
        Way::Channel(transport) => {
            let slot = transport.index();
            let up = case.direction == Direction::Up;
            let (channel, index) = match up {
                true => (format!("up{slot}"), 2 * slot),
                false => (format!("down{slot}"), 2 * slot + 1),
            };
            let control = format!("--control={}", scene.control().display());
            let device = format!("--device=/dev/barlink{slot}");
            let [from, to] = sides.map(|side| match side {
                Side::Host => &control,
                Side::Guest => &device,
            });
            let before = scene.rung(index)?;
            let streamed = run(
                scene,
                case.way,
                &(sides[0], words(&["send", &channel, from, &size, &time])),
                &(sides[1], words(&["receive", &channel, to])),
            )?;
            Ok(Streamed {
                rung: Some(scene.rung(index)? - before),
                ..streamed
            })
        }
        Way::Within | Way::Batches | Way::Iceoryx2 => {
            host::stream(scene, case.way, case.record_size, duration)
        }
        Way::Copy | Way::Ring | Way::OneByOne => {
            let mut order = words(&["ring", &size, &time]);
            match case.way {
                Way::Copy => order[0] = "copy".to_owned(),
                Way::OneByOne => order.push("--one-by-one".to_owned()),
                _ => (),
            }
            let load = scene.start(sides[0], &order)?;
            let measured: Measured = load.wait()?;
            Ok(Streamed {
                sent: measured,
                received: measured,
                rung: None,
            })
        }
        Way::Raw => {
            let file = format!("--file={}", scene.clear_raw()?.display());
            let order = |side, what: &[&str]| {
                let mut order: Vec<String> = words(what);
                order.extend((side == Side::Host).then(|| file.clone()));
                (side, order)
            };
            run(
                scene,
                case.way,
                &order(sides[0], &["raw-send", &size, &time]),
                &order(sides[1], &["raw-receive", &size]),
            )
        }
        Way::VirtioSerial | Way::Tcp | Way::Vsock | Way::Virtiofs | Way::Unix => {
            // The first is the end that must be there before the other one connects.
            let [listens, connects] = endpoints(scene, case.way)?;
            let [from, to] = match (sides, case.way) {
                ([Side::Host, Side::Guest], _) => [&listens, &connects],
                _ => [&connects, &listens],
            };
            run(
                scene,
                case.way,
                &(sides[0], words(&["pipe-send", from, &size, &time])),
                &(sides[1], words(&["pipe-receive", to, &size])),
            )
        }
    }
}

/// Returns the two ends of a pipe, the host's first.
pub(super) fn endpoints(scene: &Scene, way: Way) -> Result<[String; 2]> {
    Ok(match way {
        Way::VirtioSerial => [
            format!("unix:{}", scene.port().display()),
            format!("port:{PORT}"),
        ],
        Way::Unix => {
            let path = scene.fresh_file("unix.sock")?;
            [
                format!("unix-listen:{}", path.display()),
                format!("unix:{}", path.display()),
            ]
        }
        _ => return scene.peers().endpoints(way),
    })
}

/// Runs a sender and a receiver to their ends.
fn run(scene: &Scene, way: Way, sender: &Order, receiver: &Order) -> Result<Streamed> {
    let receiver = scene.start(receiver.0, &receiver.1)?;
    let sender = scene.start(sender.0, &sender.1)?;
    finish(way, sender, receiver)
}

/// Waits until both have ended, and compares the records that were sent and received.
pub(super) fn finish(way: Way, sender: Load, receiver: Load) -> Result<Streamed> {
    let sent: Measured = sender
        .wait_for(way.timeout())
        .context("the sender failed")?;
    let received: Measured = receiver.wait().context("the receiver failed")?;
    ensure!(
        (sent.records, sent.sum) == (received.records, received.sum),
        "what came is not what was sent"
    );
    Ok(Streamed {
        sent,
        received,
        rung: None,
    })
}
