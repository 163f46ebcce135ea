// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One Debian package: its files in a folder as they will be installed, its control files for
//! `dpkg`, and the archive.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use walkdir::WalkDir;

use super::manual;
use barlink_sandbox::builds::{Built, repository};

/// Folder with the packages' descriptions, and the files that only packages have.
pub(super) const FOLDER: &str = "images/packaging";

const SCRIPTS: [&str; 2] = ["postinst", "prerm"];

/// Start of the source of a [`File`] that is a program.
const PROGRAM: &str = "program:";

/// The source of a [`File`] that stands for [`Common::modules`].
const MODULES: &str = "modules:";

/// A table of `images/packaging/packages.toml`, which explains each field.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Package {
    pub(super) name: String,
    architecture: String,
    depends: Vec<String>,
    recommends: Vec<String>,
    #[serde(default)]
    conflicts: Vec<String>,
    section: String,
    summary: String,
    details: String,
    manual: Option<String>,
    files: Vec<File>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    from: String,
    to: String,
}

/// Content that all packages share.
pub(super) struct Common {
    /// Values of placeholders by name: `VERSION` for `@VERSION@`, and the like.
    pub(super) words: HashMap<&'static str, String>,
    /// Paths of the programs.
    pub(super) programs: Built,
    /// Folder with the built drivers, if these are to be packed.
    pub(super) modules: Option<PathBuf>,
    /// Name and mail address of the maintainer.
    pub(super) maintainer: String,
    /// Date of all files, in seconds since 1970, and the same date as text.
    pub(super) date: (String, String),
}

impl Package {
    /// Returns whether the package holds built drivers.
    pub(super) fn has_modules(&self) -> bool {
        self.files.iter().any(|file| file.from == MODULES)
    }

    /// Makes the package in `folder`, and returns its path.
    pub(super) fn build(&self, common: &Common, folder: &Path) -> Result<PathBuf> {
        let staging = tempfile::tempdir_in(folder)?;
        let root = staging.path().join("root");
        for file in &self.files {
            common.install(file, &root)?;
        }
        if let Some(program) = &self.manual {
            let pages = root.join("usr/share/man/man1");
            for page in manual::write(program, &pages)? {
                compress(&page)?;
            }
        }
        for page in WalkDir::new(root.join("usr/share/man/man8")) {
            // Skips errors, because most packages have no such page.
            if let Ok(page) = page
                && page.file_type().is_file()
            {
                compress(page.path())?;
            }
        }
        self.document(common, &root)?;
        self.describe(common, &root)?;
        for entry in WalkDir::new(&root) {
            let entry = entry?;
            set_mode(entry.path(), is_program(entry.path())?)?;
        }

        let version = common.word("VERSION")?;
        let archive = folder.join(format!("{}_{version}_{}.deb", self.name, self.architecture));
        run(Command::new("dpkg-deb")
            .args(["--root-owner-group", "--build"])
            .arg(&root)
            .arg(&archive)
            .env("SOURCE_DATE_EPOCH", &common.date.0))?;
        Ok(archive)
    }

    /// Writes the licence and the changelog that Debian requires.
    fn document(&self, common: &Common, root: &Path) -> Result<()> {
        let folder = root.join("usr/share/doc").join(&self.name);
        fs::create_dir_all(&folder)?;
        let licence = repository().join(FOLDER).join("copyright");
        fs::copy(licence, folder.join("copyright"))?;
        let changes = folder.join("changelog");
        fs::write(
            &changes,
            format!(
                "{} ({}) unstable; urgency=medium\n\n  * As in the project's own history.\n\n -- {}  {}\n",
                self.name,
                common.word("VERSION")?,
                common.maintainer,
                common.date.1
            ),
        )?;
        compress(&changes)
    }

    /// Writes the package's folder `DEBIAN`: checksums, control file and scripts.
    fn describe(&self, common: &Common, root: &Path) -> Result<()> {
        let folder = root.join("DEBIAN");
        fs::create_dir(&folder)?;
        let mut kilobytes = 0;
        let mut sums = String::new();
        for entry in WalkDir::new(root).sort_by_file_name() {
            let entry = entry?;
            if entry.file_type().is_file() {
                kilobytes += entry.metadata()?.len().div_ceil(1024);
                let name = entry.path().strip_prefix(root)?;
                sums += &run(Command::new("md5sum").arg(name).current_dir(root))?;
            }
        }
        fs::write(folder.join("md5sums"), sums)?;

        let mut control = String::new();
        let mut field = |name: &str, value: &str| {
            if value.is_empty() {
                Ok(())
            } else {
                writeln!(control, "{name}: {value}")
            }
        };
        field("Package", &self.name)?;
        field("Version", common.word("VERSION")?)?;
        field("Architecture", &self.architecture)?;
        field("Maintainer", &common.maintainer)?;
        field("Installed-Size", &kilobytes.to_string())?;
        field("Depends", &common.fill(&self.depends.join(", ")))?;
        field("Recommends", &common.fill(&self.recommends.join(", ")))?;
        field("Conflicts", &self.conflicts.join(", "))?;
        field("Section", &self.section)?;
        field("Priority", "optional")?;
        field("Description", &self.summary)?;
        for line in self.details.lines() {
            writeln!(control, " {line}")?;
        }
        fs::write(folder.join("control"), control)?;

        for script in SCRIPTS {
            let source = repository()
                .join(FOLDER)
                .join(format!("{}.{script}", self.name));
            if source.is_file() {
                let text = fs::read_to_string(&source)?;
                fs::write(folder.join(script), common.fill(&text))?;
            }
        }
        Ok(())
    }
}

impl Common {
    fn word(&self, name: &str) -> Result<&String> {
        self.words
            .get(name)
            .with_context(|| format!("nothing is known of {name}"))
    }

    /// Replaces placeholders by their values.
    fn fill(&self, text: &str) -> String {
        let words = self.words.iter();
        words.fold(text.to_owned(), |text, (name, value)| {
            text.replace(&format!("@{name}@"), value)
        })
    }

    /// Copies one file or several to their places in the package. Replaces placeholders in text
    /// files, and strips programs.
    fn install(&self, file: &File, root: &Path) -> Result<()> {
        let to = self.fill(&file.to);
        let sources = self.sources(&file.from)?;
        ensure!(!sources.is_empty(), "there is no {}", file.from);
        for (source, name) in sources {
            let mut target = root.join(&to);
            if to.ends_with('/') {
                target.push(name);
            }
            fs::create_dir_all(target.parent().unwrap_or(root))?;
            let shown = || format!("{} cannot be packed", source.display());
            let content = fs::read(&source).with_context(shown)?;
            if let Ok(text) = std::str::from_utf8(&content) {
                fs::write(&target, self.fill(text))?;
            } else {
                fs::write(&target, content)?;
            }
            if file.from.starts_with(PROGRAM) {
                run(Command::new("strip").arg("--strip-unneeded").arg(&target))?;
            }
        }
        Ok(())
    }

    /// Returns the paths of files, and their names in a folder of the package.
    fn sources(&self, from: &str) -> Result<Vec<(PathBuf, PathBuf)>> {
        let (folder, ending) = if from == MODULES {
            let folder = self.modules.clone();
            (folder.context("no driver is built")?, "")
        } else if let Some(name) = from.strip_prefix(PROGRAM) {
            return Ok(vec![(self.programs.program(name)?.to_owned(), name.into())]);
        } else if let Some((folder, ending)) = from.split_once('*') {
            (repository().join(folder), ending)
        } else {
            let path = repository().join(from);
            let name = path.file_name().unwrap_or_default().into();
            return Ok(vec![(path, name)]);
        };
        let mut sources = Vec::new();
        for entry in WalkDir::new(&folder).sort_by_file_name() {
            let path = entry?.into_path();
            if path.is_file() && path.to_string_lossy().ends_with(ending) {
                let name = path.strip_prefix(&folder)?.to_owned();
                sources.push((path, name));
            }
        }
        Ok(sources)
    }
}

/// Returns whether a path needs the execute permission: a folder, a program or a script.
fn is_program(path: &Path) -> Result<bool> {
    let parent = path.parent().and_then(Path::file_name);
    let parent = parent.unwrap_or_default();
    Ok(path.is_dir() || parent == "bin" || fs::read(path)?.starts_with(b"#!/"))
}

fn set_mode(path: &Path, program: bool) -> Result<()> {
    let mode = if program { 0o755 } else { 0o644 };
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

/// Compresses a file in the form that Debian requires of manuals and changelogs.
fn compress(path: &Path) -> Result<()> {
    run(Command::new("gzip").args(["-9", "--no-name"]).arg(path)).map(drop)
}

/// Runs a program and returns its standard output. An error, with its standard error, if it fails.
pub(super) fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().display().to_string();
    let output = command
        .output()
        .with_context(|| format!("{program} cannot be started: install it"))?;
    ensure!(
        output.status.success(),
        "{program} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(String::from_utf8(output.stdout)?)
}
