// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The recipe of a sandbox: the data of `images/`, and the hash that tells the sandboxes of
//! different recipes apart.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result};
use serde::Deserialize;
use sha2::{Digest, Sha256};

const DATA: &str = include_str!("../../../images/sandbox.toml");
/// Apart from [`DATA`], because a sandbox does not change with it.
const FLAVOURS: &str = include_str!("../../../images/flavours.toml");

/// A kind of system that is made from the data.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Kind {
    /// The sandbox, in which builds and VMs run.
    Sandbox,
    /// An installed Debian system without any part of barlink.
    Debian,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 2] = [Kind::Sandbox, Kind::Debian];

    /// Returns the texts of the code and scripts that make a system of this kind. They go into the
    /// hash, because other code may make another system.
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

/// A module that must build against the finished headers: names and contents of its files.
pub const TRIAL: [(&str, &str); 2] = [
    ("Kbuild", include_str!("../../../images/trial/Kbuild")),
    ("trial.rs", include_str!("../../../images/trial/trial.rs")),
];

/// The data of `images/sandbox.toml`, which explains each field.
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

/// Number of hexadecimal digits in a recipe's hash.
pub const HASH_DIGITS: usize = 12;

impl Recipe {
    /// Reads the recipe that is compiled into this program.
    pub fn load() -> Result<Self> {
        toml::from_str(DATA).context("images/sandbox.toml is malformed")
    }

    /// Returns the recipes of sandboxes with the kernels of each flavour in `images/flavours.toml`.
    pub fn of_flavours() -> Result<Vec<Self>> {
        #[derive(Deserialize)]
        struct Flavours {
            flavours: Vec<String>,
        }
        let data: Flavours =
            toml::from_str(FLAVOURS).context("images/flavours.toml is malformed")?;
        let recipes = data.flavours.into_iter().map(|flavour| {
            Ok(Self {
                flavour,
                ..Self::load()?
            })
        });
        recipes.collect()
    }

    /// Returns [`HASH_DIGITS`] hexadecimal digits that depend on everything that goes into a
    /// sandbox, except for its kernel.
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

    /// Returns the apt preferences that take only [`Recipe::backported`] from the backports.
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

    /// Returns the rank of a version's series in the order of preference, 0 first. `None` if the
    /// series is not supported.
    pub fn rank(&self, version: &KernelVersion) -> Option<usize> {
        self.series.iter().position(|series| version.is_of(series))
    }
}

/// A kernel's version in the form of Debian's package names, such as `7.2.12`. Versions are ordered
/// as numbers, not as text.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct KernelVersion(Vec<u32>);

impl KernelVersion {
    /// Parses numbers with dots between them. Returns `None` for anything else, such as a release
    /// candidate.
    pub fn parse(text: &str) -> Option<Self> {
        let numbers: Result<_, _> = text.split('.').map(str::parse).collect();
        numbers.ok().map(Self)
    }

    /// Returns whether the version starts with the numbers of `prefix`: 7.2.12 is of 7.2, and 7.20
    /// is not.
    pub fn is_of(&self, prefix: &str) -> bool {
        Self::parse(prefix).is_some_and(|prefix| self.0.starts_with(&prefix.0))
    }

    /// Returns the first two numbers, such as `7.2`.
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
    fn data_files_are_well_formed() {
        let recipe = Recipe::load().unwrap();
        for series in &recipe.series {
            let version = KernelVersion::parse(series).unwrap();
            assert_eq!(version.series(), *series);
        }
        let flavours = Recipe::of_flavours().unwrap();
        assert!(flavours.iter().any(|other| other.flavour == recipe.flavour));
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
