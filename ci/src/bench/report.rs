// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The results as JSON and as a table.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::Result;
use indicatif::BinaryBytes;
use serde::Serialize;

use super::scene::{Case, Conditions, Direction, Streamed};
use super::spread::Spread;
use crate::broker::Transport;

/// What was measured, and under which conditions.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    conditions: Conditions,
    rows: Vec<Row>,
}

/// What was measured of one case.
#[derive(Clone, Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    case: Case,
    /// Bytes of payload a second.
    rate: Spread,
    /// Processor seconds of the two ends for 10⁹ bytes.
    cpu: [Spread; 2],
    /// Records in all rounds.
    records: u64,
    /// Rings of the producer in all rounds.
    rung: u64,
}

impl Report {
    /// One without figures.
    pub(super) fn new(conditions: &Conditions, cases: &[Case]) -> Self {
        let row = |case: &Case| Row {
            case: case.clone(),
            rate: Spread::default(),
            cpu: Default::default(),
            records: 0,
            rung: 0,
        };
        Self {
            conditions: conditions.clone(),
            rows: cases.iter().map(row).collect(),
        }
    }

    /// Adds a round of a case.
    pub(super) fn add(&mut self, case: &Case, streamed: Streamed) {
        let Streamed {
            sent,
            received,
            rung,
        } = streamed;
        for row in self.rows.iter_mut().filter(|row| row.case == *case) {
            row.rate.add(received.rate());
            for (spread, end) in row.cpu.iter_mut().zip([sent, received]) {
                spread.add(end.cpu as f64 / end.bytes as f64);
            }
            row.records += sent.records;
            row.rung += rung;
        }
    }

    /// The median rate over one transport as a part of that over another, for records of this size in this direction.
    pub fn ratio(
        &self,
        [one, other]: [Transport; 2],
        direction: Direction,
        record_size: u64,
    ) -> Option<f64> {
        let rate = |transport| {
            let case = Case {
                transport,
                direction,
                record_size,
            };
            let row = self.rows.iter().find(|row| row.case == case);
            row.map(|row| row.rate.median())
        };
        Some(rate(one)? / rate(other)?)
    }

    /// Rings of producers for each record, over all that was measured.
    pub fn rings_per_record(&self) -> f64 {
        let sum = |count: fn(&Row) -> u64| self.rows.iter().map(count).sum::<u64>() as f64;
        sum(|row| row.rung) / sum(|row| row.records)
    }

    /// Writes `results.json` and `results.md`.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        let json = serde_json::to_string_pretty(self)?;
        fs::write(folder.join("results.json"), json)?;
        fs::write(folder.join("results.md"), self.to_string())?;
        Ok(())
    }
}

impl fmt::Display for Report {
    /// A table in Markdown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Conditions {
            accelerator,
            kernel,
            cache_mode,
            guest_cpus,
            host_cpus,
        } = &self.conditions;
        writeln!(
            f,
            "Accelerator {accelerator}, guest kernel {kernel}, region mapped {cache_mode} in the guest, {guest_cpus} \
             processors of the guest on {host_cpus} of the host. Records are copied in by the sender, and every byte is \
             read in place by the receiver; ends spin for up to 50 µs, then nap, then sleep.\n"
        )?;
        writeln!(
            f,
            "| direction | record | transport | MB/s | half of the rounds | records/s | rings in 1,000 records \
             | CPU s/GB, sender | receiver |"
        )?;
        writeln!(f, "|---|---:|---|---:|---:|---:|---:|---:|---:|")?;
        for row in &self.rows {
            let direction = match row.case.direction {
                Direction::Up => "guest to host",
                Direction::Down => "host to guest",
            };
            let median = row.rate.median();
            let [low, high] = row.rate.quartiles().map(|rate| rate / 1e6);
            let [sender, receiver] = row.cpu.each_ref().map(Spread::median);
            writeln!(
                f,
                "| {direction} | {} | {} | {:.0} | {low:.0} to {high:.0} | {:.0} | {:.2} | {sender:.2} | {receiver:.2} |",
                BinaryBytes(row.case.record_size),
                row.case.transport.name(),
                median / 1e6,
                median / row.case.record_size as f64,
                row.rung as f64 * 1e3 / row.records as f64,
            )?;
        }
        Ok(())
    }
}
