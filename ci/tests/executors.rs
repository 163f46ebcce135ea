// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests that choose what executes their orders, and those under KVM, which count as skipped where
//! a probe shows that the bare guest does not run under it. `cargo xtask test` prints the reason.

use std::process::ExitCode;

use anyhow::Result;
use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::tools::Accel;
use barlink_vm::{Executor, check_bare_kvm};
use libtest_mimic::{Arguments, Trial};

/// A test: its name, the executors with which it runs, and the function.
pub type Test = (
    &'static str,
    &'static [Executor],
    fn(Executor) -> Result<()>,
);

/// QEMU executes the orders.
pub const QTEST: &[Executor] = &[Executor::Qtest];
/// QEMU executes the orders, or the bare guest under KVM. The scenes of `ci/tests/bare` are played
/// under TCG as well.
pub const EACH: &[Executor] = &[Executor::Qtest, Executor::Guest(Accel::Kvm)];

/// Makes a test whose name is that of its function.
#[macro_export]
macro_rules! test {
    ($executors:expr, $($path:ident)::+) => {
        (stringify!($($path)::+), $executors, $($path)::+)
    };
}

/// Returns whether the tests under KVM cannot run here. A list of the tests alone builds nothing,
/// and so has no probe.
pub fn leaves_kvm_out(arguments: &Arguments) -> bool {
    let can_probe = !arguments.list || Artifacts::are_passed_on();
    // Without artifacts each test fails, and says why.
    can_probe && Artifacts::shared().is_ok_and(|artifacts| check_bare_kvm(artifacts).is_err())
}

/// Runs tests over one transport.
pub fn run(transport: &str, tests: &'static [Test]) -> ExitCode {
    let arguments = Arguments::from_args();
    let no_kvm = leaves_kvm_out(&arguments);
    let mut trials = Vec::new();
    for (name, executors, test) in tests {
        // `stringify` puts spaces between the parts of a path.
        let name = name.replace(' ', "");
        for executor in *executors {
            let (module, is_kvm) = match executor {
                Executor::Qtest => ("qtest", false),
                Executor::Guest(Accel::Kvm) => ("kvm", true),
                Executor::Guest(Accel::Tcg) => ("tcg", false),
            };
            let title = format!("{transport}::{module}::{name}");
            let trial = Trial::test(title, move || {
                test(*executor).map_err(|error| format!("{error:#}").into())
            });
            trials.push(trial.with_ignored_flag(is_kvm && no_kvm));
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}
