//! The driver, checked from inside a guest: each of `barlink-driver-checks`'s checks is a test of its own over each transport, and some
//! are so once more in a guest with an IOMMU.
//!
//! Those over one transport run in one VM of each kind, one after the other, since a boot takes longer than most of them. After one that
//! fails nothing is known of that VM any more, and the next gets a new one.

mod devices;
mod stage;

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use barlink_driver_checks::{BEHIND_AN_IOMMU, CHECKS, PAUSING, SLEEPING, UNPLUGGING};
use barlink_vm::broker::Transport;
use libtest_mimic::{Arguments, Trial};

use self::devices::Machine;
use self::stage::Stage;

/// What the checks have in common.
#[derive(Default)]
struct Shared {
    /// The VM of a setting and what is around it, if a check has needed it, and none has failed since. One at a time, since
    /// it keeps several processors busy.
    stage: Option<(Setting, Stage)>,
    /// What was measured.
    figures: Vec<String>,
}

/// What a check is run in.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Setting {
    transport: Transport,
    machine: Machine,
}

impl Setting {
    /// What its tests are called: as in `ci/tests/transports/`.
    fn module(self) -> String {
        let name = self.transport.name().replace('-', "_");
        let driver = match self.machine {
            Machine::Usual | Machine::Sleeper => "driver",
            Machine::BehindAnIommu => "driver_behind_an_iommu",
        };
        format!("{name}::{driver}")
    }

    /// Whether a check makes sense in it.
    fn has(self, name: &str) -> bool {
        let unplugs = devices::unplugs(self.transport) || !UNPLUGGING.contains(&name);
        let pauses = self.transport != Transport::VfioUser || !PAUSING.contains(&name);
        let suits = match self.machine {
            Machine::Usual => !SLEEPING.contains(&name),
            Machine::BehindAnIommu => BEHIND_AN_IOMMU.contains(&name),
            Machine::Sleeper => SLEEPING.contains(&name),
        };
        unplugs && pauses && suits
    }
}

impl Shared {
    fn check(&mut self, setting: Setting, name: &str) -> Result<()> {
        // Another setting's goes before the next one boots.
        let stage = self.stage.take().filter(|(at, _)| *at == setting);
        let mut stage = match stage {
            Some((_, stage)) => stage,
            None => Stage::set(setting.transport, setting.machine)?,
        };
        let figures = stage.check(name)?.into_iter();
        self.figures
            .extend(figures.map(|figure| format!("{}: {figure}", setting.module())));
        self.stage = Some((setting, stage));
        Ok(())
    }
}

fn main() -> ExitCode {
    let shared = Arc::new(Mutex::new(Shared::default()));
    let trial = |setting: Setting, name: &'static str| {
        let shared = Arc::clone(&shared);
        let title = format!("{}::{name}", setting.module());
        Trial::test(title, move || {
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            shared
                .check(setting, name)
                .map_err(|error| format!("{error:#}").into())
        })
    };
    let mut trials = Vec::new();
    for transport in Transport::ALL {
        for machine in [Machine::Usual, Machine::BehindAnIommu, Machine::Sleeper] {
            let setting = Setting { transport, machine };
            let names = CHECKS.iter().map(|(name, _)| *name);
            let names = names.filter(|name| setting.has(name));
            trials.extend(names.map(|name| trial(setting, name)));
        }
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
