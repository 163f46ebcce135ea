// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The build of a kernel module outside the kernel's tree, by Kbuild. The module's source folder
//! stays unchanged.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::tools::Headers;

/// The folders of a module's build.
#[derive(Debug)]
pub struct ModuleBuild<'a> {
    /// Folder with the `Kbuild` file.
    pub source: &'a Path,
    /// Folders with files that the source includes.
    pub included: &'a [&'a Path],
    /// Folder for the output. It must exist.
    pub output: &'a Path,
}

impl ModuleBuild<'_> {
    /// Makes the command that builds the module against `headers`. In the sandbox every warning of
    /// a compiler is an error.
    pub fn command(&self, headers: &Headers) -> Result<Command> {
        let (mut make, folder) = match headers {
            Headers::Sandboxed(sandbox) => {
                let mut enter = sandbox.enter().bind_read_only(self.source);
                for folder in self.included {
                    enter = enter.bind_read_only(folder);
                }
                let mut make = enter.bind(self.output, self.output).run("make");
                // The module must not name folders of this machine.
                let parent = self.source.parent().unwrap_or(self.source);
                make.arg(format!(
                    "KRUSTFLAGS=-Dwarnings --remap-path-prefix={}=barlink",
                    parent.display()
                ));
                make.arg("KCFLAGS=-Werror");
                (make, sandbox.headers())
            }
            Headers::Own(folder) => {
                let mut make = Command::new("make");
                // The kernel needs its own Rust toolchain, not cargo's.
                make.env_remove("RUSTUP_TOOLCHAIN");
                if built_by_clang(folder)? {
                    make.arg("LLVM=1");
                }
                (make, folder.clone())
            }
        };
        make.arg("--no-print-directory")
            .arg("--directory")
            .arg(folder);
        for (variable, folder) in [("M", self.source), ("MO", self.output)] {
            make.arg(format!("{variable}={}", folder.display()));
        }
        make.arg("modules");
        Ok(make)
    }
}

/// Returns whether the kernel of this build tree was built by clang. Its modules need clang then.
fn built_by_clang(headers: &Path) -> Result<bool> {
    let path = headers.join("include/config/auto.conf");
    let configuration =
        fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    Ok(configuration
        .lines()
        .any(|line| line == "CONFIG_CC_IS_CLANG=y"))
}
