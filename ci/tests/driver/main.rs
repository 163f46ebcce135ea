//! The driver, checked from inside a guest: each of `barlink-driver-checks`'s checks is a test of its own over each transport.
//!
//! Those over one transport run in one VM, one after the other, since a boot takes longer than most of them. After one that
//! fails nothing is known of that VM any more, and the next gets a new one.

mod devices;
mod stage;

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use barlink_driver_checks::{CHECKS, PAUSING, SLEEPING, UNPLUGGING};
use clap::ValueEnum;
use libtest_mimic::{Arguments, Trial};
use xtask::broker::Transport;

use self::devices::Machine;
use self::stage::Stage;

/// What the checks have in common.
#[derive(Default)]
struct Shared {
    /// The VM of a kind and what is around it, if a check has needed it, and none has failed since. One at a time, since it keeps
    /// several processors busy.
    stage: Option<((Transport, Machine), Stage)>,
    /// What was measured.
    figures: Vec<String>,
}

impl Shared {
    fn check(&mut self, transport: Transport, name: &str) -> Result<()> {
        let machine = match SLEEPING.contains(&name) {
            true => Machine::Sleeper,
            false => Machine::Usual,
        };
        let wanted = (transport, machine);
        // One of another kind goes before the next one boots.
        let stage = self.stage.take().filter(|(kind, _)| *kind == wanted);
        let mut stage = match stage {
            Some((_, stage)) => stage,
            None => Stage::set(transport, machine)?,
        };
        let figures = stage.check(name)?.into_iter();
        self.figures
            .extend(figures.map(|figure| format!("{}: {figure}", module(transport))));
        self.stage = Some((wanted, stage));
        Ok(())
    }
}

/// What the tests over a transport are called: as in `ci/tests/transports/`.
fn module(transport: Transport) -> String {
    let name = transport.to_possible_value();
    let name = name.as_ref().map_or("", |value| value.get_name());
    name.replace('-', "_")
}

/// Whether a check makes sense over a transport.
fn applies(transport: Transport, name: &str) -> bool {
    let unplugs = devices::unplugs(transport) || !UNPLUGGING.contains(&name);
    let pauses = transport != Transport::VfioUser || !PAUSING.contains(&name);
    unplugs && pauses
}

fn main() -> ExitCode {
    let shared = Arc::new(Mutex::new(Shared::default()));
    let trial = |transport: Transport, name: &'static str| {
        let shared = Arc::clone(&shared);
        let title = format!("{}::driver::{name}", module(transport));
        Trial::test(title, move || {
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            shared
                .check(transport, name)
                .map_err(|error| format!("{error:#}").into())
        })
    };
    let mut trials = Vec::new();
    for &transport in Transport::value_variants() {
        let names = CHECKS.iter().map(|(name, _)| *name);
        let names = names.filter(|name| applies(transport, name));
        trials.extend(names.map(|name| trial(transport, name)));
    }
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
