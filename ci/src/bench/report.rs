// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The results as JSON and as tables.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use serde::Serialize;

use super::case::{Case, Direction, Way};
use super::scene::Conditions;
use super::stream;
use super::trip;

/// What was measured, and under which conditions.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    conditions: Conditions,
    pub(super) streams: Vec<stream::Row>,
    pub(super) trips: Vec<trip::Row>,
}

impl Report {
    /// One without figures, for streams with records of these sizes.
    pub(super) fn new(conditions: Conditions, sizes: &[u64]) -> Self {
        Self {
            conditions,
            streams: Case::all(sizes).into_iter().map(stream::Row::new).collect(),
            trips: trip::Trip::all().into_iter().map(trip::Row::new).collect(),
        }
    }

    /// Keeps only what has one of these texts in its name, if there are any.
    pub(super) fn keep(&mut self, only: &[String]) -> Result<()> {
        let wanted = |name: String| only.is_empty() || only.iter().any(|text| name.contains(text));
        self.streams.retain(|row| wanted(row.case.to_string()));
        self.trips.retain(|row| wanted(row.trip.to_string()));
        ensure!(
            !self.streams.is_empty() || !self.trips.is_empty(),
            "nothing has {} in its name (--only)",
            only.join(" or ")
        );
        Ok(())
    }

    /// The median rate of one way as a part of another's, for records of this size.
    pub fn ratio(&self, ways: [(Way, Direction); 2], record_size: u64) -> Option<f64> {
        let rate = |(way, direction)| {
            let case = Case {
                way,
                direction,
                record_size,
            };
            let row = self.streams.iter().find(|row| row.case == case);
            row.map(|row| row.rate.median())
        };
        let [one, other] = ways.map(rate);
        Some(one? / other?)
    }

    /// Rings of the producer for each record, where they were most.
    pub fn most_rings_per_record(&self) -> f64 {
        let counted = self.streams.iter();
        let counted = counted.filter_map(|row| Some(row.rung? as f64 / row.records as f64));
        counted.fold(0.0, f64::max)
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
    /// Markdown.
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
             processors of the guest on {host_cpus} of the host.\n\n\
             Streams: records are copied in by the sender, and every byte is read in place by the receiver; records \
             below 16 KiB are committed and released in batches of 16 KiB; ends spin for up to 50 µs, then nap, then \
             sleep. A peer's record is one `write`.\n"
        )?;
        writeln!(
            f,
            "| from where to where | how | record | MB/s | half of the rounds | records/s | rings in 1,000 records \
             | CPU s/GB, sender | receiver |"
        )?;
        writeln!(f, "|---|---|---:|---:|---:|---:|---:|---:|---:|")?;
        for row in &self.streams {
            write!(f, "{row}")?;
        }
        writeln!(
            f,
            "\nRound trips of 64 bytes: the guest asks, the host answers. Times in µs, medians of the rounds.\n"
        )?;
        writeln!(
            f,
            "| how | median | half of the rounds | 99 % | 99.9 % | longest |"
        )?;
        writeln!(f, "|---|---:|---:|---:|---:|---:|")?;
        for row in &self.trips {
            write!(f, "{row}")?;
        }
        Ok(())
    }
}
