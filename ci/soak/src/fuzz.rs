// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask fuzz`: runs the fuzz targets of `ci/fuzz`, each for a while (`docs/decisions/0004-fuzzing.md`).

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use clap::Args;

use barlink_sandbox::builds::{NATIVE_TARGET, cargo, repository, target_folder};
use barlink_sandbox::host;
use barlink_sandbox::steps::Steps;
use crate::tally::Tally;

/// What to fuzz, and for how long.
#[derive(Args, Debug)]
pub struct FuzzArgs {
    /// The targets [default: all]
    #[arg(value_name = "TARGET")]
    pub targets: Vec<String>,

    /// Seconds for each target
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: u64,
}

/// What the compiler is told, so that the fuzzer sees which code an input reaches and what it is compared with: LLVM's
/// part of what nightly's `-Zsanitizer` and cargo-fuzz would say, every flag of it stable.
const INSTRUMENTATION: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];
/// Seconds after which one input is a finding of its own: no call may take long, whatever the other side does.
const PATIENCE: u64 = 10;

/// Fuzzes, and counts the targets by whether they found something.
pub fn run(args: &FuzzArgs) -> Result<ExitCode> {
    let targets = targets()?;
    for wanted in &args.targets {
        ensure!(
            targets.contains(wanted),
            "no target {wanted}; there are: {}",
            targets.join(", ")
        );
    }
    let wanted = |target: &String| args.targets.is_empty() || args.targets.contains(target);
    let targets: Vec<_> = targets.into_iter().filter(wanted).collect();
    let tally = fuzz(&targets, args.seconds)?;
    println!("{tally}");
    Ok(tally.exit_code())
}

/// The targets that there are: a file each.
pub fn targets() -> Result<Vec<String>> {
    let folder = repository().join("ci/fuzz/src/bin");
    let mut targets = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str());
        targets.extend(name.map(str::to_owned));
    }
    targets.sort();
    Ok(targets)
}

/// Builds these targets and runs each: over the inputs that are kept in the tree, those that earlier runs have found, and
/// then new ones. A finding is told and counted, and the others go on.
pub fn fuzz(targets: &[String], seconds: u64) -> Result<Tally> {
    let mut tally = Tally::default();
    if targets.is_empty() {
        return Ok(tally);
    }
    let folder = target_folder()?.join("fuzz");
    fs::create_dir_all(&folder)?;
    let steps = Steps::start(&folder.join("log"))?;
    // The fuzzer itself is C++.
    let compiles = std::env::var_os("CXX").is_some() || host::on_path("c++");
    host::install(&steps, &[("g++", compiles)])?;
    steps.step("building the fuzz targets", || {
        steps.run(&mut build(&folder))
    })?;
    for target in targets {
        let what = format!("fuzzing {target} for {seconds} s");
        let outcome = steps.step(&what, || run_target(target, &folder, seconds));
        match outcome {
            Ok(summary) => {
                println!("test fuzz::{target} ... ok ({summary})");
                tally.count(true);
            }
            Err(error) => {
                let Finding(finding) = error.downcast()?;
                println!("test fuzz::{target} ... FAILED\n{finding}");
                tally.count(false);
            }
        }
    }
    Ok(tally)
}

/// The command that builds the targets, instrumented, in this folder.
fn build(folder: &Path) -> Command {
    let mut command = cargo("build");
    command.args(["--manifest-path=ci/fuzz/Cargo.toml", "--release", "--bins"]);
    // With a target named, the flags are not for what runs in the build itself.
    command.arg(format!("--target={NATIVE_TARGET}"));
    command.arg("--target-dir").arg(folder);
    // Of all ways to give flags this one outranks the others.
    command.env("CARGO_ENCODED_RUSTFLAGS", INSTRUMENTATION.join("\x1f"));
    command
}

/// What a target found, and where.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Finding(String);

/// Runs one target, and tells how far it came; fails with what it found.
fn run_target(target: &str, folder: &Path, seconds: u64) -> Result<String> {
    let program = folder.join(NATIVE_TARGET).join("release").join(target);
    let found = folder.join("corpus").join(target);
    let findings = folder.join("findings").join(target);
    let log = folder.join(format!("{target}.log"));
    fs::create_dir_all(&found)?;
    fs::create_dir_all(&findings)?;
    let mut command = Command::new(&program);
    // What it finds goes to the first folder.
    command.arg(found).arg(kept(target));
    let words = repository().join(format!("ci/fuzz/words/{target}"));
    if words.is_file() {
        command.arg(format!("-dict={}", words.display()));
    }
    command.arg(format!("-max_total_time={seconds}"));
    command.arg(format!("-timeout={PATIENCE}"));
    command.arg(format!("-artifact_prefix={}/", findings.display()));
    command.arg("-print_final_stats=1");
    let file = File::create(&log).with_context(|| format!("{} cannot be made", log.display()))?;
    let status = command
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("{} cannot be started", program.display()))?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    ensure!(status.success(), Finding(describe(&text, &program, &log)));
    let figure = |name| figure(&text, name).with_context(|| format!("{target} has not run"));
    Ok(format!(
        "{} inputs, {} a second",
        figure("number_of_executed_units")?,
        figure("average_exec_per_sec")?
    ))
}

/// The inputs of a target that are kept in the tree.
fn kept(target: &str) -> PathBuf {
    repository().join("ci/fuzz/corpus").join(target)
}

/// A figure that libFuzzer prints at its end, as `stat::NAME: 12`.
fn figure<'a>(log: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = log.lines();
    lines.find_map(|line| {
        Some(
            line.strip_prefix("stat::")?
                .strip_prefix(name)?
                .strip_prefix(':')?
                .trim(),
        )
    })
}

/// What a target found, by its log: what failed, and how to see it again.
fn describe(text: &str, program: &Path, log: &Path) -> String {
    let mut told = Vec::new();
    // A panic's place, and on the next line its message.
    let panic = text
        .lines()
        .skip_while(|line| !line.contains("panicked at"));
    told.extend(panic.take(2).map(str::to_owned));
    let summary = text.lines().find(|line| line.starts_with("SUMMARY: "));
    told.extend(summary.map(str::to_owned));
    if told.is_empty() {
        told.extend(text.lines().last().map(str::to_owned));
    }
    let input = text
        .split("Test unit written to ")
        .nth(1)
        .and_then(|rest| rest.lines().next());
    told.extend(input.map(|input| format!("run it again: {} {input}", program.display())));
    told.push(format!("all that was said: {}", log.display()));
    told.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_inputs_in_the_tree() -> Result<()> {
        let targets = targets()?;
        assert!(targets.len() >= 8, "{targets:?}");
        for target in targets {
            let inputs = fs::read_dir(kept(&target)).map_or(0, Iterator::count);
            assert!(inputs > 0, "{target} has none");
        }
        Ok(())
    }

    #[test]
    fn figures_are_found_by_their_whole_names() {
        let log = "stat::number_of_executed_units: 2391\nstat::average_exec_per_sec:     12\n";
        assert_eq!(figure(log, "average_exec_per_sec"), Some("12"));
        assert_eq!(figure(log, "number_of_executed_units"), Some("2391"));
        assert_eq!(figure(log, "number"), None);
    }

    #[test]
    fn finding_names_the_panic_and_the_input() {
        let log = "#7 NEW\nthread '<unnamed>' (8) panicked at src/bin/x.rs:1:2:\nno end\nstack backtrace:\n  0: f\n\
                   SUMMARY: libFuzzer: deadly signal\n\
                   artifact_prefix='/f/'; Test unit written to /f/crash-1\nBase64: AA==\n";
        let told = describe(log, Path::new("/t/x"), Path::new("/t/x.log"));
        let lines: Vec<&str> = told.lines().collect();
        assert_eq!(
            lines,
            [
                "thread '<unnamed>' (8) panicked at src/bin/x.rs:1:2:",
                "no end",
                "SUMMARY: libFuzzer: deadly signal",
                "run it again: /t/x /f/crash-1",
                "all that was said: /t/x.log",
            ]
        );
    }
}
