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
    /// The command that builds the module against `headers`, with every warning an error.
    pub fn command(&self, headers: &Headers) -> Result<Command> {
        let mut make;
        let folder = match headers {
            Headers::Sandboxed(sandbox) => {
                let mut enter = sandbox.enter().bind_read_only(self.source);
                for folder in self.included {
                    enter = enter.bind_read_only(folder);
                }
                make = enter.bind(self.output, self.output).run("make");
                sandbox.headers()
            }
            Headers::Own(folder) => {
                make = Command::new("make");
                // Cargo's choice of toolchain is not the kernel's.
                make.env_remove("RUSTUP_TOOLCHAIN");
                let configuration = folder.join("include/config/auto.conf");
                let configuration = fs::read_to_string(&configuration)
                    .with_context(|| format!("{} cannot be read", configuration.display()))?;
                if configuration
                    .lines()
                    .any(|line| line == "CONFIG_CC_IS_CLANG=y")
                {
                    make.arg("LLVM=1");
                }
                folder.clone()
            }
        };
        make.args([
            "--no-print-directory",
            "KRUSTFLAGS=-Dwarnings",
            "KCFLAGS=-Werror",
        ]);
        make.arg("--directory").arg(folder);
        for (variable, folder) in [("M", self.source), ("MO", self.output)] {
            make.arg(format!("{variable}={}", folder.display()));
        }
        make.arg("modules");
        Ok(make)
    }
}
