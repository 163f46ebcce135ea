// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The results as JSON and as a table.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::Result;
use indicatif::BinaryBytes;
use serde::Serialize;

use super::case::{Case, Direction, Way};
use super::scene::Conditions;
use super::spread::Spread;
use super::stream::Streamed;

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
    /// Rings of the producer in all rounds, where they are counted.
    rung: Option<u64>,
    /// Why it was not measured any further.
    failure: Option<String>,
}

impl Report {
    /// One without figures.
    pub(super) fn new(conditions: &Conditions, cases: &[Case]) -> Self {
        let row = |case: &Case| Row {
            case: case.clone(),
            rate: Spread::default(),
            cpu: Default::default(),
            records: 0,
            rung: None,
            failure: None,
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
            if let Some(rung) = rung {
                *row.rung.get_or_insert(0) += rung;
            }
        }
    }

    /// Notes that a case cannot be measured, and why.
    pub(super) fn fail(&mut self, case: &Case, error: &anyhow::Error) {
        for row in self.rows.iter_mut().filter(|row| row.case == *case) {
            row.failure = Some(format!("{error:#}"));
        }
    }

    /// Whether that was noted.
    pub(super) fn has_failed(&self, case: &Case) -> bool {
        let mut failed = self.rows.iter().filter(|row| row.failure.is_some());
        failed.any(|row| row.case == *case)
    }

    /// The median rate of one way as a part of another's, for records of this size.
    pub fn ratio(&self, ways: [(Way, Direction); 2], record_size: u64) -> Option<f64> {
        let rate = |(way, direction)| {
            let case = Case {
                way,
                direction,
                record_size,
            };
            let row = self.rows.iter().find(|row| row.case == case);
            row.map(|row| row.rate.median())
        };
        let [one, other] = ways.map(rate);
        Some(one? / other?)
    }

    /// Rings of producers for each record, over all that was measured.
    pub fn rings_per_record(&self) -> f64 {
        let counted = self.rows.iter();
        let counted = counted.filter_map(|row| Some((row.rung?, row.records)));
        let (rung, records) = counted.fold((0, 0), |(rings, all), (rung, records)| {
            (rings + rung, all + records)
        });
        rung as f64 / records as f64
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
             read in place by the receiver; records below 16 KiB are committed and released in batches of 16 KiB; ends spin for up to 50 µs, then nap, then sleep.\n"
        )?;
        writeln!(
            f,
            "| from where to where | how | record | MB/s | half of the rounds | records/s | rings in 1,000 records \
             | CPU s/GB, sender | receiver |"
        )?;
        writeln!(f, "|---|---|---:|---:|---:|---:|---:|---:|---:|")?;
        for row in &self.rows {
            if let Some(failure) = &row.failure {
                let (direction, way) = (row.case.direction.name(), row.case.way.name());
                let size = BinaryBytes(row.case.record_size);
                writeln!(f, "| {direction} | {way} | {size} | {failure} | | | | | |")?;
                continue;
            }
            let median = row.rate.median();
            let [low, high] = row.rate.quartiles().map(|rate| rate / 1e6);
            let [sender, receiver] = row.cpu.each_ref().map(Spread::median);
            let rings = row.rung.map_or(String::new(), |rung| {
                format!("{:.2}", rung as f64 * 1e3 / row.records as f64)
            });
            writeln!(
                f,
                "| {} | {} | {} | {:.0} | {low:.0} to {high:.0} | {:.0} | {rings} | {sender:.2} | {receiver:.2} |",
                row.case.direction.name(),
                row.case.way.name(),
                BinaryBytes(row.case.record_size),
                median / 1e6,
                median / row.case.record_size as f64,
            )?;
        }
        Ok(())
    }
}
