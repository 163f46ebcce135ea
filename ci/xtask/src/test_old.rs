// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask test`: runs every test and counts them.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use walkdir::WalkDir;

use barlink_sandbox::builds::{Artifacts, Programs, cargo, repository, target_folder};
use crate::fuzz;
use barlink_sandbox::setup;
use crate::tally::Tally;
use barlink_sandbox::tools::VmArgs;
use barlink_vm::check_accelerator;

/// What to test, and with which tools.
#[derive(Args, Debug)]
pub struct TestArgs {
    /// Run only tests whose names hold this, say driver, or transports::channels; what has none of them is not built
    pub name: Option<String>,

    /// The tools.
    #[command(flatten)]
    pub vm: VmArgs,
}

/// A part of the tests.
struct Part {
    /// What cargo is told to select it.
    selection: &'static [&'static str],
    /// Where its tests stand.
    sources: &'static [&'static str],
    /// What its tests are told.
    options: &'static [&'static str],
    /// What the compiler is told to set, for a build apart from all others.
    cfg: Option<&'static str>,
    /// Whether its tests boot VMs.
    boots: bool,
}

const PARTS: [Part; 6] = [
    Part {
        selection: &["--workspace", "--exclude=xtask"],
        sources: &[
            "protocol",
            "backend",
            "guest-app",
            "ci/agent",
            "ci/bench-load",
            "ci/crash-load",
            "ci/driver-checks",
            "ci/iceoryx2-load",
        ],
        options: &[],
        cfg: None,
        boots: false,
    },
    Part {
        // Every interleaving of two ends; optimised, since there are many.
        selection: &["--package=barlink-protocol", "--test=loom", "--release"],
        sources: &["protocol/tests/loom"],
        options: &[],
        cfg: Some("loom"),
        boots: false,
    },
    Part {
        // Races are others without debug assertions, and copies are made by other instructions.
        selection: &["--package=barlink-protocol", "--test=hostile", "--release"],
        sources: &["protocol/tests/hostile"],
        options: &[],
        cfg: None,
        boots: false,
    },
    Part {
        selection: &["--package=xtask", "--lib", "--bins"],
        sources: &["ci/src"],
        options: &[],
        cfg: None,
        boots: false,
    },
    Part {
        selection: &["--package=xtask", "--doc"],
        sources: &["ci/src"],
        options: &[],
        cfg: None,
        boots: false,
    },
    Part {
        selection: &["--package=xtask", "--test=*"],
        sources: &["ci/tests", "ci/driver-checks"],
        // A VM under TCG keeps several processors busy, so these run one at a time.
        options: &["--test-threads=1"],
        cfg: None,
        boots: true,
    },
];

impl Part {
    /// Whether a test with this in its name can be here: whether the text is anywhere in the sources, the last part of it
    /// at least, since modules have the names of their files.
    fn may_have(&self, name: &str) -> Result<bool> {
        let last = name.rsplit("::").next().unwrap_or(name);
        for source in self.sources {
            let source = repository().join(source);
            for entry in WalkDir::new(&source) {
                let path = entry?.into_path();
                let file = path.strip_prefix(&source)?.to_string_lossy();
                if path.extension().is_some_and(|extension| extension == "rs")
                    && (file.contains(last) || fs::read_to_string(&path)?.contains(last))
                {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

/// The parts with tests whose names hold this, or all.
fn parts(name: Option<&str>) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    for part in PARTS {
        if name.map_or(Ok(true), |name| part.may_have(name))? {
            parts.push(part);
        }
    }
    Ok(parts)
}

/// Sets up and builds what the tests need, and runs them all.
pub fn run(args: &TestArgs) -> Result<ExitCode> {
    check_accelerator(args.vm.accel)?;
    let mut tally = Tally::default();
    let mut parts = parts(args.name.as_deref())?;
    // Kept to the end, and with it the hold on the sandbox.
    let mut built = None;
    if parts.iter().any(|part| part.boots) {
        // Built here too, and not only by the tests, so that a failure shows once and as what it is.
        match setup::ensure(&args.vm.tools)
            .and_then(|tools| Artifacts::build(tools, args.vm.clone(), Programs::ALL))
        {
            Ok(artifacts) => {
                let artifacts = built.insert(artifacts);
                eprintln!("testing with kernel {}", artifacts.tools.release);
            }
            Err(error) => {
                eprintln!("error: {error:#}\nno VM can be booted: going on with the other tests");
                tally.count(false);
                parts.retain(|part| !part.boots);
            }
        }
    }
    let target = target_folder()?;
    for part in parts {
        let mut command = cargo("test");
        command.arg("--no-fail-fast").args(part.selection);
        if let Some(cfg) = part.cfg {
            // Of all ways to give flags this one outranks the others.
            command.env("CARGO_ENCODED_RUSTFLAGS", format!("--cfg={cfg}"));
            command.arg("--target-dir").arg(target.join(cfg));
        }
        command.arg("--").args(part.options).args(&args.name);
        command.envs(args.vm.environment());
        if std::env::var_os("RUST_LIB_BACKTRACE").is_none() {
            // What a test returns as an error is told by its text.
            command.env("RUST_LIB_BACKTRACE", "0");
        }
        tally += run_and_count(command)?;
    }
    tally += fuzz_shortly(args.name.as_deref()).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        Tally {
            passed: 0,
            failed: 1,
        }
    });
    println!("{tally}");
    if let Some(name) = &args.name {
        // Or a name that is mistyped would pass.
        ensure!(
            tally.passed + tally.failed > 0,
            "no test has `{name}` in its name: name a part of one, with its module if need be"
        );
    }
    Ok(tally.exit_code())
}

/// Seconds for each fuzz target: enough for the inputs that are kept, and a look around.
const FUZZ_SECONDS: u64 = 5;

/// Runs the fuzz targets whose names hold this, or all; each is a test.
fn fuzz_shortly(name: Option<&str>) -> Result<Tally> {
    let mut targets = fuzz::targets()?;
    targets.retain(|target| name.is_none_or(|name| format!("fuzz::{target}").contains(name)));
    fuzz::fuzz(&targets, FUZZ_SECONDS)
}

/// Silence after which a program that has ended says no more.
const SILENCE: Duration = Duration::from_secs(1);

/// Runs `cargo test`, passes its output on, and counts what it reports. What a test that failed has left behind can hold the
/// output open: it ends with cargo.
fn run_and_count(mut command: Command) -> Result<Tally> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cargo cannot be started")?;
    let output = BufReader::new(child.stdout.take().context("cargo has no output")?);
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        // Until nobody listens any more.
        let _ = output.split(b'\n').try_for_each(|line| sender.send(line));
    });
    let mut counter = Counter::default();
    loop {
        let line = match lines.recv_timeout(SILENCE) {
            Ok(line) => line?,
            Err(RecvTimeoutError::Timeout) if child.try_wait()?.is_none() => continue,
            Err(_) => break,
        };
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        counter.take_in(&line);
    }
    Ok(counter.end(child.wait()?.success()))
}

/// Counts from the output of test harnesses.
#[derive(Debug, Default)]
struct Counter {
    tally: Tally,
    /// Whether a harness has begun and not yet told its result.
    running: bool,
}

impl Counter {
    fn take_in(&mut self, line: &str) {
        if line.starts_with("running ") && (line.ends_with(" tests") || line.ends_with(" test")) {
            self.harness_ended();
            self.running = true;
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.running = false;
            // "ok. 3 passed; 0 failed; 1 ignored; ..."
            for field in result.split([';', '.']) {
                match field.trim().split_once(' ') {
                    Some((number, "passed")) => self.tally.passed += number.parse().unwrap_or(0),
                    Some((number, "failed")) => self.tally.failed += number.parse().unwrap_or(0),
                    _ => {}
                }
            }
        }
    }

    /// A harness that crashes tells no result; that is a failure of its own.
    fn harness_ended(&mut self) {
        if std::mem::take(&mut self.running) {
            self.tally.failed += 1;
        }
    }

    fn end(mut self, success: bool) -> Tally {
        self.harness_ended();
        if !success && self.tally.failed == 0 {
            // It did not even compile.
            self.tally.failed = 1;
        }
        self.tally
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Instant;

    use super::*;

    fn count(output: &str, success: bool) -> Tally {
        let mut counter = Counter::default();
        output.lines().for_each(|line| counter.take_in(line));
        counter.end(success)
    }

    #[test]
    fn what_a_test_leaves_behind_does_not_hold_up_the_count() {
        let mut command = Command::new("sh");
        let tests =
            "sleep 60 2>&1 & echo 'running 1 test'; echo 'test result: ok. 1 passed; 0 failed'";
        command.args(["-c", tests]);
        let start = Instant::now();
        let tally = run_and_count(command).unwrap();
        assert_eq!((tally.passed, tally.failed), (1, 0));
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn parts_that_have_no_test_of_that_name_are_not_built() {
        // What tells a part: its flag, and whether it boots.
        let told = |name: Option<&str>| -> Vec<_> {
            let parts = parts(name).unwrap();
            parts.iter().map(|part| (part.cfg, part.boots)).collect()
        };
        // Put together here, so that the names do not stand in this file.
        let loom = ["an_end_is_claimed", "or_the_channel_is_reset"].join("_");
        let expected = [(None, false), (Some("loom"), false)];
        assert_eq!(told(Some(&loom)), expected);
        let in_a_vm = ["idle_stream", "uses_no_processor_time"].join("_");
        assert_eq!(told(Some(&in_a_vm)), [(None, true)]);
        // With its module, and by its module alone.
        let loom = ["loom", &loom].join("::");
        assert_eq!(told(Some(&loom)), expected);
        let module = ["scrib", "bler"].concat();
        assert_eq!(told(Some(&module)), [(None, false); 2]);
        assert_eq!(told(None).len(), PARTS.len());
    }

    #[test]
    fn tests_of_every_crate_are_found_by_their_names() {
        let manifest = fs::read_to_string(repository().join("Cargo.toml")).unwrap();
        let manifest: toml::Table = manifest.parse().unwrap();
        let members = manifest["workspace"]["members"].as_array().unwrap();
        let [whole, ..] = PARTS;
        assert!(whole.selection.contains(&"--workspace"));
        for member in members {
            let member = Path::new(member.as_str().unwrap());
            // The one that is excluded has parts of its own.
            let found = member == Path::new("ci")
                || whole
                    .sources
                    .iter()
                    .any(|source| member.starts_with(source));
            assert!(found, "no part's sources hold {}", member.display());
        }
    }

    #[test]
    fn results_of_all_harnesses_add_up() {
        let output = "running 2 tests\ntest a ... ok\ntest b ... FAILED\n\
                      test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
                      running 1 test\ntest c ... ok\n\
                      test result: ok. 1 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        assert_eq!(
            count(output, false),
            Tally {
                passed: 2,
                failed: 1
            }
        );
    }

    #[test]
    fn a_crashed_harness_is_a_failure_whether_or_not_another_follows() {
        let crash = "running 2 tests\ntest a ... ok\n";
        let fine =
            "running 1 test\ntest c ... ok\ntest result: ok. 1 passed; 0 failed; 0 ignored\n";
        assert_eq!(
            count(crash, false),
            Tally {
                passed: 0,
                failed: 1
            }
        );
        assert_eq!(
            count(&format!("{crash}{fine}"), false),
            Tally {
                passed: 1,
                failed: 1
            }
        );
    }

    #[test]
    fn tests_that_do_not_compile_are_a_failure() {
        assert_eq!(
            count("", false),
            Tally {
                passed: 0,
                failed: 1
            }
        );
        assert_eq!(count("", true), Tally::default());
    }
}
