// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask package`: Debian packages of the host's program, the guest's program, and the
//! driver.

mod deb;
mod manual;
mod modules;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Deserialize;

use self::deb::{Common, FOLDER, Package, run as output};
pub use self::modules::{Modules, Signer};
use barlink_sandbox::builds::{Programs, guest_programs, host_programs, repository, target_folder};
use barlink_sandbox::setup;
use barlink_sandbox::tools::ToolArgs;

/// Options of the task.
#[derive(Args, Debug)]
pub struct PackageArgs {
    /// Put the packages into this folder [default: target/debian]
    #[arg(long, value_name = "FOLDER")]
    pub output: Option<PathBuf>,

    /// Also make the package barlink-modules, which has the built driver for Debian's kernels: of
    /// each flavour in images/flavours.toml the newest one of each supported series that the mirror
    /// has
    #[arg(long)]
    pub modules: bool,

    /// With --modules, build only for the newest kernels whose version starts with VERSION, such as
    /// 7.2
    #[arg(long, value_name = "VERSION", requires = "modules")]
    pub kernel: Option<String>,

    /// With --modules, get Debian packages from this archive [default: the one in the host's apt
    /// configuration]
    #[arg(long, value_name = "URL", requires = "modules")]
    pub mirror: Option<String>,

    /// With --modules, sign the drivers for guests with Secure Boot, by a private key (PEM, without
    /// a passphrase) and its certificate (DER)
    #[arg(long, num_args = 2, value_names = ["KEY", "CERTIFICATE"], requires = "modules")]
    pub sign: Vec<PathBuf>,
}

impl PackageArgs {
    /// Returns the modules that are to be built, and sets up their kernels' sandboxes if needed.
    fn modules(&self) -> Result<Option<Modules>> {
        if !self.modules {
            return Ok(None);
        }
        let signer = match &self.sign[..] {
            [] => None,
            [key, certificate] => Some(Signer::new(key, certificate)?),
            _ => bail!("--sign was given more than once"),
        };
        let kernels = setup::ensure_all(&ToolArgs {
            kernel: self.kernel.clone(),
            mirror: self.mirror.clone(),
            ..ToolArgs::default()
        })?;
        Ok(Some(Modules { kernels, signer }))
    }
}

#[derive(Deserialize)]
struct Packages {
    maintainer: String,
    package: Vec<Package>,
}

/// Makes the packages, and prints their paths.
pub fn run(args: &PackageArgs) -> Result<ExitCode> {
    let folder = match &args.output {
        Some(folder) => folder.clone(),
        None => target_folder()?.join("debian"),
    };
    for package in build(&folder, args.modules()?.as_ref())?.values() {
        println!("{}", package.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes the packages in a folder, and returns their paths by name. Without modules there is no
/// package barlink-modules.
pub fn build(folder: &Path, modules: Option<&Modules>) -> Result<BTreeMap<String, PathBuf>> {
    let description = fs::read_to_string(repository().join(FOLDER).join("packages.toml"))?;
    let packages: Packages =
        toml::from_str(&description).context("images/packaging/packages.toml is malformed")?;
    let programs = host_programs(Programs::PACKAGED)?.and(guest_programs(Programs::PACKAGED)?);
    let host = programs.program("barlink")?;
    let built = tempfile::tempdir()?;
    if let Some(modules) = modules {
        modules.build(built.path())?;
    }
    let common = Common {
        words: [
            ("VERSION", env!("CARGO_PKG_VERSION").to_owned()),
            ("GLIBC", glibc_of(host)?),
        ]
        .into(),
        programs,
        modules: modules.map(|_| built.path().to_owned()),
        maintainer: packages.maintainer,
        date: date()?,
    };
    fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    let wanted = |package: &&Package| modules.is_some() || !package.has_modules();
    let packages = packages.package.iter().filter(wanted);
    let packages = packages.map(|package| {
        let path = package.build(&common, folder);
        let path = path.with_context(|| format!("{} cannot be made", package.name))?;
        Ok((package.name.clone(), path))
    });
    packages.collect()
}

/// Returns the oldest version of the C library that a program runs with.
fn glibc_of(program: &Path) -> Result<String> {
    let symbols = output(Command::new("objdump").arg("-T").arg(program))?;
    newest_glibc(&symbols).context("the host's program is not linked with glibc")
}

/// Returns the highest version of glibc in a list of symbols.
fn newest_glibc(symbols: &str) -> Option<String> {
    let versions = symbols.split("GLIBC_").skip(1).filter_map(|rest| {
        let version = rest
            .split(|c: char| c != '.' && !c.is_ascii_digit())
            .next()?;
        let numbers: Result<Vec<u32>, _> = version.split('.').map(str::parse).collect();
        Some((numbers.ok()?, version))
    });
    versions.max().map(|(_, version)| version.to_owned())
}

/// Returns the date of the last commit, in seconds since 1970 and as text. Without git the date is
/// 0.
fn date() -> Result<(String, String)> {
    let log = Command::new("git")
        .args(["log", "-1", "--format=%ct"])
        .current_dir(repository())
        .output();
    let seconds = match log {
        Ok(log) if log.status.success() => String::from_utf8(log.stdout)?.trim().to_owned(),
        _ => "0".to_owned(),
    };
    let mut date = Command::new("date");
    date.args(["--utc", "--rfc-email", "--date"]);
    let text = output(date.arg(format!("@{seconds}")))?;
    Ok((seconds, text.trim_end().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_newest_glibc_version() {
        let symbols = "0 DF *UND* 0 (GLIBC_2.9)  a\n0 DF *UND* 0 (GLIBC_2.34) b\n0 DF *UND* 0 (GLIBC_2.2.5) c\n";
        assert_eq!(newest_glibc(symbols).as_deref(), Some("2.34"));
        assert_eq!(newest_glibc("no table"), None);
    }
}
