// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The table of results.

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;

use crate::SoakArgs;
use crate::part::{Part, Work};
use crate::session::Done;

/// The table of results.
#[derive(Debug)]
pub struct Table {
    /// The options that repeat each part of this run.
    options: String,
    rounds: u64,
    fault: Option<String>,
    seconds: u64,
    rows: Vec<Row>,
    left_out: Vec<String>,
}

#[derive(Debug)]
struct Row {
    part: String,
    /// The command that repeats the part.
    again: String,
    time: Duration,
    /// The work that was done, such as `200 rounds`; `None` for a failure.
    done: Option<Done>,
}

impl Table {
    /// Creates a table without rows.
    pub fn new(args: &SoakArgs, seed: u64) -> Self {
        let mut options = format!("--seed {seed}");
        for (name, value) in args.vm.environment() {
            let option = name.trim_start_matches("BARLINK_").to_lowercase();
            let option = option.replace('_', "-");
            options += &format!(" --{option} {}", value.display());
        }
        Self {
            options,
            rounds: args.rounds,
            fault: args.fault.clone(),
            seconds: args.seconds,
            rows: Vec::new(),
            left_out: Vec::new(),
        }
    }

    /// Adds a part with the work that was done, or its failure.
    pub fn add(&mut self, part: &Part, time: Duration, outcome: Result<Done>) {
        let mut again = format!("cargo xtask soak {} {}", part.name, self.options);
        match part.work {
            Work::Crash(_) => {
                again += &format!(" --rounds {}", self.rounds);
                if let Some(fault) = &self.fault {
                    again += &format!(" --fault '{fault}'");
                }
            }
            Work::Fuzz(_) => again += &format!(" --seconds {}", self.seconds),
            Work::Tests(_) | Work::Distribution | Work::Mutation(_) => (),
        }
        self.rows.push(Row {
            part: part.name.clone(),
            again,
            time,
            done: outcome.ok(),
        });
    }

    /// Adds the parts for which no time was left.
    pub fn leave_out(&mut self, parts: &[Part]) {
        self.left_out
            .extend(parts.iter().map(|part| part.name.clone()));
    }

    /// Returns success if no part failed.
    pub fn exit_code(&self) -> ExitCode {
        match self.failed() {
            0 => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        }
    }

    fn failed(&self) -> usize {
        self.rows.iter().filter(|row| row.done.is_none()).count()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |part: &str, time: &str, done: &str, result: &str, again: &str| {
            writeln!(f, "{part:<36} {time:>7}  {done:<22} {result:<7} {again}")
        };
        line("part", "time", "done", "result", "again")?;
        for row in &self.rows {
            let time = format!("{:.0} s", row.time.as_secs_f64());
            let (done, result) = match &row.done {
                Some(Done::Work(done)) => (done.as_str(), "ok"),
                Some(Done::Skipped(reason)) => (reason.as_str(), "skipped"),
                None => ("-", "FAILED"),
            };
            line(&row.part, &time, done, result, &row.again)?;
        }
        if !self.left_out.is_empty() {
            let parts = self.left_out.join(", ");
            writeln!(f, "no time was left for: {parts}")?;
        }
        let failed = self.failed();
        let is_skipped = |row: &&Row| matches!(row.done, Some(Done::Skipped(_)));
        let skipped = self.rows.iter().filter(is_skipped).count();
        let passed = self.rows.len() - failed - skipped;
        write!(f, "{passed} passed, {failed} failed")?;
        match skipped {
            0 => writeln!(f),
            _ => writeln!(f, ", {skipped} skipped"),
        }
    }
}
