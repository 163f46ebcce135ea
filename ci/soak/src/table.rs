// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What came of the parts, as a table.

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;

use crate::part::Part;

/// See the module.
#[derive(Debug)]
pub struct Table {
    seed: u64,
    rows: Vec<Row>,
    left_out: Vec<String>,
}

#[derive(Debug)]
struct Row {
    part: String,
    time: Duration,
    /// What was done, such as `200 rounds`; `None` where it failed.
    done: Option<String>,
}

impl Table {
    /// An empty one.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            rows: Vec::new(),
            left_out: Vec::new(),
        }
    }

    /// Adds a part, with what was done, or how it failed.
    pub fn add(&mut self, part: &Part, time: Duration, outcome: Result<String>) {
        self.rows.push(Row {
            part: part.name.clone(),
            time,
            done: outcome.ok(),
        });
    }

    /// Adds the parts that there was no time for.
    pub fn leave_out(&mut self, parts: &[Part]) {
        self.left_out
            .extend(parts.iter().map(|part| part.name.clone()));
    }

    /// Success if no part failed.
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
            let again = format!("cargo xtask soak {} --seed {}", row.part, self.seed);
            let time = format!("{:.0} s", row.time.as_secs_f64());
            let (done, result) = match &row.done {
                Some(done) => (done.as_str(), "ok"),
                None => ("-", "FAILED"),
            };
            line(&row.part, &time, done, result, &again)?;
        }
        if !self.left_out.is_empty() {
            let parts = self.left_out.join(", ");
            writeln!(f, "no time was left for: {parts}")?;
        }
        let failed = self.failed();
        writeln!(f, "{} passed, {failed} failed", self.rows.len() - failed)
    }
}
