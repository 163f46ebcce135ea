// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One Debian package: its files in a folder as they will be installed, what `dpkg` is to know of it, and the archive.

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

/// Where the descriptions, and what only packages have, are.
pub(super) const FOLDER: &str = "images/packaging";

const SCRIPTS: [&str; 2] = ["postinst", "prerm"];

/// A table of `images/packaging/packages.toml`, which explains each field.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Package {
    pub(super) name: String,
    architecture: String,
    depends: Vec<String>,
    recommends: Vec<String>,
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

/// What is put into all packages alike.
pub(super) struct Common {
    /// What takes the place of `@VERSION@` and the like.
    pub(super) words: HashMap<&'static str, String>,
    /// The programs.
    pub(super) programs: Built,
    /// Whom users write to.
    pub(super) maintainer: String,
    /// Seconds since 1970 that all files are dated with, and the same for people.
    pub(super) date: (String, String),
}

impl Package {
    /// Makes the package in `folder`, and gives its path.
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
            // Most have no page there.
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
            set_mode(entry.path(), is_program(entry.path()))?;
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

    /// The licence, and what Debian calls a changelog.
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

    /// What is in the package's folder `DEBIAN`.
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

    /// Puts what is known in the place of its name.
    fn fill(&self, text: &str) -> String {
        let words = self.words.iter();
        words.fold(text.to_owned(), |text, (name, value)| {
            text.replace(&format!("@{name}@"), value)
        })
    }

    /// Puts a file, or files, where the package will have them.
    fn install(&self, file: &File, root: &Path) -> Result<()> {
        let to = self.fill(&file.to);
        let sources = self.sources(&file.from)?;
        ensure!(!sources.is_empty(), "there is no {}", file.from);
        for source in sources {
            let mut target = root.join(&to);
            if to.ends_with('/') {
                target.push(source.file_name().unwrap_or_default());
            }
            fs::create_dir_all(target.parent().unwrap_or(root))?;
            let shown = || format!("{} cannot be packed", source.display());
            let content = fs::read(&source).with_context(shown)?;
            if let Ok(text) = std::str::from_utf8(&content) {
                fs::write(&target, self.fill(text))?;
            } else {
                fs::write(&target, content)?;
                run(Command::new("strip").arg("--strip-unneeded").arg(&target))?;
            }
        }
        Ok(())
    }

    fn sources(&self, from: &str) -> Result<Vec<PathBuf>> {
        if let Some(name) = from.strip_prefix("program:") {
            return Ok(vec![self.programs.program(name)?.to_owned()]);
        }
        let Some((folder, ending)) = from.split_once('*') else {
            return Ok(vec![repository().join(from)]);
        };
        let mut sources = Vec::new();
        for entry in fs::read_dir(repository().join(folder))? {
            let path = entry?.path();
            if path.to_string_lossy().ends_with(ending) {
                sources.push(path);
            }
        }
        sources.sort();
        Ok(sources)
    }
}

/// Whether a file is to be executed: whether it is a program or a script.
fn is_program(path: &Path) -> bool {
    let parent = path.parent().and_then(Path::file_name);
    let parent = parent.unwrap_or_default().to_string_lossy();
    let name = path.file_name().unwrap_or_default();
    path.is_dir()
        || ["bin", "sbin"].contains(&&*parent)
        || parent == "DEBIAN" && SCRIPTS.iter().any(|script| name == *script)
}

fn set_mode(path: &Path, program: bool) -> Result<()> {
    let mode = if program { 0o755 } else { 0o644 };
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

/// As Debian wants manuals and changelogs.
fn compress(path: &Path) -> Result<()> {
    run(Command::new("gzip").args(["-9", "--no-name"]).arg(path)).map(drop)
}

/// The standard output of a program that must succeed.
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
