// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Snapshots of booted guests, one for each kind of VM. A snapshot is made when it is first needed,
//! and stored in the cache folder under the hash of its inputs
//! (`docs/decisions/0010-restored-guests.md`).

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

/// Timeout of a write or read of a guest's memory. On an idle machine a write takes 0.9 s, a read
/// 0.1 s.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Number of stored snapshots, of about 130 MB each. They cover the last builds, for four kinds of
/// VM.
const KEPT: usize = 16;

/// Name of the file beside the snapshots that a process locks while it makes one.
const LOCK: &str = "lock";

/// Opens the snapshot of a guest of this kind, and makes it first if there is none.
///
/// Processes that want the same snapshot wait until the first of them has made it.
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

/// Returns the folder of the snapshots, and creates it if needed.
fn folder() -> Result<PathBuf> {
    let folder = cache_folder()?.join("snapshots");
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Removes all snapshots and returns their paths. A QEMU that has one open is not affected.
pub fn remove_snapshots() -> Result<Vec<PathBuf>> {
    let folder = folder()?;
    let lock = File::create(folder.join(LOCK))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    prune(&folder, 0)
}

/// Opens the snapshot at a path, if there is one, and sets its time of modification to now, which
/// records its last use.
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

/// Removes the least recently used snapshots, all but `kept` of them, and returns their paths.
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

/// Returns the name of a snapshot: the hash of QEMU, the kernel, the guest's files, and the kind of
/// VM.
fn name(artifacts: &Artifacts, config: &Config) -> Result<String> {
    let mut hash = Sha256::new();
    let parts = [
        artifacts.identity()?,
        // Leaves out devices that are plugged in later, and options that do not change the machine.
        format!(
            "{} {} {} {} {:?}",
            config.machine, config.memory_mib, config.cpus, config.shared_memory, config.iommu
        ),
        crate::accelerator::identity(artifacts),
        // Another version of `qemu.rs` starts QEMU with other arguments.
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

/// Boots a guest with free root ports and no devices in them, and writes it to a file.
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

/// Reads the guest from the snapshot that QEMU has open, and lets it run.
pub(crate) fn load(qmp: &Qmp) -> Result<()> {
    qmp.execute("migrate-incoming", &json!({ "uri": crate::qemu::SNAPSHOT }))?;
    wait(qmp)?;
    qmp.execute("cont", &json!({})).map(drop)
}

/// Waits until QEMU has written or read the guest.
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
