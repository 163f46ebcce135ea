// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Published programs that are needed besides the sandbox. They are built once from crates.io, and
//! stored in the cache.

use std::path::PathBuf;

use anyhow::Result;

use super::cache::Cache;
use super::lock;
use crate::builds::cargo;
use crate::steps::Steps;

/// Returns the path of the program of this crate in this version. Builds it if needed.
pub fn program(name: &str, version: &str) -> Result<PathBuf> {
    let cache = Cache::open()?;
    let root = cache.programs().join(format!("{name}-{version}"));
    let program = root.join("bin").join(name);
    // Cargo installs the program at the end of a build, as a whole.
    if program.exists() {
        return Ok(program);
    }
    let _lock = lock(&cache)?;
    let steps = Steps::start(&cache.log())?;
    steps.step(&format!("building {name} {version}"), || {
        let mut install = cargo("install");
        install.args(["--locked", "--version", version, name]);
        steps.run(install.arg("--root").arg(root))
    })?;
    Ok(program)
}
