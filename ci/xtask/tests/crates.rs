// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The crates that a program builds with the library.

use std::collections::BTreeSet;

use anyhow::Result;
use barlink_sandbox::builds::cargo;

/// Most crates in the tree of a program that uses the library, the library included.
const MOST: usize = 35;
/// Crates that the library must not need.
const FORBIDDEN: [&str; 5] = ["barlink-broker", "clap", "nix", "ratatui", "vhost"];

#[test]
fn library_needs_few_crates() -> Result<()> {
    let mut command = cargo("tree");
    command.args(["--package=barlink", "--edges=normal", "--prefix=none"]);
    command.args(["--locked", "--format={p}"]);
    let output = String::from_utf8(command.output()?.stdout)?;
    let crates: BTreeSet<_> = output
        .lines()
        .map(|line| line.trim_end_matches(" (*)"))
        .collect();
    let names: Vec<_> = crates
        .iter()
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert!(
        names.contains(&"barlink") && names.len() <= MOST,
        "{crates:#?}"
    );
    assert!(
        FORBIDDEN.iter().all(|name| !names.contains(name)),
        "{names:?}"
    );
    Ok(())
}
