// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask check`: checks the code without running it. Continues after a failure, so that one
//! run shows all failures.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::tally::Tally;
use crate::words;
use barlink_sandbox::builds::{cargo, driver, repository, target_folder};
use barlink_sandbox::setup;
use barlink_sandbox::tools::{ToolArgs, Tools};

/// Runs all checks and counts them.
pub fn run(args: &ToolArgs) -> Result<ExitCode> {
    let mut tally = Tally::default();
    let target = target_folder()?;
    for (what, mut command) in cargo_checks(&target) {
        eprintln!("== {what}");
        let passed = command.status().is_ok_and(|status| status.success());
        report(&mut tally, what, passed);
    }
    eprintln!("== words");
    let faults = words::faults(&repository())?;
    faults.iter().for_each(|fault| eprintln!("{fault}"));
    report(&mut tally, "words", faults.is_empty());
    for tools in kernels(args)? {
        let what = format!("driver for {}", tools.release);
        eprintln!("== {what}");
        let built = driver(&tools, &target);
        if let Err(error) = &built {
            eprintln!("{error:#}");
        }
        report(&mut tally, &what, built.is_ok());
    }
    println!("{tally}");
    Ok(tally.exit_code())
}

fn report(tally: &mut Tally, what: &str, passed: bool) {
    tally.count(passed);
    println!("{} {what}", if passed { "ok    " } else { "FAILED" });
}

fn cargo_checks(target: &Path) -> [(&'static str, Command); 7] {
    let mut format = cargo("fmt");
    format.args(["--all", "--check"]);
    let mut lints = cargo("clippy");
    lints.args(["--workspace", "--all-targets", "--", "--deny=warnings"]);
    let mut documentation = cargo("doc");
    documentation.args(["--workspace", "--no-deps"]);
    documentation.env("RUSTDOCFLAGS", "--deny=warnings");
    let mut examples = cargo("test");
    examples.args(["--workspace", "--doc", "--quiet"]);
    let mut header = cargo("run");
    header.args(["--quiet", "--package", "barlink-bindings", "--", "--check"]);
    let fuzz = "--manifest-path=ci/fuzz/Cargo.toml";
    let mut fuzz_format = cargo("fmt");
    fuzz_format.args([fuzz, "--check"]);
    let mut fuzz_lints = cargo("clippy");
    fuzz_lints.args([fuzz, "--no-default-features", "--lib", "--bins"]);
    fuzz_lints.arg("--target-dir").arg(target);
    fuzz_lints.args(["--", "--deny=warnings"]);
    [
        ("format", format),
        ("lints", lints),
        ("documentation", documentation),
        ("examples in the documentation", examples),
        ("header of the library for C", header),
        ("format of the fuzz targets", fuzz_format),
        ("lints of the fuzz targets", fuzz_lints),
    ]
}

/// Returns the tools of each kernel that the driver is built for: the user's own, or the newest of
/// each series that is set up. If none is set up, sets up one.
fn kernels(args: &ToolArgs) -> Result<Vec<Tools>> {
    let mut all: Vec<Tools> = Vec::new();
    if args.kernel_headers.is_none() {
        for sandbox in setup::finished(args)? {
            let series = sandbox.version().map(|version| version.series());
            let known = |tools: &Tools| {
                let other = tools.sandbox.as_ref().and_then(|other| other.version());
                other.map(|version| version.series()) == series
            };
            if !all.iter().any(known) {
                all.push(Tools::with_sandbox(args, sandbox)?);
            }
        }
    }
    if all.is_empty() {
        all.push(setup::ensure(args)?);
    }
    Ok(all)
}
