// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The newest value of a sender on the host that never pauses: by a tap of a channel that
//! overwrites its records, on the host or in the guest, and by a blackboard of iceoryx2.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result};
use barlink_bench_load::{Measured, Newest};
use indicatif::BinaryBytes;
use serde::Serialize;

use super::case::Way;
use super::host::{READERS, service, start};
use super::peer::first_line;
use super::scene::{Scene, Side};
use super::spread::Spread;
use barlink_vm::broker::Transport;

/// Bytes of a value.
const SIZES: [u64; 2] = [64, 64 << 10];

/// The way of a reader in the guest. The memory is the same over each transport, and emulated code
/// reads it: the reader is several times as slow as the sender.
const GUEST: Way = Way::Channel(Transport::Ivshmem);

/// A sender that never pauses, and a reader that looks at its newest value again and again.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Look {
    /// The way that the bytes take: [`Way::Within`], [`Way::Iceoryx2`], or [`GUEST`].
    pub way: Way,
    /// Bytes of payload in a value.
    pub record_size: u64,
}

impl fmt::Display for Look {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (how, size) = (self.how(), self.record_size);
        write!(f, "{how}, newest value, {size} bytes")
    }
}

impl Look {
    /// Returns all cases for values of these sizes.
    pub fn all(sizes: &[u64]) -> Vec<Self> {
        let sizes = SIZES.into_iter().filter(|size| sizes.contains(size));
        let ways = [Way::Within, Way::Iceoryx2, GUEST];
        let looks = |record_size| ways.map(|way| Look { way, record_size });
        sizes.flat_map(looks).collect()
    }

    fn how(&self) -> &'static str {
        match self.way {
            Way::Iceoryx2 => "iceoryx2 blackboard",
            GUEST => "barlink, read in the guest",
            way => way.name(),
        }
    }
}

/// The results of one case.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub(super) case: Look,
    /// Values that the sender sent, in one second.
    sent: Spread,
    /// Reads that returned a value, in one second.
    read: Spread,
    /// The sums of all rounds.
    total: Newest,
    /// The error that ended the measurements of this case.
    failure: Option<String>,
}

impl Row {
    /// Creates a row without results.
    pub fn new(case: Look) -> Self {
        Row {
            case,
            sent: Spread::default(),
            read: Spread::default(),
            total: Newest::default(),
            failure: None,
        }
    }

    /// Measures one round. If a peer fails, stores the error and measures the case no more; other
    /// failures are errors.
    pub fn measure(&mut self, scene: &Scene, time: Duration) -> Result<()> {
        if self.failure.is_some() {
            return Ok(());
        }
        match look(scene, &self.case, time) {
            Ok((sent, newest)) => {
                self.sent.add(sent.rate() / self.case.record_size as f64);
                let seconds = newest.nanoseconds as f64 / 1e9;
                self.read.add(newest.reads as f64 / seconds);
                let total = &mut self.total;
                total.reads += newest.reads;
                total.failed += newest.failed;
                total.torn += newest.torn;
                total.values += newest.values;
                total.nanoseconds += newest.nanoseconds;
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
        let size = BinaryBytes(self.case.record_size);
        write!(f, "| {} | {size} |", self.case.how())?;
        if let Some(failure) = &self.failure {
            return writeln!(f, " failed: {failure} | | | | |");
        }
        let Newest {
            reads,
            failed,
            torn,
            ..
        } = self.total;
        let whole = (reads - torn) as f64 * 100.0 / (reads + failed).max(1) as f64;
        let [low, high] = self.read.range();
        let (sent, read) = (self.sent.median(), self.read.median());
        writeln!(
            f,
            " {sent:.0} | {read:.0} | {low:.0} to {high:.0} | {whole:.3} % | {torn} |"
        )
    }
}

/// Starts the sender, reads its newest value for some time, and ends the sender.
fn look(scene: &Scene, case: &Look, time: Duration) -> Result<(Measured, Newest)> {
    let size = format!("--record-size={}", case.record_size);
    let time = format!("--time={}", time.as_millis());
    let control = format!("--control={}", scene.control().display());
    let service = service(scene, &format!("newest{size}"));
    let begin = |arguments: &[&str]| match case.way {
        Way::Iceoryx2 => scene.start_iceoryx2(arguments),
        _ => start(scene, arguments),
    };
    let (sender, reader) = match case.way {
        Way::Iceoryx2 => (
            vec!["renew", &service, &size],
            vec!["newest", &service, &size, &time],
        ),
        _ => (
            vec!["renew", READERS, &control, &size],
            vec!["newest", READERS, &control, &size, &time],
        ),
    };
    let mut sender = begin(&sender)?;
    sender.process()?;
    let reader = match case.way {
        GUEST => {
            let slot = Transport::Ivshmem.index();
            let device = format!("--device=/dev/barlink{slot}");
            let arguments = ["newest", READERS, &device, &size, &time];
            scene.start(Side::Guest, &arguments.map(str::to_owned))?
        }
        _ => begin(&reader)?,
    };
    let newest = reader.wait().context("the reader failed")?;
    sender.end_input();
    let sent = sender.wait().context("the sender failed")?;
    Ok((sent, newest))
}
