// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The Debian archive that packages come from: the one in the host's apt configuration.

use std::process::Command;

use anyhow::{Context, Result, bail};

/// Prefixes of the settings of the host's apt that decide whether and how a mirror is reached.
/// Other settings are not used.
const NETWORK_SETTINGS: [&str; 4] = [
    "Acquire::http",
    "Acquire::https",
    "Acquire::Check-",
    "Acquire::Retries",
];

/// Lists the archives that may be Debian's, the likeliest first. The download of its signed index
/// shows whether an archive is Debian's, and has the needed suites.
pub(super) fn candidates() -> Result<Vec<String>> {
    // apt knows the origin of an archive from its downloaded index. With `--no-release-info` it
    // also lists archives that were never downloaded.
    let known = index_targets(&[])?;
    let unknown = index_targets(&["--no-release-info"])?;
    Ok(rank(&known, &unknown))
}

fn rank(known: &str, unknown: &str) -> Vec<String> {
    let mut debian = Vec::new();
    let mut foreign = Vec::new();
    for (uri, origin, label) in fields(known) {
        if (origin, label) == ("Debian", "Debian") {
            debian.push(uri);
        } else {
            foreign.push(uri);
        }
    }
    let mut guesses: Vec<&str> = fields(unknown).map(|(uri, ..)| uri).collect();
    guesses.retain(|uri| !foreign.contains(uri));
    // A mirror of Debian's main archive is usually in a folder of that name.
    guesses.sort_by_key(|uri| !uri.trim_end_matches('/').ends_with("/debian"));
    let mut all: Vec<String> = Vec::new();
    for uri in debian.into_iter().chain(guesses) {
        if !all.iter().any(|other| other == uri) {
            all.push(uri.to_owned());
        }
    }
    all
}

/// Returns address, origin and label of the entries that have the component `main`.
fn fields(listing: &str) -> impl Iterator<Item = (&str, &str, &str)> {
    listing.lines().filter_map(|line| {
        let mut fields = line.split('|');
        let entry = (fields.next()?, fields.next()?, fields.next()?);
        (fields.next() == Some("main")).then_some(entry)
    })
}

fn index_targets(flags: &[&str]) -> Result<String> {
    let format = ["--format", "$(REPO_URI)|$(ORIGIN)|$(LABEL)|$(COMPONENT)"];
    output(
        Command::new("apt-get")
            .arg("indextargets")
            .args(flags)
            .args(format)
            .arg("Created-By: Packages"),
    )
}

/// Reads the host's settings for proxies and the like, as lines of an apt configuration file.
pub(super) fn network_settings() -> Result<String> {
    let dump = output(Command::new("apt-config").args(["dump", "Acquire"]))?;
    Ok(dump
        .lines()
        .filter(|line| NETWORK_SETTINGS.iter().any(|name| line.starts_with(name)))
        .flat_map(|line| [line, "\n"])
        .collect())
}

/// Runs a program and returns its standard output. An error, with apt's error lines, if it fails.
pub(super) fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().display().to_string();
    let output = command
        .output()
        .with_context(|| format!("{program} cannot be started"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let errors: Vec<&str> = errors
            .lines()
            .filter(|line| line.starts_with("E:"))
            .collect();
        bail!(
            "{program} failed ({}): {}",
            output.status,
            errors.join("; ")
        );
    }
    Ok(String::from_utf8(output.stdout)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_debian_first_and_drops_foreign_archives() {
        let known = "http://tools.test/apt/|Tools|Tools|main\n\
                     http://mirror.test/debian/|Debian|Debian|main\n\
                     http://mirror.test/debian/|Debian|Debian|contrib\n\
                     http://mirror.test/debian-security/|Debian|Debian-Security|main\n";
        let unknown = "http://tools.test/apt/|$(ORIGIN)|$(LABEL)|main\n\
                       http://other.test/x/|$(ORIGIN)|$(LABEL)|main\n\
                       http://new.test/debian/|$(ORIGIN)|$(LABEL)|main\n\
                       http://new.test/extra/|$(ORIGIN)|$(LABEL)|stable\n\
                       http://mirror.test/debian/|$(ORIGIN)|$(LABEL)|main\n";
        assert_eq!(
            rank(known, unknown),
            [
                "http://mirror.test/debian/",
                "http://new.test/debian/",
                "http://other.test/x/"
            ]
        );
    }

    #[test]
    fn accepts_archives_of_unknown_origin() {
        let unknown = "http://mirror.test/debian/|$(ORIGIN)|$(LABEL)|main\n";
        assert_eq!(rank("", unknown), ["http://mirror.test/debian/"]);
    }
}
