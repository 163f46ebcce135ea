// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The results of the rounds, as a table.

use std::fmt;
use std::time::Duration;

use anyhow::Result;

use super::fault::Fault;
use super::watch::{Counts, Resets, Tapped, Watch};
use barlink_vm::broker::Transport;

/// The results of one run: see the module.
#[derive(Debug)]
pub struct Report {
    transport: Transport,
    seed: u64,
    rounds: usize,
    rows: Vec<Row>,
    total: Counts,
    tapped: Tapped,
    resets: Resets,
    time: Duration,
    /// The error that ended the run early.
    failure: Option<String>,
}

/// The results of the faults of one kind.
#[derive(Debug)]
struct Row {
    fault: Fault,
    faults: usize,
    recoveries: Vec<Duration>,
    counts: Counts,
}

impl Report {
    /// Creates a report without results.
    pub(super) fn new(transport: Transport, seed: u64, rounds: usize, faults: &[Fault]) -> Self {
        let row = |fault| Row {
            fault,
            faults: 0,
            recoveries: Vec::new(),
            counts: Counts::default(),
        };
        Self {
            transport,
            seed,
            rounds,
            rows: faults.iter().copied().map(row).collect(),
            total: Counts::default(),
            tapped: Tapped::default(),
            resets: Resets::default(),
            time: Duration::ZERO,
            failure: None,
        }
    }

    /// Adds a round: the time until records flowed again, if they did, and the counts of records.
    /// Returns the round's number and the number of all rounds, as text.
    pub(super) fn add(
        &mut self,
        fault: Fault,
        recovery: Option<Duration>,
        counts: Counts,
    ) -> String {
        if let Some(row) = self.rows.iter_mut().find(|row| row.fault == fault) {
            row.faults += 1;
            row.recoveries.extend(recovery);
            row.recoveries.sort();
            row.counts += counts;
        }
        format!("{}/{}", self.faults(), self.rounds)
    }

    /// Adds the outcome of a part of the rounds, and the counts of the whole part.
    pub(super) fn end(&mut self, outcome: Result<()>, watch: &Watch, time: Duration) {
        self.failure = outcome.err().map(|error| format!("{error:#}"));
        self.total += watch.counts();
        self.tapped += watch.tapped();
        self.resets += watch.resets;
        self.time += time;
    }

    fn faults(&self) -> usize {
        self.rows.iter().map(|row| row.faults).sum()
    }

    /// Returns whether all rounds were done, and no record was lost, repeated or torn.
    pub fn is_good(&self) -> bool {
        self.failure.is_none() && self.total.are_good()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let titles = [
            "times", "sent", "lost", "twice", "torn", "again", "median", "max",
        ];
        writeln!(f, "{}", line("fault", titles))?;
        for row in &self.rows {
            let seconds = |time: Option<&Duration>| match time {
                Some(time) => format!("{:.3} s", time.as_secs_f64()),
                None => "-".to_owned(),
            };
            let times = &row.recoveries;
            let times = [times.get(times.len() / 2), times.last()].map(seconds);
            let cells = cells(row.faults, &row.counts, times);
            writeln!(f, "{}", line(&row.fault.to_string(), cells))?;
        }
        let faults = self.faults();
        let cells = cells(faults, &self.total, Default::default());
        writeln!(f, "{}", line("all, and between the rounds", cells))?;
        let Tapped {
            sent,
            received,
            missed,
            dropped,
            skipped,
        } = self.tapped;
        writeln!(
            f,
            "since the last reset of each channel: {sent} records sent, of which a tap received \
             {received} and missed {missed}; {dropped} dropped, {skipped} numbers skipped"
        )?;
        let Resets {
            forced,
            discarded,
            repeated,
        } = self.resets;
        writeln!(
            f,
            "{forced} resets by force discarded {discarded} records, {repeated} were repeated"
        )?;
        let (transport, seconds) = (self.transport, self.time.as_secs_f64());
        writeln!(f, "over {transport}, seed {}, {seconds:.0} s", self.seed)?;
        let left_out = Fault::left_out(transport).into_iter();
        let left_out: Vec<_> = left_out
            .map(|(fault, why)| format!("{fault} ({why})"))
            .collect();
        writeln!(f, "left out: {}", left_out.join("; "))?;
        if let Some(failure) = &self.failure {
            writeln!(f, "FAILED in round {faults} of {}: {failure}", self.rounds)?;
        }
        if !self.total.are_good() {
            writeln!(f, "FAILED: records were lost, or came twice, or were torn")?;
        }
        Ok(())
    }
}

fn cells(faults: usize, counts: &Counts, [median, max]: [String; 2]) -> [String; 8] {
    let Counts {
        sent,
        lost,
        twice,
        torn,
        again,
    } = counts;
    let [sent, lost, twice, torn, again] = [sent, lost, twice, torn, again].map(u64::to_string);
    [
        faults.to_string(),
        sent,
        lost,
        twice,
        torn,
        again,
        median,
        max,
    ]
}

fn line(name: &str, cells: [impl fmt::Display; 8]) -> String {
    let cells = cells.map(|cell| format!("{cell:>9}"));
    format!("{name:<50}{}", cells.concat())
        .trim_end()
        .to_owned()
}
