// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The set-up of the sandbox in which everything else runs. An existing one is used again.

mod cache;
mod debian;
mod host;
mod kernels;
mod metadata;
mod mirror;
mod program;
mod rootfs;
mod stock;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::slice;

use anyhow::{Error, Result, ensure};
use tempfile::TempDir;

use self::cache::{Cache, Lock};
use self::kernels::Kernel;
use self::kernels::NoKernel;
use self::metadata::Unfinished;
pub use self::program::program;
pub use self::stock::{StockKernel, VFIO_MODULES};
use crate::recipe::{Kind, Recipe};
use crate::sandbox::Sandbox;
use crate::steps::Steps;
use crate::tools::{ToolArgs, Tools};

/// Returns the exit code of a task that has failed: 3 if the mirror has no kernel of the wanted
/// series, otherwise 1. At 3 the host is not at fault, so `.ci/run` goes on without that kernel.
pub fn exit_code(error: &Error) -> ExitCode {
    match error.is::<NoKernel>() {
        true => ExitCode::from(3),
        false => ExitCode::FAILURE,
    }
}

/// Removes the sandboxes of other versions of barlink and of superseded kernels, except for those
/// in use. Returns the removed ones and the ones left in use.
pub fn clean() -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let cache = Cache::open()?;
    let lock = lock(&cache)?;
    cache.clean(&Recipe::load()?, &lock)
}

/// Lists the sandboxes of other versions of barlink, and those of kernels that have a newer one of
/// their series and flavour.
pub fn unused() -> Result<Vec<PathBuf>> {
    Cache::open()?.unused(&Recipe::load()?)
}

/// Returns the folder of files that are made once and used again, by default `~/.cache/barlink`.
pub fn cache_folder() -> Result<PathBuf> {
    Ok(Cache::open()?.folder().to_owned())
}

/// Marks a sandbox as in use until the returned file is closed.
pub fn hold(sandbox: &Sandbox) -> Result<File> {
    cache::hold(sandbox)
}

fn lock(cache: &Cache) -> Result<Lock> {
    cache.lock(|| eprintln!("another set-up is at work: waiting for it to end"))
}

/// Returns the tools that `args` names, and sets up a sandbox for them if needed.
pub fn ensure(args: &ToolArgs) -> Result<Tools> {
    if let Some(tools) = Tools::own(args)? {
        return Ok(tools);
    }
    // Checks the arguments before the long work.
    Tools::check(args)?;
    let sandbox = system(args, &Recipe::load()?, Kind::Sandbox, |_| true)?;
    Tools::with_sandbox(args, sandbox)
}

/// Returns a wanted system of this kind that `args` permits. If there is none, makes the newest one
/// that `args` permits.
fn system(
    args: &ToolArgs,
    recipe: &Recipe,
    kind: Kind,
    is_wanted: impl Fn(&Sandbox) -> bool,
) -> Result<Sandbox> {
    let find = || -> Result<Option<Sandbox>> {
        let mut finished = finished_of(args, recipe, kind)?.into_iter();
        Ok(finished.find(&is_wanted))
    };
    match find()? {
        Some(system) => Ok(system),
        None => build(args, recipe, kind, find),
    }
}

/// Returns the tools of the newest kernel on the mirror of each supported series and flavour, and
/// sets up sandboxes for them if needed. `args.kernel` restricts the versions. Prints each series
/// of which the mirror has no kernel. An error if it has none at all.
pub fn ensure_all(args: &ToolArgs) -> Result<Vec<Tools>> {
    let mut all = Vec::new();
    let mut missing = None;
    for recipe in Recipe::of_flavours()? {
        let kernels = on_mirror(args, &recipe)?;
        let wanted = match &args.kernel {
            Some(wanted) => slice::from_ref(wanted),
            None => &recipe.series[..],
        };
        for version in wanted {
            match kernels::choose(&kernels, &recipe, Some(version)) {
                Ok(kernel) => {
                    let args = ToolArgs {
                        kernel: Some(kernel.version.to_string()),
                        ..args.clone()
                    };
                    let sandbox = system(&args, &recipe, Kind::Sandbox, |it| kernel.is_of(it))?;
                    all.push(Tools::with_sandbox(&args, sandbox)?);
                }
                Err(error) => {
                    eprintln!("{}: {error:#}", recipe.flavour);
                    missing = Some(error);
                }
            }
        }
    }
    match missing {
        Some(error) if all.is_empty() => Err(error),
        _ => Ok(all),
    }
}

/// Returns the kernels of a flavour that the mirror has.
fn on_mirror(args: &ToolArgs, recipe: &Recipe) -> Result<Vec<Kernel>> {
    let cache = Cache::open()?;
    let _lock = lock(&cache)?;
    let steps = Steps::start(&cache.log())?;
    host::prepare(&steps)?;
    let settings = mirror::network_settings()?;
    let index = TempDir::new()?;
    steps.step(&format!("looking for kernels {}", recipe.flavour), || {
        Ok(find(args, recipe, &settings, index.path())?.1)
    })
}

/// Finds the first mirror that has backports. Returns the mirror and its kernels.
fn find(
    args: &ToolArgs,
    recipe: &Recipe,
    settings: &str,
    work: &Path,
) -> Result<(String, Vec<Kernel>)> {
    let mirrors = match &args.mirror {
        Some(mirror) => vec![mirror.clone()],
        None => mirror::candidates()?,
    };
    kernels::first_available(&mirrors, recipe, settings, work)
}

/// Lists the finished sandboxes that `args` permits, the preferred one first.
pub fn finished(args: &ToolArgs) -> Result<Vec<Sandbox>> {
    finished_of(args, &Recipe::load()?, Kind::Sandbox)
}

fn finished_of(args: &ToolArgs, recipe: &Recipe, kind: Kind) -> Result<Vec<Sandbox>> {
    let mut sandboxes = Cache::open()?.sandboxes(recipe, kind)?;
    if let Some(wanted) = &args.kernel {
        sandboxes.retain(|sandbox| {
            sandbox
                .version()
                .is_some_and(|version| version.is_of(wanted))
        });
    }
    Ok(sandboxes)
}

/// Returns an installed Debian system without any part of barlink, in use until the file is closed.
/// It is made if needed, for which this process must be root's.
pub fn debian(args: &ToolArgs) -> Result<(Sandbox, File)> {
    let debian = system(args, &Recipe::load()?, Kind::Debian, |_| true)?;
    let hold = hold(&debian)?;
    Ok((debian, hold))
}

/// Returns the tools for the kernel of an installed Debian system, in the revision that the system
/// has. They are set up if needed.
pub fn tools_for(args: &ToolArgs, debian: &Sandbox) -> Result<Tools> {
    let version = debian.version().map(|version| version.to_string());
    let args = ToolArgs {
        kernel: version,
        kernel_image: None,
        kernel_headers: None,
        ..args.clone()
    };
    let same = |sandbox: &Sandbox| sandbox.manifest.kernel() == debian.manifest.kernel();
    let sandbox = system(&args, &Recipe::load()?, Kind::Sandbox, same)?;
    ensure!(
        same(&sandbox),
        "the mirror has {} of the kernel of the Debian in {}: remove that folder",
        sandbox.manifest.package_version,
        debian.folder.display()
    );
    Tools::with_sandbox(&args, sandbox)
}

/// Disk space that a sandbox needs while it is made, in bytes.
const ROOM: u64 = 3 << 30;

/// Makes a sandbox, or waits until another process has made one that `find` finds.
fn build(
    args: &ToolArgs,
    recipe: &Recipe,
    kind: Kind,
    find_finished: impl FnOnce() -> Result<Option<Sandbox>>,
) -> Result<Sandbox> {
    let cache = Cache::open()?;
    let lock = lock(&cache)?;
    if let Some(sandbox) = find_finished()? {
        return Ok(sandbox);
    }
    let unfinished = cache.begin(&lock)?;
    cache.check_room(ROOM)?;
    let folder = unfinished.path();
    let steps = Steps::start(&cache.log())?;
    host::prepare(&steps)?;

    let settings = mirror::network_settings()?;
    let index = folder.join("index");
    let (mirror, kernel) = steps.step("looking for a kernel", || {
        let (mirror, kernels) = find(args, recipe, &settings, &index)?;
        let kernel = kernels::choose(&kernels, recipe, args.kernel.as_deref())?;
        Ok((mirror, kernel))
    })?;
    fs::remove_dir_all(index)?;

    let manifest = match kind {
        Kind::Sandbox => {
            let packages = format!(
                "unpacking Debian packages with kernel {} from {mirror}",
                kernel.version
            );
            steps.step(&packages, || {
                rootfs::build(&steps, recipe, &kernel, &mirror, &settings, folder)
            })?;
            let sandbox = Unfinished {
                steps: &steps,
                kernel: &kernel,
                folder,
            };
            steps.step("making the kernel's Rust metadata", || sandbox.make())?;
            steps.step("trying it with a small module", || sandbox.check())?
        }
        Kind::Debian => {
            let installing = format!(
                "installing Debian with kernel {} from {mirror}",
                kernel.version
            );
            steps.step(&installing, || {
                debian::build(&steps, recipe, &kernel, &mirror, &settings, folder)
            })?
        }
    };
    cache.finish(unfinished, recipe, kind, &manifest)
}
