// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The parts `fuzz-…`: each runs a fuzz target of `ci/fuzz` for a while
//! (`docs/decisions/0004-fuzzing.md`).

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use barlink_sandbox::builds::{NATIVE_TARGET, cargo, repository, target_folder};
use barlink_sandbox::host;
use barlink_sandbox::steps::Steps;

/// Flags of the compiler that show the fuzzer which code an input reaches and which values it is
/// compared with. They are LLVM's part of the flags that nightly's `-Zsanitizer` and cargo-fuzz
/// set. All of them are stable.
const INSTRUMENTATION: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];
/// Time limit of one input, in seconds. A longer run is a finding, because no call may take long,
/// independent of the other side.
const TIMEOUT: u64 = 10;

/// Returns the names of the targets. Each target is a file.
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

/// Returns the folder for all builds and results.
fn folder() -> Result<PathBuf> {
    let folder = target_folder()?.join("fuzz");
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Builds the targets with instrumentation.
pub fn build() -> Result<()> {
    let folder = folder()?;
    let steps = Steps::start(&folder.join("log"))?;
    // The fuzzer itself is C++.
    let compiles = std::env::var_os("CXX").is_some() || host::on_path("c++");
    host::install(&steps, &[("g++", compiles)])?;
    steps.step("building the fuzz targets", || {
        let mut command = cargo("build");
        command.args(["--manifest-path=ci/fuzz/Cargo.toml", "--release", "--bins"]);
        // With a named target, cargo does not apply the flags to build scripts.
        command.arg(format!("--target={NATIVE_TARGET}"));
        command.arg("--target-dir").arg(&folder);
        // This variable takes precedence over all other ways to set flags.
        command.env("CARGO_ENCODED_RUSTFLAGS", INSTRUMENTATION.join("\x1f"));
        steps.run(&mut command)
    })
}

/// Runs a target that is built: on the inputs in the tree, on the inputs that earlier runs have
/// found, and then on new inputs that follow from the seed. Returns the number of inputs as text.
///
/// # Errors
///
/// The target found a fault.
pub fn run(target: &str, seconds: u64, seed: u64) -> Result<String> {
    let folder = folder()?;
    let steps = Steps::start(&folder.join("log"))?;
    let what = format!("fuzzing {target} for {seconds} s");
    steps.step(&what, || run_target(target, &folder, seconds, seed))
}

/// Runs one target, and returns the number of inputs as text. The error describes the finding.
fn run_target(target: &str, folder: &Path, seconds: u64, seed: u64) -> Result<String> {
    let program = folder.join(NATIVE_TARGET).join("release").join(target);
    let found = folder.join("corpus").join(target);
    let findings = folder.join("findings").join(target);
    let log = folder.join(format!("{target}.log"));
    fs::create_dir_all(&found)?;
    fs::create_dir_all(&findings)?;
    let mut command = Command::new(&program);
    // libFuzzer writes new inputs to the first folder.
    command.arg(found).arg(kept(target));
    let words = repository().join(format!("ci/fuzz/words/{target}"));
    if words.is_file() {
        command.arg(format!("-dict={}", words.display()));
    }
    command.arg(format!("-max_total_time={seconds}"));
    // libFuzzer takes the seed 0 for a seed from the clock, and does not accept more than 32 bits.
    command.arg(format!("-seed={}", seed % u64::from(u32::MAX) + 1));
    command.arg(format!("-timeout={TIMEOUT}"));
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
    ensure!(status.success(), describe(&text, &program, &log));
    let figure = |name| figure(&text, name).with_context(|| format!("{target} has not run"));
    Ok(format!("{} inputs", figure("number_of_executed_units")?))
}

/// Returns the folder with the inputs of a target in the tree.
fn kept(target: &str) -> PathBuf {
    repository().join("ci/fuzz/corpus").join(target)
}

/// Returns a number that libFuzzer prints at its end, as `stat::NAME: 12`.
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

/// Describes the finding of a target from its log: the failure, and the command that repeats it.
fn describe(text: &str, program: &Path, log: &Path) -> String {
    let mut lines = Vec::new();
    // A panic's location, and on the next line its message.
    let panic = text
        .lines()
        .skip_while(|line| !line.contains("panicked at"));
    lines.extend(panic.take(2).map(str::to_owned));
    let summary = text.lines().find(|line| line.starts_with("SUMMARY: "));
    lines.extend(summary.map(str::to_owned));
    if lines.is_empty() {
        lines.extend(text.lines().last().map(str::to_owned));
    }
    let input = text
        .split("Test unit written to ")
        .nth(1)
        .and_then(|rest| rest.lines().next());
    lines.extend(input.map(|input| format!("run it again: {} {input}", program.display())));
    lines.push(format!("all that was said: {}", log.display()));
    lines.join("\n")
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
    fn finds_figures_by_full_name() {
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
        let lines = describe(log, Path::new("/t/x"), Path::new("/t/x.log"));
        let lines: Vec<&str> = lines.lines().collect();
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
