// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The Rust metadata that Debian's header packages lack, made from the kernel's own source.
//!
//! No Rust module can be built without that metadata. The same source, configuration and compiler
//! give the same crate hashes as Debian's build. So modules that are built against the result fit
//! Debian's kernel, as the build of a trial module shows.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::kernels::Kernel;
use crate::module::ModuleBuild;
use crate::recipe::TRIAL;
use crate::sandbox::{Enter, Manifest, Sandbox, Writable};
use crate::steps::Steps;
use crate::tools::Headers;

/// Script that makes the metadata and checks that it fits the kernel. Users have the same script in
/// the package barlink-dkms.
///
/// It works in `/build`, which is in memory, because a kernel's source has so many files that some
/// disks take minutes to remove them.
const MAKE: &str = include_str!("../../../../images/packaging/barlink-kernel-rust-headers");

/// A sandbox that is being built.
pub(super) struct Unfinished<'a> {
    /// Runs the programs, and logs their output.
    pub(super) steps: &'a Steps,
    /// The kernel whose headers get the metadata.
    pub(super) kernel: &'a Kernel,
    /// The folder that holds `root/`.
    pub(super) folder: &'a Path,
}

impl Unfinished<'_> {
    fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    /// Makes the metadata.
    pub(super) fn make(&self) -> Result<()> {
        self.steps.run(
            Enter::new(&self.root(), Writable::Yes)
                .memory("/build")
                .run("sh")
                .args(["-c", MAKE, "sh", "--no-apt", "--work", "/build"])
                .arg(&self.kernel.release),
        )
    }

    /// Checks the sandbox by the build of a trial module and the start of its programs. Removes the
    /// trial's files, and returns the description of the finished sandbox.
    pub(super) fn check(&self) -> Result<Manifest> {
        let Kernel {
            release,
            package_version,
            ..
        } = self.kernel;
        // The image has different names in Debian's signed and unsigned packages.
        let images = ["vmlinuz", "vmlinuz.unsigned"]
            .map(|name| PathBuf::from(format!("usr/lib/modules/{release}/{name}")));
        let image = images
            .into_iter()
            .find(|image| self.root().join(image).is_file());
        let manifest = Manifest {
            release: release.clone(),
            package_version: package_version.clone(),
            kernel_image: image.context("the kernel's package holds no image")?,
        };

        let source = self.folder.join("trial");
        let output = self.folder.join("trial-output");
        for folder in [&source, &output] {
            fs::create_dir(folder)?;
        }
        for (name, content) in TRIAL {
            fs::write(source.join(name), content)?;
        }
        let trial = ModuleBuild {
            source: &source,
            included: &[],
            output: &output,
        };
        let sandbox = Sandbox {
            folder: self.folder.to_owned(),
            manifest: manifest.clone(),
        };
        self.steps
            .run(&mut trial.command(&Headers::Sandboxed(sandbox.clone()))?)
            .context("no module can be built against the completed headers")?;
        for program in ["busybox", "qemu-system-x86_64"] {
            self.steps.run(sandbox.enter().run(program).arg("--help"))?;
        }
        for folder in [&source, &output] {
            fs::remove_dir_all(folder)?;
        }
        Ok(manifest)
    }
}
