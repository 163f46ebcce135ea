// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Manual pages of the programs, generated from their command lines.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::CommandFactory;

// Both files belong to programs, not to a library, so they are compiled here once more.
#[path = "../../../guest-app/src/args.rs"]
mod guest;
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "only the descriptions are of use here")
)]
#[path = "../../../backend/src/args.rs"]
mod host;

/// Writes the page of a program and one page per subcommand into a folder. Returns the paths of all
/// files in the folder.
pub(super) fn write(program: &str, folder: &Path) -> Result<Vec<PathBuf>> {
    let command = match program {
        "barlink" => host::Cli::command(),
        "barlink-guest" => guest::Cli::command(),
        _ => bail!("there is no command line of {program} to describe"),
    };
    fs::create_dir_all(folder)?;
    // The subcommand `help` needs no page.
    clap_mangen::generate_to(command.disable_help_subcommand(true), folder)
        .with_context(|| format!("the manual of {program} cannot be written"))?;
    let pages = fs::read_dir(folder)?.map(|entry| Ok(entry?.path()));
    pages.collect()
}
