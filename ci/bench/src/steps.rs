// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The time of each step of a small record on the host, and of an exchange between two processors,
//! which tells whether they share a core.

use std::fmt;
use std::time::Duration;

use anyhow::Result;
use barlink_bench_load::Step;
use serde::Serialize;

use super::host::start;
use super::scene::Scene;
use super::spread::Spread;

/// The name of the measurement.
pub const NAME: &str = "steps of a record";

/// The results: the name of each step, and its time in nanoseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    steps: Vec<(String, Spread)>,
}

impl Row {
    /// Measures one round.
    pub fn measure(&mut self, scene: &Scene, time: Duration) -> Result<()> {
        let time = format!("--time={}", time.as_millis());
        let steps: Vec<Step> = start(scene, &["steps", &time])?.wait()?;
        for Step { name, nanoseconds } in steps {
            let known = self.steps.iter().position(|(step, _)| *step == name);
            let place = known.unwrap_or_else(|| {
                self.steps.push((name, Spread::default()));
                self.steps.len() - 1
            });
            self.steps[place].1.add(nanoseconds);
        }
        Ok(())
    }
}

impl fmt::Display for Row {
    /// Formats the lines of a table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (step, time) in &self.steps {
            let (median, [low, high]) = (time.median(), time.range());
            writeln!(f, "| {step} | {median:.1} | {low:.1} to {high:.1} |")?;
        }
        Ok(())
    }
}
