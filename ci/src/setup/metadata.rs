// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The Rust metadata that Debian's header packages lack, made again from the kernel's own source.
//!
//! Without it no Rust module can be built. The same source, configuration and compiler give the same crate hashes as
//! Debian's build gave, so that what is built against the result fits the kernel as it was shipped; a trial shows it.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result};

use super::kernels::Kernel;
use crate::module::ModuleBuild;
use crate::recipe::TRIAL;
use crate::sandbox::{Enter, Manifest, Sandbox, Writable};
use crate::steps::Steps;
use crate::tools::Headers;

/// Where the steps below find things inside the sandbox.
const SOURCE: &str = "/build/source";
const OUTPUT: &str = "/build/output";

/// The sandbox while it is being built.
pub(super) struct Unfinished<'a> {
    /// Runs the programs.
    pub(super) steps: &'a Steps,
    /// The kernel whose headers are completed.
    pub(super) kernel: &'a Kernel,
    /// The folder that holds `root/`.
    pub(super) folder: &'a Path,
}

impl Unfinished<'_> {
    fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    fn build(&self) -> PathBuf {
        self.folder.join("build")
    }

    fn headers(&self) -> PathBuf {
        let name = format!("usr/src/linux-headers-{}", self.kernel.release);
        self.root().join(name)
    }

    fn enter(&self) -> Enter {
        Enter::new(&self.root(), Writable::Yes).bind(&self.build(), "/build")
    }

    /// Unpacks the kernel's source; the archive stays.
    pub(super) fn unpack_source(&self) -> Result<()> {
        let build = self.build();
        fs::create_dir_all(build.join("source"))?;
        fs::create_dir_all(build.join("output"))?;
        let archive = format!(
            "/usr/src/linux-source-{}.tar.xz",
            self.kernel.version.series()
        );
        self.steps.run(
            self.enter()
                .run("tar")
                .args(["--extract", "--strip-components=1"])
                .args(["--directory", SOURCE, "--file", &archive]),
        )
    }

    /// Makes the metadata, by the kernel's own rules, and puts it where module builds look for it.
    pub(super) fn make(&self) -> Result<()> {
        let output = self.build().join("output");
        fs::copy(self.headers().join(".config"), output.join(".config"))?;
        let jobs = thread::available_parallelism().map_or(2, usize::from);
        let make = |arguments: &[&str]| {
            self.steps.run(
                self.enter()
                    .run("make")
                    .args(["--silent", "--directory", SOURCE])
                    .args([&format!("--jobs={jobs}"), &format!("O={OUTPUT}")])
                    // Asked of the system otherwise, which knows no such user.
                    .args(["KBUILD_BUILD_USER=barlink", "KBUILD_BUILD_HOST=barlink"])
                    .args(arguments),
            )
        };
        make(&["olddefconfig"])?;
        // Objects are not kept, so objtool and BTF need not be built for them. Only make is told so and not the
        // configuration, so that the metadata comes out the same to the byte.
        make(&["prepare", "CONFIG_OBJTOOL=", "CONFIG_DEBUG_INFO_BTF="])?;

        let rust = self.headers().join("rust");
        fs::create_dir_all(&rust)?;
        for entry in fs::read_dir(output.join("rust"))? {
            let path = entry?.path();
            let wanted = |extension| path.extension().is_some_and(|found| found == extension);
            if let Some(name) = path.file_name()
                && (wanted("rmeta") || wanted("so"))
            {
                fs::rename(&path, rust.join(name))?;
            }
        }
        let target = "scripts/target.json";
        fs::rename(output.join(target), self.headers().join(target))
            .context("the build of the kernel's metadata made no target description")
    }

    /// Builds a small module against the completed headers, and removes what was needed for the build alone.
    pub(super) fn check(&self) -> Result<()> {
        let source = self.build().join("trial");
        let output = self.build().join("trial-output");
        for folder in [&source, &output] {
            fs::create_dir(folder)?;
        }
        for (name, content) in TRIAL {
            fs::write(source.join(name), content)?;
        }
        let sandbox = Sandbox {
            folder: self.folder.to_owned(),
            manifest: self.manifest(),
        };
        let trial = ModuleBuild {
            source: &source,
            included: &[],
            output: &output,
        };
        self.steps
            .run(&mut trial.command(&Headers::Sandboxed(sandbox))?)
            .context("no module can be built against the completed headers")?;
        fs::remove_dir_all(self.build())?;
        Ok(())
    }

    /// What describes the finished sandbox.
    pub(super) fn manifest(&self) -> Manifest {
        Manifest {
            release: self.kernel.release.clone(),
            package_version: self.kernel.package_version.clone(),
        }
    }
}
