// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Counts of passed, failed and skipped checks or tests.

use std::fmt;
use std::ops::AddAssign;
use std::process::ExitCode;

/// Numbers of passed, failed and skipped checks or tests.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Tally {
    /// Number of passed ones.
    pub passed: u64,
    /// Number of failed ones.
    pub failed: u64,
    /// Number of those that cannot run here.
    pub skipped: u64,
}

impl Tally {
    /// Counts one result.
    pub fn count(&mut self, passed: bool) {
        if passed {
            self.passed += 1;
        } else {
            self.failed += 1;
        }
    }

    /// Returns success if nothing failed.
    pub fn exit_code(self) -> ExitCode {
        if self.failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 {
            write!(f, ", {} skipped", self.skipped)?;
        }
        Ok(())
    }
}
