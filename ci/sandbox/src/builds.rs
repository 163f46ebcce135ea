// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Builds everything that the VM and the tests need: the programs, the driver, the initramfs, the
//! bare guest.
//!
//! A tool that knows what has changed (cargo, make) does each build. So a repeated build costs
//! little, and a guest never boots stale files.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use crate::bare_guest;
use crate::initramfs;
use crate::module::ModuleBuild;
use crate::setup::StockKernel;
use crate::tools::{Headers, Qemu, Tools, VmArgs};

/// The target triple of all programs. Its C library can be linked statically, so that a program
/// runs where no library is installed.
pub const NATIVE_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Names of the programs that a task needs. Only these are built for it.
#[derive(Clone, Copy, Debug)]
pub struct Programs {
    /// Name of the task in the name of its initramfs.
    name: &'static str,
    /// The packages of the host's programs.
    host: &'static [&'static str],
    /// The packages of the guest's programs.
    guest: &'static [&'static str],
    /// Examples of these packages that the guest runs, too.
    examples: &'static [&'static str],
}

impl Programs {
    /// Programs that go into the Debian packages.
    pub const PACKAGED: Self = Self {
        name: "package",
        host: &[BROKER],
        guest: &["barlink-guest"],
        examples: &[],
    };
    /// Programs that the demo runs.
    pub const DEMO: Self = Self {
        name: "demo",
        host: &[BROKER],
        guest: &["barlink-guest", AGENT],
        examples: &[],
    };
    /// Programs that the parts `crash-…` of `cargo xtask soak` kill.
    pub const CRASH: Self = Self {
        name: "crash",
        host: &[BROKER, CRASH_LOAD],
        guest: &["barlink-guest", AGENT, CRASH_LOAD],
        examples: &[],
    };
    /// Programs that `cargo xtask bench` measures.
    pub const BENCH: Self = Self {
        name: "bench",
        host: &[BROKER, BENCH_LOAD, ICEORYX2_LOAD],
        guest: &["barlink-guest", AGENT, BENCH_LOAD],
        examples: &[],
    };
    /// Programs that the tests run.
    pub const TEST: Self = Self {
        name: "test",
        host: &[BROKER, BENCH_LOAD],
        guest: &["barlink-guest", AGENT, "barlink-driver-checks"],
        examples: &["guest_sensor", "watch"],
    };
}

/// The package of the program `barlink`.
const BROKER: &str = "barlink-broker";
/// Name of the agent, which runs commands in the guest.
const AGENT: &str = "barlink-agent";
/// Name of the program that `cargo xtask bench` measures.
pub const BENCH_LOAD: &str = "barlink-bench-load";
/// Name of the program that the parts `crash-…` of `cargo xtask soak` kill.
pub const CRASH_LOAD: &str = "barlink-crash-load";
/// Name of the program by which `cargo xtask bench` measures iceoryx2, on the host alone.
pub const ICEORYX2_LOAD: &str = "barlink-iceoryx2-load";

/// Environment variable with the path of a file that describes [`Files`] that are already built.
/// The processes of a test run share them.
const BUILT: &str = "BARLINK_BUILT";

/// The files of a build, and the tools that it used.
#[derive(Clone, Debug)]
pub struct Artifacts {
    /// The tools.
    pub tools: Tools,
    /// Options for the VM.
    pub args: VmArgs,
    /// Path of the initramfs that the guest boots.
    pub initramfs: PathBuf,
    /// Folder for the logs of VMs.
    pub logs: PathBuf,
    files: Files,
}

/// The files that a build made.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Files {
    /// The host's programs.
    host: Built,
    /// The guest's programs.
    guest: Built,
    /// Path of the driver's module.
    driver: PathBuf,
    /// Path of the initramfs that the guest boots.
    initramfs: PathBuf,
    /// SHA-256 of the initramfs, in hexadecimal digits.
    digest: String,
    /// Folder for the logs of VMs.
    logs: PathBuf,
    /// Path of the bare guest's image.
    bare_guest: PathBuf,
}

impl Artifacts {
    /// Returns the artifacts of a VM test, as the environment chooses them (see [`VmArgs`]). They
    /// are those of [`Artifacts::environment`], if another process has passed these on, else they
    /// are built once.
    pub fn shared() -> Result<&'static Self> {
        static SHARED: OnceLock<Result<Artifacts>> = OnceLock::new();
        let built = SHARED.get_or_init(|| {
            let args = VmArgs::from_environment()?;
            let tools = Tools::find(&args.tools)?;
            let Some(path) = std::env::var_os(BUILT) else {
                return Self::build(tools, args, Programs::TEST);
            };
            let files = fs::read(&path)
                .with_context(|| format!("{BUILT}: {} cannot be read", path.display()))?;
            Ok(Self::new(tools, args, serde_json::from_slice(&files)?))
        });
        built.as_ref().map_err(|error| anyhow!("{error:#}"))
    }

    /// Returns whether another process has passed its artifacts on, so that [`Artifacts::shared`]
    /// builds nothing.
    pub fn are_passed_on() -> bool {
        std::env::var_os(BUILT).is_some()
    }

    /// Returns the environment variables by which [`Artifacts::shared`] returns these artifacts in
    /// another process, without a build.
    pub fn environment(&self) -> Result<Vec<(&'static str, OsString)>> {
        let text = serde_json::to_vec(&self.files)?;
        // The hash of the content is in the name, so that runs with other files do not replace this
        // one.
        let hash = Sha256::digest(&text);
        let hash: String = hash
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let path = self.logs.join(format!("built-{hash}.json"));
        let mut file = NamedTempFile::new_in(&self.logs)?;
        file.write_all(&text)?;
        file.persist(&path)
            .with_context(|| format!("{} cannot be written", path.display()))?;
        let mut variables = self.args.environment();
        variables.push((BUILT, path.into()));
        Ok(variables)
    }

    fn new(tools: Tools, args: VmArgs, files: Files) -> Self {
        Self {
            tools,
            args,
            initramfs: files.initramfs.clone(),
            logs: files.logs.clone(),
            files,
        }
    }

    /// Builds the programs, the driver and the initramfs with these tools, and prints each step.
    pub fn build(tools: Tools, args: VmArgs, programs: Programs) -> Result<Self> {
        let target = target_folder()?;
        eprintln!("building the host's programs ...");
        let host = host_programs(programs)?;
        eprintln!("building the guest's programs ...");
        let guest = guest_programs(programs)?;
        eprintln!("building the driver for {} ...", tools.release);
        let driver = driver(&tools, &target)?;
        let logs = target.join("vm");
        fs::create_dir_all(&logs)?;
        let initramfs = logs.join(format!(
            "initramfs-{}-{}.cpio",
            tools.release, programs.name
        ));
        let digest = pack(&tools, &driver, &guest, &initramfs)?;
        let files = Files {
            host,
            guest,
            driver,
            initramfs,
            digest,
            bare_guest: bare_guest::build(&repository(), &logs)?,
            logs,
        };
        Ok(Self::new(tools, args, files))
    }

    /// Returns these artifacts with one part from another build. The new initramfs and the logs of
    /// VMs go to `folder`.
    pub fn with(&self, part: Part, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let mut files = self.files.clone();
        files.logs = folder.to_owned();
        match part {
            Part::Host(programs) => files.host = files.host.and(programs),
            Part::Guest(programs) => files.guest = files.guest.and(programs),
            Part::Driver(module) => files.driver = module,
        }
        // An unchanged initramfs keeps its path, so that the snapshots of its guests stay valid.
        let initramfs = folder.join("initramfs.cpio");
        let digest = pack(&self.tools, &files.driver, &files.guest, &initramfs)?;
        if digest != files.digest {
            files.initramfs = initramfs;
            files.digest = digest;
        }
        Ok(Self::new(self.tools.clone(), self.args.clone(), files))
    }

    /// Returns a text that changes whenever QEMU, the kernel or the initramfs changes.
    pub fn identity(&self) -> Result<String> {
        let kernel = &self.tools.kernel_image;
        let words = [
            self.files.digest.clone(),
            self.qemu_identity()?,
            self.initramfs.display().to_string(),
            file_identity(kernel)?,
        ];
        Ok(words.join(" "))
    }

    /// Returns a text that changes whenever QEMU changes.
    pub fn qemu_identity(&self) -> Result<String> {
        file_identity(match &self.tools.qemu {
            Qemu::Sandboxed(sandbox) => &sandbox.folder,
            Qemu::Own(path) => path,
        })
    }

    /// Returns the path of a program of the host.
    pub fn host(&self, name: &str) -> Result<&Path> {
        self.files.host.program(name)
    }

    /// Returns the path of a program of the guest.
    pub fn guest(&self, name: &str) -> Result<&Path> {
        self.files.guest.program(name)
    }

    /// Returns the path of the bare guest's image.
    pub fn bare_guest(&self) -> &Path {
        &self.files.bare_guest
    }

    /// Returns these artifacts for a guest with a kernel without Rust, which has no driver.
    pub fn with_stock_kernel(&self, kernel: &StockKernel) -> Result<Self> {
        let mut files = self.files.clone();
        let digits = files.digest.get(..16).unwrap_or_default();
        let name = format!("initramfs-{}-{digits}.cpio", kernel.release);
        files.initramfs = files.logs.join(name);
        let modules = kernel.modules.iter().enumerate().map(|(index, path)| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            (format!("lib/boot/{index}-{name}"), path.as_path())
        });
        let mut contents = guest_files(&self.tools, &files.guest);
        contents.extend(modules);
        files.digest = initramfs::write(&files.initramfs, &contents)?;
        let mut tools = self.tools.clone();
        tools.release = kernel.release.clone();
        tools.kernel_image = kernel.image.clone();
        Ok(Self::new(tools, self.args.clone(), files))
    }

    /// Returns these artifacts for a guest with another kernel and initramfs.
    pub fn with_kernel(&self, release: &str, kernel_image: PathBuf, initramfs: PathBuf) -> Self {
        let mut artifacts = self.clone();
        artifacts.tools.release = release.to_owned();
        artifacts.tools.kernel_image = kernel_image;
        artifacts.initramfs = initramfs;
        artifacts
    }
}

/// Returns a text that changes whenever the file at a path is written or replaced.
pub fn file_identity(path: &Path) -> Result<String> {
    let metadata =
        fs::metadata(path).with_context(|| format!("{} cannot be read", path.display()))?;
    Ok(format!("{} {:?}", path.display(), metadata.modified()?))
}

/// A part of [`Artifacts`] that comes from another build.
#[derive(Clone, Debug)]
pub enum Part {
    /// Programs of the host, by name.
    Host(Built),
    /// Programs of the guest, by name.
    Guest(Built),
    /// Path of the driver's module.
    Driver(PathBuf),
}

/// A copy of this project's tree, and the folder of its builds.
#[derive(Clone, Debug)]
pub struct TreeCopy {
    /// Root folder of the copy.
    pub root: PathBuf,
    /// Folder of the build's output.
    pub target: PathBuf,
}

impl TreeCopy {
    /// Builds a program of the host.
    pub fn host_program(&self, name: &str) -> Result<Built> {
        cargo_build(self.cargo(), &[name], &[], Linkage::Default)
    }

    /// Builds a program of the guest.
    pub fn guest_program(&self, name: &str) -> Result<Built> {
        cargo_build(self.cargo(), &[name], &[], Linkage::Static)
    }

    /// Builds the driver as [`driver`] does, and returns the path of the module.
    pub fn driver(&self, tools: &Tools) -> Result<PathBuf> {
        driver_of(&self.root, tools, &self.target)
    }

    fn cargo(&self) -> Command {
        let mut build = cargo("build");
        build.current_dir(&self.root);
        build.arg("--target-dir").arg(&self.target);
        build
    }
}

/// Writes the initramfs with the module and these programs. Returns the SHA-256 of the archive in
/// hexadecimal digits.
fn pack(tools: &Tools, driver: &Path, guest: &Built, archive: &Path) -> Result<String> {
    let mut files = guest_files(tools, guest);
    files.push(("lib/barlink.ko".to_owned(), driver));
    initramfs::write(archive, &files)
}

/// Returns the files of a guest without a driver: the path in the guest, and that on the host.
fn guest_files<'a>(tools: &'a Tools, guest: &'a Built) -> Vec<(String, &'a Path)> {
    let busybox = ("bin/busybox".to_owned(), tools.busybox.as_path());
    let programs = guest.0.iter();
    let programs = programs.map(|(name, path)| (format!("bin/{name}"), path.as_path()));
    [busybox].into_iter().chain(programs).collect()
}

/// Builds the programs that run on the host.
pub fn host_programs(programs: Programs) -> Result<Built> {
    cargo_build(cargo("build"), programs.host, &[], Linkage::Default)
}

/// Builds the programs that run in the guest.
pub fn guest_programs(programs: Programs) -> Result<Built> {
    cargo_build(
        cargo("build"),
        programs.guest,
        programs.examples,
        Linkage::Static,
    )
}

/// Builds the driver and returns the path of the module.
///
/// In the sandbox every warning is an error. Compilers make it one by their flags, and the warnings
/// of other tools are found in the output. With a user's own headers, warnings are only shown.
pub fn driver(tools: &Tools, target: &Path) -> Result<PathBuf> {
    driver_of(&repository(), tools, target)
}

/// Builds the driver from the tree at `root`.
fn driver_of(root: &Path, tools: &Tools, target: &Path) -> Result<PathBuf> {
    let source = root.join("guest-driver");
    let wire = root.join("protocol/src/wire");
    let output = target.join("driver").join(&tools.release);
    fs::create_dir_all(&output)?;
    // Two builds in one folder damage each other: kbuild names its trial files after process IDs,
    // which are the same in two sandboxes.
    let lock = fs::File::create(output.join(".lock"))?;
    lock.lock()?;
    let build = ModuleBuild {
        source: &source,
        included: &[&wire],
        output: &output,
    };
    let mut make = build.command(&tools.headers)?;
    let made = make.output().with_context(|| {
        let program = make.get_program().display().to_string();
        format!("{program} cannot be started")
    })?;
    let text = String::from_utf8_lossy(&[made.stdout, made.stderr].concat()).into_owned();
    let warned = text
        .lines()
        .any(|line| line.to_lowercase().contains("warning:"));
    let strict = matches!(tools.headers, Headers::Sandboxed(_));
    if !made.status.success() || (warned && strict) {
        bail!(
            "the driver does not build cleanly for {}\n{}",
            tools.release,
            text.trim_end()
        );
    }
    if warned {
        eprintln!("{}", text.trim_end());
    }
    Ok(output.join("barlink.ko"))
}

/// Returns the root folder of this repository.
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

/// Makes a command for the cargo that runs this program.
pub fn cargo(subcommand: &str) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.arg(subcommand).current_dir(repository());
    command
}

/// Returns cargo's target folder.
pub fn target_folder() -> Result<PathBuf> {
    let output = cargo("metadata")
        .args(["--no-deps", "--format-version=1"])
        .stderr(Stdio::inherit())
        .output()
        .context("cargo cannot be started")?;
    let metadata: Value =
        serde_json::from_slice(&output.stdout).context("cargo metadata failed")?;
    let folder = metadata["target_directory"].as_str();
    Ok(folder
        .context("cargo metadata names no target folder")?
        .into())
}

/// How a program is linked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Linkage {
    /// Dynamically, as is usual on the host.
    Default,
    /// Statically, with all libraries in the program.
    Static,
}

/// Paths of programs, by name.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Built(BTreeMap<String, PathBuf>);

impl Built {
    /// Adds programs. They replace those of the same name.
    pub fn and(mut self, others: Self) -> Self {
        self.0.extend(others.0);
        self
    }

    /// Returns the path of a program. An error if it was not built.
    pub fn program(&self, name: &str) -> Result<&Path> {
        let program = self.0.get(name).map(PathBuf::as_path);
        program.with_context(|| format!("cargo built no program {name}"))
    }
}

/// Builds the programs and these examples of these packages with optimisation, by extending a cargo
/// command.
fn cargo_build(
    mut build: Command,
    packages: &[&str],
    examples: &[&str],
    linkage: Linkage,
) -> Result<Built> {
    build.args([
        "--release",
        "--bins",
        "--message-format=json-render-diagnostics",
    ]);
    build.args(packages.iter().flat_map(|package| ["--package", package]));
    build.args(examples.iter().flat_map(|example| ["--example", example]));
    if linkage == Linkage::Static {
        build.arg(format!("--target={NATIVE_TARGET}"));
        // This variable outranks all other ways to set flags, so no setting of the user undoes it.
        build.env(
            "CARGO_ENCODED_RUSTFLAGS",
            "-C\x1ftarget-feature=+crt-static",
        );
        // Debug information is three quarters of these programs, and every boot would load it.
        build.env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo");
    }
    let output = build
        .stderr(Stdio::inherit())
        .output()
        .context("cargo cannot be started")?;
    if !output.status.success() {
        bail!("cargo cannot build {}", packages.join(", "));
    }
    let messages = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>();
    let mut programs = BTreeMap::new();
    for message in messages {
        let message = message.context("cargo's messages cannot be read")?;
        if let (Some(path), Some(name)) = (
            message["executable"].as_str(),
            message["target"]["name"].as_str(),
        ) {
            programs.insert(name.to_owned(), path.into());
        }
    }
    Ok(Built(programs))
}
