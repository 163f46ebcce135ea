// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Streams to several readers, between processes on the host: taps of a channel that overwrites its
//! records, and subscribers of iceoryx2 that lose the oldest samples.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlink_bench_load::{Measured, Tapped};
use indicatif::BinaryBytes;
use serde::Serialize;

use super::case::Way;
use super::host::{READERS, service, start};
use super::peer::first_line;
use super::scene::{Load, Scene};
use super::spread::Spread;
use super::stream::mib;

/// Numbers of readers that read at once.
const MANY: [u32; 4] = [1, 2, 4, 8];
/// Bytes of payload in a record. A record takes at most a quarter of its channel.
const SIZES: [u64; 3] = [64, 64 << 10, 1 << 20];
/// The size of records beside which a reader is stopped.
const BESIDE_STOPPED: u64 = 64 << 10;
/// The number of readers that read beside a stopped one.
const BESIDE: u32 = 2;
/// A camera: bytes of a frame, and frames a second.
const FRAME: u64 = 1 << 20;
const PACE: u32 = 60;

/// The time until a reader that has found nothing looks again.
pub const WAIT: &str = "50 µs, and a tap after twice as long each time";

/// A sender that never waits, and its readers.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Readers {
    /// The way that the bytes take: [`Way::Within`] or [`Way::Iceoryx2`].
    pub way: Way,
    /// Number of readers that read.
    pub reading: u32,
    /// Number of readers that are stopped.
    pub stopped: u32,
    /// Bytes of payload in a record.
    pub record_size: u64,
    /// Records a second, if the sender sends them in time instead of as fast as it can.
    pub pace: Option<u32>,
}

impl fmt::Display for Readers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.way.name(), self.who())?;
        write!(f, ", {} bytes", self.record_size)?;
        match self.pace {
            Some(pace) => write!(f, ", {pace} a second"),
            None => Ok(()),
        }
    }
}

impl Readers {
    /// Returns all cases for records of these sizes.
    pub fn all(sizes: &[u64]) -> Vec<Self> {
        let case = |way, reading, stopped, record_size, pace| Readers {
            way,
            reading,
            stopped,
            record_size,
            pace,
        };
        let mut all = Vec::new();
        for way in [Way::Within, Way::Iceoryx2] {
            for size in SIZES.into_iter().filter(|size| sizes.contains(size)) {
                all.extend(MANY.map(|reading| case(way, reading, 0, size, None)));
            }
            all.extend([0, 1].map(|stopped| case(way, 0, stopped, BESIDE_STOPPED, None)));
            let camera = [(8, 0), (BESIDE, 0), (BESIDE, 1)];
            all.extend(
                camera.map(|(reading, stopped)| case(way, reading, stopped, FRAME, Some(PACE))),
            );
        }
        all
    }

    fn who(&self) -> String {
        match (self.reading, self.stopped) {
            (0, 0) => "no reader".to_owned(),
            (0, _) => "a stopped reader".to_owned(),
            (1, 0) => "1 reader".to_owned(),
            (many, 0) => format!("{many} readers"),
            (many, _) => format!("{many} readers and a stopped one"),
        }
    }
}

/// The results of one case.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub(super) case: Readers,
    /// Rates of the sender, in bytes of payload a second.
    sent: Spread,
    /// Rates of all readers together, in bytes of payload a second.
    read: Spread,
    /// Records in all rounds, for each reader.
    records: u64,
    /// Records that readers got in all rounds, of all readers together.
    got: u64,
    /// Records that they missed.
    missed: u64,
    /// The error that ended the measurements of this case.
    failure: Option<String>,
}

impl Row {
    /// Creates a row without results.
    pub fn new(case: Readers) -> Self {
        Row {
            case,
            sent: Spread::default(),
            read: Spread::default(),
            records: 0,
            got: 0,
            missed: 0,
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
            Ok((sent, readers)) => {
                self.sent.add(sent.rate());
                let rates = readers.iter().map(|reader| reader.measured.rate());
                self.read.add(rates.sum());
                self.records += sent.records;
                let got = readers.iter().map(|reader| reader.measured.records);
                self.got += got.sum::<u64>();
                self.missed += readers.iter().map(|reader| reader.missed).sum::<u64>();
            }
            Err(error) if self.case.way.is_peer() => self.failure = Some(first_line(&error)),
            Err(error) => return Err(error.context(self.case.to_string())),
        }
        Ok(())
    }
}

impl fmt::Display for Row {
    /// Formats a line of a table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let case = &self.case;
        let size = BinaryBytes(case.record_size);
        write!(f, "| {} | {} | {size} |", case.way.name(), case.who())?;
        match case.pace {
            Some(pace) => write!(f, " {pace} a second |")?,
            None => write!(f, " unpaced |")?,
        }
        if let Some(failure) = &self.failure {
            return writeln!(f, " failed: {failure} | | | |");
        }
        let [low, high] = self.read.range().map(mib);
        let (sent, read) = (mib(self.sent.median()), mib(self.read.median()));
        let all = self.records * u64::from(case.reading);
        let missed = self.missed as f64 * 100.0 / all.max(1) as f64;
        match case.reading {
            0 => writeln!(f, " {sent:.0} | | | |"),
            _ => writeln!(
                f,
                " {sent:.0} | {read:.0} | {low:.0} to {high:.0} | {missed:.1} % |"
            ),
        }
    }
}

/// Streams for some time to all readers. Checks that each reader counted all records, and got every
/// byte if it missed none.
fn stream(scene: &Scene, case: &Readers, time: Duration) -> Result<(Measured, Vec<Tapped>)> {
    let size = format!("--record-size={}", case.record_size);
    let time = format!("--time={}", time.as_millis());
    let pace = case.pace.map(|pace| format!("--pace={pace}"));
    let control = format!("--control={}", scene.control().display());
    let service = service(scene, &case.to_string());
    let readers = format!("--readers={}", case.reading + case.stopped);
    let (reader, mut sender) = match case.way {
        Way::Iceoryx2 => (
            vec!["subscribe", &service, &size, &readers],
            vec!["publish", &service, &size, &readers, &time],
        ),
        _ => (
            vec!["tap", READERS, &control],
            vec!["build", READERS, &control, &size, &time],
        ),
    };
    sender.extend(pace.as_deref());
    let stopped = format!("--stopped={}", case.stopped);
    sender.extend((case.way == Way::Iceoryx2).then_some(stopped.as_str()));
    let start = |arguments: &[&str]| match case.way {
        Way::Iceoryx2 => scene.start_iceoryx2(arguments),
        _ => start(scene, arguments),
    };
    // A reader that has printed its process ID sees the first record.
    let begin = || {
        let mut load = start(&reader)?;
        load.process()?;
        anyhow::Ok(load)
    };
    let reading = (0..case.reading).map(|_| begin());
    let reading = reading.collect::<Result<Vec<_>>>()?;
    let stopped = (0..case.stopped).map(|_| {
        let load = begin()?;
        load.stop()?;
        Ok(load)
    });
    let stopped = stopped.collect::<Result<Vec<_>>>()?;
    let sent: Measured = start(&sender)?.wait().context("the sender failed")?;
    let readers = reading.into_iter().map(Load::wait::<Tapped>);
    let readers = readers.collect::<Result<Vec<_>>>();
    let readers = readers.context("a reader failed")?;
    for load in stopped {
        load.end()?;
    }
    for reader in &readers {
        let got = reader.measured;
        ensure!(
            got.records + reader.missed == sent.records,
            "a reader got {} records and missed {} of {}",
            got.records,
            reader.missed,
            sent.records
        );
        ensure!(
            reader.missed > 0 || got.sum == sent.sum,
            "what came is not what was sent"
        );
    }
    Ok((sent, readers))
}
