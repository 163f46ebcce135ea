// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Builds what the VM and the tests need: the programs, the driver, the initramfs.
//!
//! Every build is left to a tool that knows what changed (cargo, make), so building again costs little, and nothing
//! stale is ever booted.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use crate::initramfs;
use crate::module::ModuleBuild;
use crate::setup;
use crate::tools::{Headers, ToolArgs, Tools, VmArgs};

/// The target that this is all for. Its C library can be linked in, so that a program runs where no library is.
pub(crate) const NATIVE_TARGET: &str = "x86_64-unknown-linux-gnu";

/// What is built, and the tools that it was built with.
#[derive(Clone, Debug)]
pub struct Artifacts {
    /// The tools.
    pub tools: Tools,
    /// How to run the VM.
    pub args: VmArgs,
    /// The host's program.
    pub barlink: PathBuf,
    /// What `cargo xtask bench` measures, on the host.
    pub bench_load: PathBuf,
    /// What it measures of iceoryx2, which is on the host alone.
    pub iceoryx2_load: PathBuf,
    /// What `cargo xtask crash` kills, on the host.
    pub crash_load: PathBuf,
    /// What runs commands in the guest.
    pub agent: PathBuf,
    /// What the guest boots into.
    pub initramfs: PathBuf,
    /// The folder for the logs of VMs.
    pub logs: PathBuf,
}

impl Artifacts {
    /// What a VM test needs, chosen by the environment (see [`VmArgs`]) and built on first use.
    pub fn shared() -> Result<&'static Self> {
        static SHARED: OnceLock<Result<Artifacts>> = OnceLock::new();
        let built = SHARED.get_or_init(|| {
            let args = VmArgs::from_environment()?;
            Self::build(Tools::find(&args.tools)?, args)
        });
        built.as_ref().map_err(|error| anyhow!("{error:#}"))
    }

    /// Builds all for these tools.
    pub fn build(tools: Tools, args: VmArgs) -> Result<Self> {
        let target = target_folder()?;
        let host = host_programs()?;
        let guest = guest_programs()?;
        let driver = driver(&tools, &target)?;
        let logs = target.join("vm");
        fs::create_dir_all(&logs)?;
        let initramfs = logs.join(format!("initramfs-{}.cpio", tools.release));
        initramfs::write(
            &initramfs,
            &[
                ("bin/busybox", &tools.busybox),
                ("bin/barlink-agent", program(&guest, "barlink-agent")?),
                ("bin/barlink-guest", program(&guest, "barlink-guest")?),
                (
                    "bin/barlink-driver-checks",
                    program(&guest, "barlink-driver-checks")?,
                ),
                (
                    "bin/barlink-bench-load",
                    program(&guest, "barlink-bench-load")?,
                ),
                (
                    "bin/barlink-crash-load",
                    program(&guest, "barlink-crash-load")?,
                ),
                ("lib/barlink.ko", &driver),
            ],
        )?;
        Ok(Self {
            barlink: program(&host, "barlink")?.clone(),
            bench_load: program(&host, "barlink-bench-load")?.clone(),
            iceoryx2_load: program(&host, "barlink-iceoryx2-load")?.clone(),
            crash_load: program(&host, "barlink-crash-load")?.clone(),
            agent: program(&guest, "barlink-agent")?.clone(),
            tools,
            args,
            initramfs,
            logs,
        })
    }

    /// The same, for a guest that has a kernel and initial RAM disk of its own.
    pub fn with_kernel(&self, release: &str, kernel_image: PathBuf, initramfs: PathBuf) -> Self {
        let mut artifacts = self.clone();
        artifacts.tools.release = release.to_owned();
        artifacts.tools.kernel_image = kernel_image;
        artifacts.initramfs = initramfs;
        artifacts
    }
}

/// Builds what runs on the host, and gives the paths by the names.
pub(crate) fn host_programs() -> Result<HashMap<String, PathBuf>> {
    let packages = [
        "--package=barlink",
        "--package=barlink-bench-load",
        "--package=barlink-crash-load",
        "--package=barlink-iceoryx2-load",
    ];
    cargo_build(&packages, Linkage::Default)
}

/// Builds what runs in the guest, and gives the paths by the names.
pub(crate) fn guest_programs() -> Result<HashMap<String, PathBuf>> {
    let packages = [
        "--package=barlink-guest",
        "--package=barlink-agent",
        "--package=barlink-driver-checks",
        "--package=barlink-bench-load",
        "--package=barlink-crash-load",
    ];
    cargo_build(&packages, Linkage::Static)
}

/// Sets up what the driver needs, builds it, and prints the path of the module.
pub fn print_driver(args: &ToolArgs) -> Result<ExitCode> {
    let module = driver(&setup::ensure(args)?, &target_folder()?)?;
    println!("{}", module.display());
    Ok(ExitCode::SUCCESS)
}

/// Builds the driver and gives the path of the module.
///
/// In the sandbox every warning is an error: the compilers' by their flags, those of other tools by their looks. What a
/// user's own compiler warns of is shown.
pub fn driver(tools: &Tools, target: &Path) -> Result<PathBuf> {
    let repository = repository();
    let source = repository.join("guest-driver");
    let wire = repository.join("protocol/src/wire");
    let output = target.join("driver").join(&tools.release);
    fs::create_dir_all(&output)?;
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

/// The root of this repository.
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// A command for the cargo that runs this program.
pub fn cargo(subcommand: &str) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.arg(subcommand).current_dir(repository());
    command
}

/// The folder that cargo builds in.
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
    /// As is usual on the host.
    Default,
    /// With everything in it.
    Static,
}

/// Builds programs with optimisation, and gives their paths by their names.
fn cargo_build(packages: &[&str], linkage: Linkage) -> Result<HashMap<String, PathBuf>> {
    let mut build = cargo("build");
    build.args([
        "--release",
        "--bins",
        "--message-format=json-render-diagnostics",
    ]);
    build.args(packages);
    if linkage == Linkage::Static {
        build.arg(format!("--target={NATIVE_TARGET}"));
        // Of all ways to give flags this one outranks the others, so that no setting of the user's undoes it.
        build.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
        // Three quarters of these programs otherwise, which every boot would load.
        build.env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo");
    }
    let output = build
        .stderr(Stdio::inherit())
        .output()
        .context("cargo cannot be started")?;
    if !output.status.success() {
        bail!("cargo build {} failed", packages.join(" "));
    }
    let messages = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>();
    let mut programs = HashMap::new();
    for message in messages {
        let message = message.context("cargo's messages cannot be read")?;
        if let (Some(path), Some(name)) = (
            message["executable"].as_str(),
            message["target"]["name"].as_str(),
        ) {
            programs.insert(name.to_owned(), path.into());
        }
    }
    Ok(programs)
}

fn program<'a>(programs: &'a HashMap<String, PathBuf>, name: &str) -> Result<&'a PathBuf> {
    programs
        .get(name)
        .with_context(|| format!("cargo built no program {name}"))
}
