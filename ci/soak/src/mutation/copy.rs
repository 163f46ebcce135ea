// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The copy of the tree into which faults are written. It is kept between runs, so that cargo
//! builds only files that have changed.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use barlink_sandbox::builds::{TreeCopy, repository, target_folder};
use rustix::fs::{FlockOperation, flock};
use walkdir::WalkDir;

/// A copy of the tree.
pub struct Copied {
    folder: PathBuf,
    tree: TreeCopy,
    /// Locked, so that no other process changes the copy.
    _lock: File,
}

impl Copied {
    /// Brings the copy up to date, so that it has no fault. Waits while another process uses it.
    pub fn new() -> Result<Self> {
        let folder = target_folder()?.join("mutations");
        let root = folder.join("tree");
        fs::create_dir_all(&root)?;
        let lock = lock(&folder.join("lock"))?;
        let wanted = files(&repository())?;
        for file in files(&root)?.difference(&wanted) {
            fs::remove_file(root.join(file))?;
        }
        for file in &wanted {
            let from = repository().join(file);
            let content =
                fs::read(&from).with_context(|| format!("{} cannot be read", from.display()))?;
            write(&root.join(file), &content)?;
        }
        Ok(Self {
            tree: TreeCopy {
                root,
                target: folder.join("build"),
            },
            folder,
            _lock: lock,
        })
    }

    /// Writes a fault into the copy.
    pub fn replace(&self, file: &str, from: &str, to: &str) -> Result<()> {
        let content = changed(file, from, to)?;
        write(&self.tree.root.join(file), content.as_bytes())
    }

    /// Returns the copy.
    pub fn tree(&self) -> &TreeCopy {
        &self.tree
    }

    /// Returns the folder for all files that mutations need.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Locks a file, and creates it if it is missing. Waits while another process has the lock.
fn lock(path: &Path) -> Result<File> {
    let file = File::create(path)?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        println!("waiting for another `cargo xtask soak` that tests mutations ...");
        flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("{} cannot be locked", path.display()))?;
    }
    Ok(file)
}

/// Returns the content of a file of the tree with a fault.
///
/// # Errors
///
/// The code to replace does not occur exactly once.
pub fn changed(file: &str, from: &str, to: &str) -> Result<String> {
    let path = repository().join(file);
    let content = fs::read_to_string(&path)
        .with_context(|| format!("{file} cannot be read: the table of mutations must follow"))?;
    let times = content.matches(from).count();
    ensure!(
        times == 1,
        "{file} holds `{}` {times} times and not once: the code has changed, and the table of mutations must follow",
        from.trim()
    );
    Ok(content.replace(from, to))
}

/// Writes a file unless it has this content already, so that cargo sees only real changes.
fn write(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    fs::create_dir_all(path.parent().context("a file has no folder")?)?;
    fs::write(path, content).with_context(|| format!("{} cannot be written", path.display()))
}

/// Returns the paths of all files below the root of a tree, without those of git and build results.
fn files(root: &Path) -> Result<HashSet<PathBuf>> {
    let target = target_folder()?;
    let entries = WalkDir::new(root).into_iter().filter_entry(|entry| {
        let is_root = entry.depth() == 0;
        let is_foreign = entry.file_name() == ".git" || entry.file_name() == "target";
        is_root || !is_foreign && entry.path() != target
    });
    let mut files = HashSet::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type().is_file() {
            files.insert(entry.path().strip_prefix(root)?.to_owned());
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_code_that_does_not_occur_once() {
        const LICENSE: &str = "// SPDX-License-Identifier";
        let file = "ci/soak/src/mutation/copy.rs";
        // The text occurs in this test and in the first line of the file.
        assert!(changed(file, LICENSE, "").is_err());
        assert!(changed(file, concat!("not ", "in this file"), "").is_err());
        assert!(changed("no/such/file", "a", "b").is_err());
        let once = changed(file, concat!("use walkdir", "::WalkDir;"), "").unwrap();
        assert!(!once.contains(concat!("use walkdir", "::")));
    }
}
