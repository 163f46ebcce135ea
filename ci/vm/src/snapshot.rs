// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Snapshots of booted guests: one for each kind of VM, made when it is first asked for, and kept
//! in the cache folder under the hash of what made it (`docs/decisions/0010-restored-guests.md`).

use std::fs::{self, File, FileTimes};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::setup::cache_folder;
use rustix::fs::{FlockOperation, flock};
use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use crate::qmp::Qmp;
use crate::{Config, Vm};

/// How long QEMU may take to write or read a guest's memory: 0.9 s and 0.1 s on an idle machine.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Snapshots that are kept, of about 130 MB each: those of the last builds, for four kinds of VM.
const KEPT: usize = 16;

/// The file, beside the snapshots, that a process locks while it makes one.
const LOCK: &str = "lock";

/// Opens the snapshot of a guest of this kind, and makes it before if there is none.
///
/// Processes that want the same snapshot wait for the first of them to make it.
pub(crate) fn open(artifacts: &Artifacts, config: &Config) -> Result<File> {
    let folder = folder()?;
    let path = folder.join(name(artifacts, config)?);
    if let Some(file) = existing(&path)? {
        return Ok(file);
    }
    let lock = File::create(folder.join(LOCK))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    if let Some(file) = existing(&path)? {
        return Ok(file);
    }
    prune(&folder, KEPT - 1)?;
    let unfinished = NamedTempFile::new_in(&folder)?;
    make(artifacts, config, unfinished.as_file())
        .context("no snapshot of a booted guest can be made")?;
    Ok(unfinished.persist(&path)?)
}

/// The folder of the snapshots.
fn folder() -> Result<PathBuf> {
    let folder = cache_folder()?.join("snapshots");
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Removes all snapshots, and gives their paths. A QEMU that has one open goes on with it.
pub fn remove_snapshots() -> Result<Vec<PathBuf>> {
    let folder = folder()?;
    let lock = File::create(folder.join(LOCK))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    prune(&folder, 0)
}

/// The snapshot at a path, whose time of modification becomes that of its last use.
fn existing(path: &Path) -> Result<Option<File>> {
    match File::open(path) {
        Ok(file) => {
            file.set_times(FileTimes::new().set_modified(SystemTime::now()))?;
            Ok(Some(file))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
    }
}

/// Removes the snapshots that were not used for the longest time, but for so many, and gives their
/// paths.
fn prune(folder: &Path, kept: usize) -> Result<Vec<PathBuf>> {
    let mut snapshots: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name() != LOCK {
            snapshots.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    snapshots.sort();
    snapshots.truncate(snapshots.len().saturating_sub(kept));
    let paths: Vec<_> = snapshots.into_iter().map(|(_, path)| path).collect();
    for path in &paths {
        fs::remove_file(path).with_context(|| format!("{} cannot be removed", path.display()))?;
    }
    Ok(paths)
}

/// The hash of what makes a snapshot: QEMU, the kernel, what the guest boots into, and the kind of
/// VM.
fn name(artifacts: &Artifacts, config: &Config) -> Result<String> {
    let mut hash = Sha256::new();
    let parts = [
        artifacts.identity()?,
        // Devices that are plugged in later, and options that leave the machine as it is, share one
        // snapshot.
        format!(
            "{} {} {} {} {}",
            config.machine, config.memory_mib, config.cpus, config.shared_memory, config.iommu
        ),
        crate::accelerator::identity(artifacts.args.accel),
        // Another version of this program starts QEMU with other arguments.
        include_str!("qemu.rs").to_owned(),
    ];
    for part in parts {
        hash.update(part);
        hash.update([0]);
    }
    let digits = hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<String>();
    Ok(digits[..32].to_owned())
}

/// Boots a guest with free root ports and no device in them, and writes it to a file.
fn make(artifacts: &Artifacts, config: &Config, file: &File) -> Result<()> {
    let config = Config {
        arguments: Vec::new(),
        paths: Vec::new(),
        files: Vec::new(),
        ..config.clone()
    };
    let vm = Vm::boot_for_snapshot(artifacts, &config, file)?;
    vm.qmp("stop", &json!({}))?;
    vm.qmp("migrate", &json!({ "uri": crate::qemu::SNAPSHOT }))?;
    wait(&vm.qmp)
}

/// Reads a guest from the snapshot that QEMU was given, and lets it run.
pub(crate) fn load(qmp: &Qmp) -> Result<()> {
    qmp.execute("migrate-incoming", &json!({ "uri": crate::qemu::SNAPSHOT }))?;
    wait(qmp)?;
    qmp.execute("cont", &json!({})).map(drop)
}

/// Waits until QEMU has written or read a guest.
fn wait(qmp: &Qmp) -> Result<()> {
    let start = Instant::now();
    loop {
        let state = qmp.execute("query-migrate", &json!({}))?;
        match state["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed") => bail!("QEMU fails: {}", state["error-desc"]),
            _ => ensure!(
                start.elapsed() < TIMEOUT,
                "QEMU is not done after {TIMEOUT:?}: {state}"
            ),
        }
        thread::sleep(Duration::from_millis(5));
    }
}
