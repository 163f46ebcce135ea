// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The time of each step of a small record on the host, and of an exchange between two processors,
//! which tells whether they share a core.

use std::fmt;
use std::time::Duration;

use anyhow::Result;
use barlink_bench_load::StepTimes;
use serde::Serialize;

use super::host::start;
use super::scene::Scene;
use super::spread::Spread;

/// The name of the measurement.
pub const NAME: &str = "steps of a record";

/// The results, in nanoseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    copy: Spread,
    commit: Spread,
    fence: Spread,
    clock: Spread,
    find: Spread,
    release: Spread,
    ring: Spread,
    write: Spread,
    exchange: Spread,
}

impl Row {
    /// Measures one round.
    pub fn measure(&mut self, scene: &Scene, time: Duration) -> Result<()> {
        let time = format!("--time={}", time.as_millis());
        let StepTimes {
            copy,
            commit,
            fence,
            clock,
            find,
            release,
            ring,
            write,
            exchange,
        } = start(scene, &["steps", &time])?.wait()?;
        self.copy.add(copy);
        self.commit.add(commit);
        self.fence.add(fence);
        self.clock.add(clock);
        self.find.add(find);
        self.release.add(release);
        self.ring.add(ring);
        self.write.add(write);
        self.exchange.add(exchange);
        Ok(())
    }
}

impl fmt::Display for Row {
    /// Formats the lines of a table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (step, time) in [
            ("producer: copy the record and its header", &self.copy),
            ("producer: read the clock", &self.clock),
            (
                "producer: commit (note, cursor, fence, threshold)",
                &self.commit,
            ),
            ("consumer: find the record and check its header", &self.find),
            (
                "consumer: release (cursor, fence, threshold)",
                &self.release,
            ),
            ("a store and a full fence alone", &self.fence),
            ("ring an end that is awake", &self.ring),
            ("write to its eventfd, which can wait", &self.write),
            (
                "a line of memory, to the other processor and back",
                &self.exchange,
            ),
        ] {
            let [low, high] = time.range();
            writeln!(
                f,
                "| {step} | {:.1} | {low:.1} to {high:.1} |",
                time.median()
            )?;
        }
        Ok(())
    }
}
