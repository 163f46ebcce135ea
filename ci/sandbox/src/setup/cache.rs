// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The folder of finished sandboxes. A sandbox is built under another name, and then renamed.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use indicatif::BinaryBytes;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tempfile::TempDir;

use super::kernels::revision;
use crate::recipe::{HASH_DIGITS, Kind, Recipe};
use crate::sandbox::{Manifest, Sandbox};

/// Prefix of the names of unfinished sandboxes.
const UNFINISHED: &str = ".unfinished-";
const MANIFEST: &str = "sandbox.json";

/// The cache folder, by default `~/.cache/barlink`.
#[derive(Debug)]
pub(super) struct Cache {
    folder: PathBuf,
}

/// The exclusive right to change the cache. Dropping it releases the right.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Cache {
    /// Finds the folder by `XDG_CACHE_HOME` or `HOME`, and creates it if needed.
    pub(super) fn open() -> Result<Self> {
        let absolute = |name| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let parent = absolute("XDG_CACHE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
            .context("there is no place for the sandbox: set HOME or XDG_CACHE_HOME")?;
        let folder = parent.join("barlink");
        // Only the owner has access, because a sandbox built by root has programs with the
        // set-user-ID bit.
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .with_context(|| format!("{} cannot be made", folder.display()))?;
        Ok(Self { folder })
    }

    /// Returns the path of the folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Checks that the disk has `needed` bytes free, so that a set-up fails early.
    pub(super) fn check_room(&self, needed: u64) -> Result<()> {
        let disk = rustix::fs::statvfs(&self.folder)?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        ensure!(
            free >= needed,
            "{} is on a disk with {} left, and a sandbox needs {}: make room, remove old sandboxes with `cargo xtask clean`, or \
             set XDG_CACHE_HOME to a folder elsewhere",
            self.folder.display(),
            BinaryBytes(free),
            BinaryBytes(needed)
        );
        Ok(())
    }

    /// Returns the path of the log of the latest set-up.
    pub(super) fn log(&self) -> PathBuf {
        self.folder.join("setup.log")
    }

    /// Returns the folder of the programs that are in no sandbox.
    pub(super) fn programs(&self) -> PathBuf {
        self.folder.join("programs")
    }

    /// Lists the finished sandboxes of this recipe, its flavour and this kind, the preferred one
    /// first.
    pub(super) fn sandboxes(&self, recipe: &Recipe, kind: Kind) -> Result<Vec<Sandbox>> {
        let mut found = Vec::new();
        for folder in self.finished()? {
            if is_of(&folder, recipe, kind) {
                let sandbox = read(&folder)?;
                if let Some(version) = sandbox.version()
                    && sandbox.manifest.release.ends_with(&recipe.flavour)
                    && let Some(rank) = recipe.rank(&version)
                {
                    let revision = revision(&sandbox.manifest.package_version);
                    found.push((rank, Reverse(version), Reverse(revision), sandbox));
                }
            }
        }
        found.sort_by(|a, b| (a.0, &a.1, &a.2).cmp(&(b.0, &b.1, &b.2)));
        Ok(found.into_iter().map(|(.., sandbox)| sandbox).collect())
    }

    /// Lists the finished sandboxes that no task uses by itself: those of other recipes, and those
    /// of kernels that have a newer one of their series and flavour.
    pub(super) fn unused(&self, recipe: &Recipe) -> Result<Vec<PathBuf>> {
        let mut newest = HashMap::new();
        let mut unused = Vec::new();
        for folder in self.finished()? {
            let mut kinds = Kind::ALL.into_iter();
            let kind = kinds.find(|kind| is_of(&folder, recipe, *kind));
            if !is_named_as_ours(&folder) {
                continue;
            }
            let sandbox = read(&folder)?;
            let release = &sandbox.manifest.release;
            let parts = sandbox.version().zip(release.split_once('+'));
            let Some((kind, (version, (_, flavour)))) = kind.zip(parts) else {
                unused.push(folder);
                continue;
            };
            let key = (kind, version.series(), flavour.to_owned());
            let age = (version, revision(&sandbox.manifest.package_version));
            match newest.entry(key) {
                Entry::Vacant(entry) => drop(entry.insert((age, folder))),
                Entry::Occupied(mut entry) if entry.get().0 < age => {
                    unused.push(entry.insert((age, folder)).1);
                }
                Entry::Occupied(_) => unused.push(folder),
            }
        }
        unused.sort();
        Ok(unused)
    }

    /// Removes the unused sandboxes, except for those in use, and the remains of interrupted
    /// set-ups. Returns the removed sandboxes and the ones left in use.
    pub(super) fn clean(
        &self,
        recipe: &Recipe,
        lock: &Lock,
    ) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
        self.remove_unfinished(lock)?;
        let (mut removed, mut left) = (Vec::new(), Vec::new());
        for folder in self.unused(recipe)? {
            let manifest = File::open(folder.join(MANIFEST))?;
            match flock(&manifest, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => (),
                Err(Errno::WOULDBLOCK) => {
                    left.push(folder);
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            // Marks the sandbox as unfinished first, so that the next set-up removes it if this is
            // interrupted.
            let mut name = OsString::from(UNFINISHED);
            name.push(folder.file_name().unwrap_or_default());
            fs::rename(&folder, self.folder.join(name))?;
            self.remove_unfinished(lock)?;
            removed.push(folder);
        }
        Ok((removed, left))
    }

    fn finished(&self) -> Result<Vec<PathBuf>> {
        let mut folders = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let unfinished = entry.file_name().to_string_lossy().starts_with(UNFINISHED);
            if !unfinished && entry.path().join(MANIFEST).is_file() {
                folders.push(entry.path());
            }
        }
        Ok(folders)
    }

    /// Waits until no other set-up runs. Calls `waiting` first if the lock is taken.
    pub(super) fn lock(&self, waiting: impl FnOnce()) -> Result<Lock> {
        let path = self.folder.join("lock");
        let file =
            File::create(&path).with_context(|| format!("{} cannot be opened", path.display()))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {
                waiting();
                flock(&file, FlockOperation::LockExclusive)?;
            }
            other => other?,
        }
        Ok(Lock { _file: file })
    }

    /// Removes the remains of interrupted set-ups.
    fn remove_unfinished(&self, _lock: &Lock) -> Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                let path = entry.path();
                fs::remove_dir_all(&path)
                    .with_context(|| format!("{} cannot be removed", path.display()))?;
            }
        }
        Ok(())
    }

    /// Removes the remains of interrupted set-ups, and creates the folder of a new sandbox. The
    /// folder is removed again unless the sandbox is finished.
    pub(super) fn begin(&self, lock: &Lock) -> Result<TempDir> {
        self.remove_unfinished(lock)?;
        Ok(tempfile::Builder::new()
            .prefix(UNFINISHED)
            // Programs that drop their rights, such as apt's downloads, need access.
            .permissions(PermissionsExt::from_mode(0o755))
            .tempdir_in(&self.folder)?)
    }

    /// Turns `unfinished` into a finished sandbox with its final name.
    pub(super) fn finish(
        &self,
        unfinished: TempDir,
        recipe: &Recipe,
        kind: Kind,
        manifest: &Manifest,
    ) -> Result<Sandbox> {
        let file = File::create(unfinished.path().join(MANIFEST))?;
        serde_json::to_writer_pretty(&file, manifest)?;
        // Written to disk before the rename, because a power failure could else leave empty files
        // under the final name.
        rustix::fs::syncfs(&file)?;
        let name = format!(
            "{}_{}{}",
            manifest.release,
            manifest.package_version,
            ending(recipe, kind)
        );
        let folder = self.folder.join(name);
        fs::rename(unfinished.path(), &folder).with_context(|| {
            format!(
                "the finished sandbox cannot be moved to {}; remove what is there",
                folder.display()
            )
        })?;
        // The folder was renamed, so there is nothing to remove.
        let _ = unfinished.keep();
        read(&folder)
    }
}

/// Returns the suffix of the names of a recipe's sandboxes.
fn ending(recipe: &Recipe, kind: Kind) -> String {
    format!("-{}", recipe.hash(kind))
}

fn is_of(folder: &Path, recipe: &Recipe, kind: Kind) -> bool {
    let name = folder.file_name().unwrap_or_default();
    name.to_string_lossy().ends_with(&ending(recipe, kind))
}

/// Returns whether a finished sandbox has a name in the form of [`Cache::finish`]. Other folders
/// may be the user's.
fn is_named_as_ours(folder: &Path) -> bool {
    let is_folder = fs::symlink_metadata(folder).is_ok_and(|metadata| metadata.is_dir());
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let hash = read(folder).ok().and_then(|sandbox| {
        let rest = name.strip_prefix(&sandbox.manifest.release)?;
        // Earlier releases left the version of the package out.
        let version = format!("_{}", sandbox.manifest.package_version);
        let hash = rest.strip_prefix(&version).unwrap_or(rest);
        hash.strip_prefix('-').map(str::to_owned)
    });
    let digit = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    is_folder && hash.is_some_and(|hash| hash.len() == HASH_DIGITS && hash.bytes().all(digit))
}

/// Marks a sandbox as in use, so that it is not removed, until the returned file is closed.
pub(super) fn hold(sandbox: &Sandbox) -> Result<File> {
    let path = sandbox.folder.join(MANIFEST);
    let file = File::open(&path).with_context(|| format!("{} cannot be opened", path.display()))?;
    flock(&file, FlockOperation::LockShared)?;
    Ok(file)
}

fn read(folder: &Path) -> Result<Sandbox> {
    let path = folder.join(MANIFEST);
    let manifest = File::open(&path).map_err(anyhow::Error::new);
    let manifest = manifest.and_then(|file| Ok(serde_json::from_reader(file)?));
    Ok(Sandbox {
        folder: folder.to_owned(),
        manifest: manifest.with_context(|| {
            format!(
                "{} cannot be read; remove {}",
                path.display(),
                folder.display()
            )
        })?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a cache in a new folder, with a folder that looks like a finished sandbox for each
    /// name.
    fn cache(names: &[&str]) -> (TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            add(
                &folder.path().join(name),
                "7.2.12+deb13-cloud-amd64",
                "7.2.12-1",
            );
        }
        let cache = Cache {
            folder: folder.path().to_owned(),
        };
        (folder, cache)
    }

    /// Makes a folder that looks like a finished sandbox.
    fn add(sandbox: &Path, release: &str, package_version: &str) {
        fs::create_dir_all(sandbox.join("root/usr")).unwrap();
        let manifest = Manifest {
            release: release.to_owned(),
            package_version: package_version.to_owned(),
            kernel_image: "vmlinuz".into(),
        };
        let manifest = serde_json::to_vec(&manifest).unwrap();
        fs::write(sandbox.join(MANIFEST), manifest).unwrap();
    }

    /// Finishes a sandbox of this kind, and returns its folder.
    fn finish(cache: &Cache, kind: Kind, release: &str, package_version: &str) -> PathBuf {
        let lock = cache.lock(|| ()).unwrap();
        let manifest = Manifest {
            release: release.to_owned(),
            package_version: package_version.to_owned(),
            kernel_image: "vmlinuz".into(),
        };
        let unfinished = cache.begin(&lock).unwrap();
        let recipe = Recipe::load().unwrap();
        let sandbox = cache.finish(unfinished, &recipe, kind, &manifest);
        sandbox.unwrap().folder
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn cache_reports_lack_of_disk_space() {
        let (_folder, cache) = cache(&[]);
        cache.check_room(1).unwrap();
        let error = cache.check_room(u64::MAX).unwrap_err().to_string();
        assert!(
            error.contains("make room") && error.contains("XDG_CACHE_HOME"),
            "{error}"
        );
    }

    #[test]
    fn clean_removes_only_sandboxes_of_other_recipes() {
        let recipe = Recipe::load().unwrap();
        let [own, debian] =
            Kind::ALL.map(|kind| format!("7.2.12+deb13-cloud-amd64{}", ending(&recipe, kind)));
        let old = "7.2.12+deb13-cloud-amd64-0123456789ab";
        let older = "7.2.12+deb13-cloud-amd64_7.2.12-1-0123456789ab";
        let others = [
            "7.2.12+deb13-cloud-amd64_7.2.12-2-0123456789ab",
            "7.2.12+deb13-cloud-amd64-backup",
            "7.2.12+deb13-cloud-amd64-0123456789ab.old",
            "7.3.4+deb13-cloud-amd64-0123456789ab",
            "notes",
        ];
        let (folder, cache) = cache(&[&[&own[..], &debian, old, older], &others[..]].concat());
        let link = "7.2.12+deb13-cloud-amd64-ba9876543210";
        let (elsewhere, _) = self::cache(&[link]);
        let linked = elsewhere.path().join(link);
        std::os::unix::fs::symlink(&linked, folder.path().join(link)).unwrap();
        fs::create_dir(folder.path().join(".unfinished-x")).unwrap();

        let lock = cache.lock(|| ()).unwrap();
        let (removed, left) = cache.clean(&recipe, &lock).unwrap();
        let old = [old, older].map(|name| folder.path().join(name));
        assert_eq!((&removed[..], left), (&old[..], vec![]));
        let mut expected = [&others[..], &[&own[..], &debian, link, "lock"]].concat();
        expected.sort_unstable();
        assert_eq!(names(folder.path()), expected);
        assert!(linked.join("root/usr").exists());
    }

    #[test]
    fn clean_removes_superseded_kernels() {
        let (_folder, cache) = cache(&[]);
        let [cloud, other] = ["+deb13-cloud-amd64", "+deb13-amd64"];
        let add = |kind, flavour: &str, version: &str, revision: u32| {
            let package = format!("{version}-{revision}~bpo13+1");
            finish(&cache, kind, &format!("{version}{flavour}"), &package)
        };
        let mut superseded = [
            add(Kind::Sandbox, cloud, "7.3.4", 2),
            add(Kind::Sandbox, cloud, "7.3.4", 9),
            add(Kind::Debian, cloud, "7.3.3", 1),
            add(Kind::Sandbox, other, "7.3.9", 1),
        ];
        let mut newest = [
            add(Kind::Sandbox, cloud, "7.3.4", 10),
            add(Kind::Sandbox, cloud, "7.2.12", 1),
            add(Kind::Debian, cloud, "7.3.4", 1),
            add(Kind::Sandbox, other, "7.3.10", 1),
        ];
        let recipe = Recipe::load().unwrap();
        let preferred = cache.sandboxes(&recipe, Kind::Sandbox).unwrap();
        assert_eq!(preferred[0].folder, newest[0]);
        let lock = cache.lock(|| ()).unwrap();
        let (removed, left) = cache.clean(&recipe, &lock).unwrap();
        superseded.sort();
        assert_eq!((&removed[..], left), (&superseded[..], vec![]));
        let mut stay = cache.finished().unwrap();
        stay.sort();
        newest.sort();
        assert_eq!(stay, newest);
    }

    #[test]
    fn clean_leaves_sandbox_in_use() {
        let recipe = Recipe::load().unwrap();
        let old = "7.2.12+deb13-cloud-amd64-0123456789ab";
        let (folder, cache) = cache(&[old]);
        let path = folder.path().join(old);
        let lock = cache.lock(|| ()).unwrap();
        let holds = [(); 2].map(|()| hold(&read(&path).unwrap()).unwrap());
        let (removed, left) = cache.clean(&recipe, &lock).unwrap();
        assert_eq!((removed, left), (vec![], vec![path.clone()]));
        assert!(path.join("root/usr").exists());
        drop(holds);
        let (removed, _) = cache.clean(&recipe, &lock).unwrap();
        assert_eq!(removed, [path]);
        assert_eq!(names(folder.path()), ["lock"]);
    }
}
