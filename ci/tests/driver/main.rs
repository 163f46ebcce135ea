// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the driver from inside a guest, over each transport. Some checks run once more in a
//! guest with an IOMMU.
//!
//! Each topic of `barlink-driver-checks` is a test: its checks run one after the other in one VM,
//! because a VM costs more than most checks. A check that fails leaves its VM in an unknown state,
//! so the next check gets a new VM. In the tier of `cargo xtask soak` each check is a test of its
//! own.

mod devices;
mod stage;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use barlink_driver_checks::tier::Tier;
use barlink_driver_checks::{BEHIND_AN_IOMMU, PAUSING, SLEEPING, TOPICS, UNPLUGGING, regions};
use barlink_vm::broker::Transport;
use libtest_mimic::{Arguments, Trial};

use self::devices::Machine;
use self::stage::Stage;

/// The transport and the machine that a check runs with.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Setting {
    transport: Transport,
    machine: Machine,
}

impl Setting {
    /// Returns the module part of the test names, as in `ci/tests/transports/`.
    fn module(self) -> String {
        let name = self.transport.name().replace('-', "_");
        let driver = match self.machine {
            Machine::Usual | Machine::Sleeper => "driver",
            Machine::BehindAnIommu => "driver_behind_an_iommu",
        };
        format!("{name}::{driver}")
    }

    /// Returns whether a check applies to this setting.
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

/// Runs checks one after the other, and prints their measurements. The error names each check that
/// failed, and the reason.
fn check(setting: Setting, names: &[&str]) -> Result<()> {
    let mut stage = None;
    let mut failures = Vec::new();
    for name in names {
        let mut current = match stage.take() {
            Some(stage) => stage,
            None => match Stage::set(setting.transport, setting.machine, regions(names)) {
                Ok(stage) => stage,
                Err(error) => {
                    failures.push(format!("{name}: no VM: {error:#}"));
                    break;
                }
            },
        };
        println!("{name}");
        match current.check(name) {
            Ok(figures) => {
                figures.iter().for_each(|figure| println!("  {figure}"));
                stage = Some(current);
            }
            Err(error) => failures.push(format!("{name}: {error:#}")),
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n\n"));
    Ok(())
}

fn main() -> ExitCode {
    let trial = |setting: Setting, name: &str, checks: Vec<&'static str>| {
        let title = format!("{}::{name}", setting.module());
        Trial::test(title, move || {
            check(setting, &checks).map_err(|error| format!("{error:#}").into())
        })
    };
    let mut trials = Vec::new();
    for transport in Transport::ALL {
        for machine in [Machine::Usual, Machine::BehindAnIommu, Machine::Sleeper] {
            let setting = Setting { transport, machine };
            for (topic, checks) in TOPICS {
                let names = checks.iter().map(|(name, _)| *name);
                let names: Vec<_> = names.filter(|name| setting.has(name)).collect();
                match Tier::current() {
                    Tier::Test if names.is_empty() => (),
                    Tier::Test => trials.push(trial(setting, topic, names)),
                    Tier::Soak => trials.extend(
                        names
                            .into_iter()
                            .map(|name| trial(setting, name, vec![name])),
                    ),
                }
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
