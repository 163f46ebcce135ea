//! The driver, checked from inside a guest: each of `barlink-driver-checks`'s checks is a test of its own over each transport, in a VM
//! of its own, and some are so once more in a guest with an IOMMU.

mod devices;
mod stage;

use std::process::ExitCode;

use anyhow::Result;
use barlink_driver_checks::{BEHIND_AN_IOMMU, CHECKS, PAUSING, SLEEPING, UNPLUGGING, regions};
use barlink_vm::broker::Transport;
use libtest_mimic::{Arguments, Trial};

use self::devices::Machine;
use self::stage::Stage;

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

/// Runs a check, and prints what it measured.
fn check(setting: Setting, name: &str) -> Result<()> {
    let mut stage = Stage::set(setting.transport, setting.machine, regions(name))?;
    for figure in stage.check(name)? {
        println!("{}: {figure}", setting.module());
    }
    Ok(())
}

fn main() -> ExitCode {
    let trial = |setting: Setting, name: &'static str| {
        let title = format!("{}::{name}", setting.module());
        Trial::test(title, move || {
            check(setting, name).map_err(|error| format!("{error:#}").into())
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
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
