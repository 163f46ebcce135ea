// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Building a kernel module outside the kernel's tree, by Kbuild, without touching the module's source folder.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::tools::Headers;

/// A module's source, and where it is built.
#[derive(Debug)]
pub struct ModuleBuild<'a> {
    /// The folder with the `Kbuild` file.
    pub source: &'a Path,
    /// Folders that the source includes files of.
    pub included: &'a [&'a Path],
    /// The folder that takes all that is made; it exists.
    pub output: &'a Path,
}

impl ModuleBuild<'_> {
    /// The command that builds the module against `headers`; in the sandbox every warning of a compiler is an error.
    pub fn command(&self, headers: &Headers) -> Result<Command> {
        let (mut make, folder) = match headers {
            Headers::Sandboxed(sandbox) => {
                let mut enter = sandbox.enter().bind_read_only(self.source);
                for folder in self.included {
                    enter = enter.bind_read_only(folder);
                }
                let mut make = enter.bind(self.output, self.output).run("make");
                make.args(["KRUSTFLAGS=-Dwarnings", "KCFLAGS=-Werror"]);
                (make, sandbox.headers())
            }
            Headers::Own(folder) => {
                let mut make = Command::new("make");
                // Cargo's choice of toolchain is not the kernel's.
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

/// Whether the kernel in this build tree was built by clang, which modules must be built by then, too.
fn built_by_clang(headers: &Path) -> Result<bool> {
    let path = headers.join("include/config/auto.conf");
    let configuration =
        fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    Ok(configuration
        .lines()
        .any(|line| line == "CONFIG_CC_IS_CLANG=y"))
}
