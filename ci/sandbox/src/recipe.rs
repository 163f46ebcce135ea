// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the sandbox is made of: the data of `images/`, and the hash that tells one recipe's sandboxes from another's.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result};
use serde::Deserialize;
use sha2::{Digest, Sha256};

const DATA: &str = include_str!("../../../images/sandbox.toml");

/// What is made of the data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// What everything runs in.
    Sandbox,
    /// A Debian that has been installed, and knows nothing of barlink.
    Debian,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 2] = [Kind::Sandbox, Kind::Debian];

    /// What makes it of the data: another text may make another one.
    fn steps(self) -> &'static [&'static str] {
        match self {
            Kind::Sandbox => &[
                include_str!("setup/rootfs.rs"),
                include_str!("setup/metadata.rs"),
                include_str!("../../../images/packaging/barlink-kernel-rust-headers"),
            ],
            Kind::Debian => &[include_str!("setup/debian.rs")],
        }
    }
}

/// The module that the finished headers must build: file name and content.
pub const TRIAL: [(&str, &str); 2] = [
    ("Kbuild", include_str!("../../../images/trial/Kbuild")),
    ("trial.rs", include_str!("../../../images/trial/trial.rs")),
];

/// `images/sandbox.toml`, which explains each field.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(
    missing_docs,
    reason = "documented where they are set, in images/sandbox.toml"
)]
pub struct Recipe {
    pub suite: String,
    pub backports: String,
    pub components: String,
    pub series: Vec<String>,
    pub flavour: String,
    pub backported: Vec<String>,
    pub packages: Vec<String>,
    pub links: BTreeMap<String, String>,
}

/// Digits of a recipe's hash.
pub const HASH_DIGITS: usize = 12;

impl Recipe {
    /// Reads the recipe that this program was built with.
    pub fn load() -> Result<Self> {
        toml::from_str(DATA).context("images/sandbox.toml is malformed")
    }

    /// [`HASH_DIGITS`] hexadecimal digits that differ when anything that goes into it differs, but for its kernel.
    pub fn hash(&self, kind: Kind) -> String {
        let mut hash = Sha256::new();
        let trial = TRIAL.map(|(_, content)| content);
        let steps = kind.steps().iter().copied();
        for text in [DATA].into_iter().chain(steps).chain(trial) {
            hash.update(text.len().to_le_bytes());
            hash.update(text);
        }
        let digest = hash.finalize();
        digest
            .iter()
            .take(HASH_DIGITS / 2)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// The apt preferences that keep the backports to what [`Recipe::backported`] names.
    pub fn preferences(&self) -> String {
        let Self {
            backports,
            backported,
            ..
        } = self;
        format!(
            "Package: {}\nPin: release n={backports}\nPin-Priority: 900\n",
            backported.join(" ")
        )
    }

    /// Where `series` stands in the order of preference, 0 first; nothing if it is not supported.
    pub fn rank(&self, version: &KernelVersion) -> Option<usize> {
        self.series.iter().position(|series| version.is_of(series))
    }
}

/// A kernel's version as Debian's package names have it, say `7.2.12`; ordered as numbers, not as text.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct KernelVersion(Vec<u32>);

impl KernelVersion {
    /// Parses dotted numbers; anything else (a release candidate, say) is no version of interest.
    pub fn parse(text: &str) -> Option<Self> {
        let numbers: Result<_, _> = text.split('.').map(str::parse).collect();
        numbers.ok().map(Self)
    }

    /// Whether the version is `prefix` or begins with it, number by number: 7.2.12 is of 7.2, 7.20 is not.
    pub fn is_of(&self, prefix: &str) -> bool {
        Self::parse(prefix).is_some_and(|prefix| self.0.starts_with(&prefix.0))
    }

    /// The first two numbers, say `7.2`.
    pub fn series(&self) -> String {
        Self(self.0.iter().copied().take(2).collect()).to_string()
    }
}

impl fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<String> = self.0.iter().map(u32::to_string).collect();
        f.write_str(&numbers.join("."))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_files_are_well_formed() {
        let recipe = Recipe::load().unwrap();
        for series in &recipe.series {
            let version = KernelVersion::parse(series).unwrap();
            assert_eq!(version.series(), *series);
        }
        let [sandbox, debian] = Kind::ALL.map(|kind| recipe.hash(kind));
        assert_eq!(sandbox.len(), HASH_DIGITS);
        assert_ne!(sandbox, debian);
    }

    #[test]
    fn versions_compare_as_numbers() {
        let version = |text| KernelVersion::parse(text).unwrap();
        assert!(version("7.2.12") > version("7.2.9"));
        assert!(version("7.2.12").is_of("7.2"));
        assert!(version("7.2.12").is_of("7"));
        assert!(!version("7.20.1").is_of("7.2"));
        assert!(!version("7.2").is_of("7.2.12"));
        assert_eq!(KernelVersion::parse("7.3~rc1"), None);
        assert_eq!(version("7.2.12").to_string(), "7.2.12");
    }
}
