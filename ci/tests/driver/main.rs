//! The driver, checked from inside a guest: each of `barlink-driver-checks`'s checks is a test of its own.
//!
//! All run in one VM, one after the other, since a boot takes longer than most of them. After one that fails nothing is
//! known of that VM any more, and the next gets a new one.

mod devices;
mod stage;
mod tap;

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use barlink_driver_checks::CHECKS;
use libtest_mimic::{Arguments, Trial};

use self::stage::Stage;

/// What the checks have in common.
#[derive(Default)]
struct Shared {
    /// The VM and what is around it, if a check has needed it, and none has failed since.
    stage: Option<Stage>,
    /// What was measured.
    figures: Vec<String>,
}

impl Shared {
    fn check(&mut self, name: &str) -> Result<()> {
        let mut stage = match self.stage.take() {
            Some(stage) => stage,
            None => Stage::set()?,
        };
        self.figures.extend(stage.check(name)?);
        self.stage = Some(stage);
        Ok(())
    }
}

fn main() -> ExitCode {
    let shared = Arc::new(Mutex::new(Shared::default()));
    let trial = |&(name, _): &(&'static str, _)| {
        let shared = Arc::clone(&shared);
        Trial::test(name, move || {
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            shared
                .check(name)
                .map_err(|error| format!("{error:#}").into())
        })
    };
    let trials = CHECKS.iter().map(trial).collect();
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    for figure in &shared
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .figures
    {
        println!("{figure}");
    }
    conclusion.exit_code()
}
