// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A session builds the needs of a part, once, and runs it.

use anyhow::{Context, Result, ensure};
use barlink_driver_checks::tier::{self, Tier};
use barlink_sandbox::builds::{Artifacts, Programs};
use barlink_sandbox::nextest::Nextest;
use barlink_sandbox::setup;
use barlink_vm::{check_bare_kvm, check_kernel_boots};

use crate::part::{Part, Work};
use crate::{SoakArgs, crash, distribution, fuzz, mutation};

/// The profile of `.config/nextest.toml` for tests.
pub const PROFILE: &str = "soak";

/// The end of a part that found no fault.
#[derive(Debug)]
pub enum Done {
    /// A short text about the work.
    Work(String),
    /// The reason why the part cannot run here.
    Skipped(String),
}

/// State that the parts of one run share.
#[derive(Debug)]
pub struct Session<'a> {
    args: &'a SoakArgs,
    seed: u64,
    tests: Option<(Nextest, Artifacts)>,
    crash: Option<Artifacts>,
    fuzz_is_built: bool,
}

impl<'a> Session<'a> {
    /// Creates a session in which nothing is built yet.
    pub fn new(args: &'a SoakArgs, seed: u64) -> Self {
        Self {
            args,
            seed,
            tests: None,
            crash: None,
            fuzz_is_built: false,
        }
    }

    /// Runs a part to its end. Returns the work that was done.
    ///
    /// # Errors
    ///
    /// The part found a fault, or could not be run.
    pub fn run(&mut self, part: &Part) -> Result<Done> {
        let work = match &part.work {
            Work::Distribution => return distribution::run(&self.args.vm),
            Work::Tests(filter) => self.test(filter),
            Work::Crash(transport) => {
                let (rounds, fault) = (self.args.rounds, self.args.fault.as_deref());
                let seed = self.seed;
                // The choice of faults can fail, so it comes before the builds, which take long.
                let faults = crash::chosen(*transport, fault)?;
                let artifacts = self.crash()?;
                let report = crash::crash(artifacts, *transport, &faults, rounds as usize, seed)?;
                print!("{report}");
                ensure!(report.is_good(), "see the table above");
                Ok(format!("{rounds} rounds"))
            }
            Work::Fuzz(target) => {
                if !self.fuzz_is_built {
                    fuzz::build()?;
                    self.fuzz_is_built = true;
                }
                fuzz::run(target, self.args.seconds, self.seed)
            }
            Work::Mutation(mutation) => {
                let (nextest, artifacts) = self.tests()?;
                mutation::run(mutation, nextest, artifacts)
            }
        };
        work.map(Done::Work)
    }

    fn test(&mut self, filter: &str) -> Result<String> {
        let (nextest, artifacts) = self.tests()?;
        let mut command = nextest.command(PROFILE);
        command.args(["--filterset", filter]);
        command.envs(artifacts.environment()?);
        command.env(tier::VARIABLE, Tier::Soak.to_string());
        let report = nextest.run(&mut command, PROFILE)?;
        ensure!(report.failed == 0, "{} tests failed", report.failed);
        let mut done = match report.passed {
            1 => "1 test".to_owned(),
            many => format!("{many} tests"),
        };
        if report.skipped > 0 {
            done += &format!(", {} skipped", report.skipped);
            if let Err(reason) = check_bare_kvm(artifacts) {
                done += &format!(": {reason:#}");
            }
        }
        Ok(done)
    }

    /// Returns the tests and the artifacts that they need. Builds them in the first call.
    fn tests(&mut self) -> Result<(&Nextest, &Artifacts)> {
        if self.tests.is_none() {
            let artifacts = self.build(Programs::TEST)?;
            self.tests = Some((Nextest::build()?, artifacts));
        }
        let (nextest, artifacts) = self.tests.as_ref().context("no tests are built")?;
        Ok((nextest, artifacts))
    }

    fn crash(&mut self) -> Result<&Artifacts> {
        if self.crash.is_none() {
            self.crash = Some(self.build(Programs::CRASH)?);
        }
        self.crash.as_ref().context("no loads are built")
    }

    fn build(&self, programs: Programs) -> Result<Artifacts> {
        let tools = setup::ensure(&self.args.vm.tools)?;
        let artifacts = Artifacts::build(tools, self.args.vm.clone(), programs)?;
        check_kernel_boots(&artifacts)?;
        Ok(artifacts)
    }
}
