// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The kernels that a mirror has, and the choice of the sandbox's kernel.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Error, Result, bail};

use super::host::KEYRING;
use super::mirror::output;
use crate::recipe::{KernelVersion, Recipe};
use crate::sandbox::Sandbox;

/// A kernel with all its packages in one version.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Kernel {
    /// Upstream version.
    pub(super) version: KernelVersion,
    /// Release, as `uname -r` prints it.
    pub(super) release: String,
    /// Version of the Debian packages.
    pub(super) package_version: String,
    /// Names of the packages, without versions.
    pub(super) packages: Vec<String>,
}

impl Kernel {
    /// Returns whether a system has this kernel in this revision.
    pub(super) fn is_of(&self, system: &Sandbox) -> bool {
        system.manifest.kernel() == (&self.release, &self.package_version)
    }
}

/// Downloads a mirror's index of backports into `work`, an empty folder, and finds the kernels in
/// it.
///
/// apt runs with a configuration of its own, so that it needs no rights and does not change the
/// host's package lists.
pub(super) fn available(
    mirror: &str,
    recipe: &Recipe,
    network_settings: &str,
    work: &Path,
) -> Result<Vec<Kernel>> {
    let Recipe {
        backports,
        components,
        ..
    } = recipe;
    let file = apt_configuration(mirror, backports, components, network_settings, work)?;
    let apt = |program: &str, verb: &str| {
        output(Command::new(program).arg(verb).env("APT_CONFIG", &file))
    };
    apt("apt-get", "update").with_context(|| format!("{mirror} gives no {backports}"))?;
    Ok(find(&apt("apt-cache", "dumpavail")?, &recipe.flavour))
}

/// Writes a configuration of apt's own into `work`, for a suite of a mirror, and returns its path.
pub(super) fn apt_configuration(
    mirror: &str,
    suite: &str,
    components: &str,
    network_settings: &str,
    work: &Path,
) -> Result<PathBuf> {
    fs::create_dir_all(work.join("state/lists/partial"))?;
    fs::create_dir_all(work.join("cache"))?;
    fs::write(
        work.join("sources.list"),
        format!("deb [signed-by={KEYRING}] {mirror} {suite} {components}\n"),
    )?;
    let folder = work.display();
    let configuration = format!(
        "Dir::Etc::Main \"/dev/null\";\n\
         Dir::Etc::Parts \"/dev/null\";\n\
         Dir::Etc::SourceParts \"/dev/null\";\n\
         Dir::Etc::SourceList \"{folder}/sources.list\";\n\
         Dir::State \"{folder}/state\";\n\
         Dir::State::status \"/dev/null\";\n\
         Dir::Cache \"{folder}/cache\";\n\
         APT::Architecture \"amd64\";\n\
         APT::Sandbox::User \"root\";\n\
         APT::Update::Error-Mode \"any\";\n\
         Acquire::Languages \"none\";\n\
         {network_settings}"
    );
    let file = work.join("apt.conf");
    fs::write(&file, configuration)?;
    Ok(file)
}

/// Finds the complete kernels in an index, the newest first.
fn find(index: &str, flavour: &str) -> Vec<Kernel> {
    let mut versions: HashMap<&str, HashSet<&str>> = HashMap::new();
    for stanza in index.split("\n\n") {
        let field = |name: &str| {
            stanza
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .map(str::trim)
        };
        if let (Some(package), Some(version)) = (field("Package:"), field("Version:")) {
            versions.entry(package).or_default().insert(version);
        }
    }
    let mut kernels = Vec::new();
    // Unsigned packages come second. Both kinds hold the same kernel, and the signed one stays on
    // the mirror.
    for prefix in ["linux-binary-", "linux-binary-unsigned-"] {
        for (package, package_versions) in &versions {
            let release = package.strip_prefix(prefix);
            let version =
                release.and_then(|release| KernelVersion::parse(release.strip_suffix(flavour)?));
            let (Some(release), Some(version)) = (release, version) else {
                continue;
            };
            let packages = vec![
                (*package).to_owned(),
                format!("linux-modules-{release}"),
                format!("linux-headers-{release}"),
                format!("linux-source-{}", version.series()),
            ];
            let complete = |version: &&&str| {
                let has = |package: &String| {
                    versions
                        .get(package.as_str())
                        .is_some_and(|all| all.contains(**version))
                };
                packages.iter().all(has)
            };
            let newest = package_versions
                .iter()
                .filter(complete)
                .max_by_key(|text| revision(text));
            if let Some(package_version) = newest
                && !kernels
                    .iter()
                    .any(|kernel: &Kernel| kernel.version == version)
            {
                kernels.push(Kernel {
                    version,
                    release: release.to_owned(),
                    package_version: (*package_version).to_owned(),
                    packages,
                });
            }
        }
    }
    kernels.sort_by(|a, b| b.version.cmp(&a.version));
    kernels
}

/// Returns the numbers in a package version. They suffice to order the revisions of one upstream
/// version.
pub(super) fn revision(version: &str) -> Vec<u64> {
    let digits = version.split(|c: char| !c.is_ascii_digit());
    digits.filter_map(|number| number.parse().ok()).collect()
}

/// The mirror has no kernel of the wanted series. It may have one on another day.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NoKernel(String);

/// Picks the newest kernel of the preferred series, among those whose version starts with `wanted`.
pub(super) fn choose(kernels: &[Kernel], recipe: &Recipe, wanted: Option<&str>) -> Result<Kernel> {
    let supported = kernels
        .iter()
        .filter_map(|kernel| Some((recipe.rank(&kernel.version)?, kernel)));
    supported
        .filter(|(_, kernel)| wanted.is_none_or(|wanted| kernel.version.is_of(wanted)))
        // Kernels are sorted from the newest, and `min_by_key` takes the first of equal ones.
        .min_by_key(|(rank, _)| *rank)
        .map_or_else(
            || Err(nothing_suitable(kernels, recipe, wanted)),
            |(_, kernel)| Ok(kernel.clone()),
        )
}

fn nothing_suitable(kernels: &[Kernel], recipe: &Recipe, wanted: Option<&str>) -> Error {
    let series = recipe.series.join(" or ");
    let is_wanted = |kernel: &Kernel| wanted.is_some_and(|wanted| kernel.version.is_of(wanted));
    let is_there = kernels.iter().any(is_wanted);
    let wanted = match wanted {
        Some(wanted) => format!("{wanted} (supported is {series})"),
        None => series,
    };
    let found: Vec<String> = kernels
        .iter()
        .map(|kernel| kernel.version.to_string())
        .collect();
    let found = if found.is_empty() {
        "none".to_owned()
    } else {
        found.join(", ")
    };
    let why = format!(
        "the mirror has no suitable kernel: wanted {wanted}, found {found}; choose one with --kernel, or another mirror with --mirror"
    );
    if is_there {
        // The mirror has the wanted kernel, but barlink does not support it.
        return Error::msg(why);
    }
    NoKernel(why).into()
}

/// Finds the first mirror that has the backports. Returns the mirror and its kernels.
pub(super) fn first_available(
    mirrors: &[String],
    recipe: &Recipe,
    network_settings: &str,
    work: &Path,
) -> Result<(String, Vec<Kernel>)> {
    let mut failures = Vec::new();
    for (number, mirror) in mirrors.iter().enumerate() {
        match available(
            mirror,
            recipe,
            network_settings,
            &work.join(number.to_string()),
        ) {
            Ok(kernels) => return Ok((mirror.clone(), kernels)),
            Err(error) => failures.push(format!("{error:#}")),
        }
    }
    if failures.is_empty() {
        bail!("the host's apt configuration names no Debian archive; name one with --mirror URL");
    }
    bail!(
        "{}; name another archive with --mirror URL",
        failures.join("; ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns an index as a mirror has it: 7.3.4 only unsigned, 7.2.12 in both forms, 7.2.9
    /// without source, 7.1.3 unsupported.
    fn index() -> String {
        let mut index = String::new();
        let mut add = |package: &str, version: &str| {
            index += &format!(
                "Package: {package}\nArchitecture: amd64\nVersion: {version}\nDescription: x\n\n"
            );
        };
        for (release, version) in [
            ("7.3.4", "7.3.4-1~bpo1"),
            ("7.2.12", "7.2.12-1~bpo1"),
            ("7.2.9", "7.2.9-1~bpo1"),
            ("7.1.3", "7.1.3-2"),
        ] {
            let binary = if release == "7.3.4" {
                "binary-unsigned"
            } else {
                "binary"
            };
            for part in [binary, "modules", "headers"] {
                add(
                    &format!("linux-{part}-{release}+deb13-cloud-amd64"),
                    version,
                );
            }
        }
        add(
            "linux-binary-unsigned-7.2.12+deb13-cloud-amd64",
            "7.2.12-1~bpo1",
        );
        add("linux-binary-7.2.12+deb13-rt-amd64", "7.2.12-1~bpo1");
        add("linux-source-7.3", "7.3.4-1~bpo1");
        add("linux-source-7.2", "7.2.12-1~bpo1");
        add("linux-source-7.1", "7.1.3-2");
        index
    }

    fn kernels() -> Vec<Kernel> {
        find(&index(), "+deb13-cloud-amd64")
    }

    #[test]
    fn finds_complete_kernels_and_prefers_signed_ones() {
        let found = kernels();
        let versions: Vec<String> = found
            .iter()
            .map(|kernel| kernel.version.to_string())
            .collect();
        assert_eq!(versions, ["7.3.4", "7.2.12", "7.1.3"]);
        assert_eq!(
            found[0].packages[0],
            "linux-binary-unsigned-7.3.4+deb13-cloud-amd64"
        );
        assert_eq!(
            found[1].packages[0],
            "linux-binary-7.2.12+deb13-cloud-amd64"
        );
        assert_eq!(found[1].package_version, "7.2.12-1~bpo1");
    }

    #[test]
    fn chooses_preferred_or_requested_kernel_series() {
        let recipe = Recipe::load().unwrap();
        let chosen =
            |wanted| choose(&kernels(), &recipe, wanted).map(|kernel| kernel.version.to_string());
        assert_eq!(chosen(None).unwrap(), "7.3.4");
        assert_eq!(chosen(Some("7.2")).unwrap(), "7.2.12");
        assert_eq!(chosen(Some("7.2.12")).unwrap(), "7.2.12");
    }

    #[test]
    fn missing_kernel_error_lists_found_kernels() {
        let recipe = Recipe::load().unwrap();
        let error = choose(&kernels(), &recipe, Some("9.9"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("wanted 9.9 (supported is 7.3 or 7.2)"),
            "{error}"
        );
        assert!(error.contains("found 7.3.4, 7.2.12, 7.1.3"), "{error}");
        let is_missing = |wanted| {
            let error = choose(&kernels(), &recipe, Some(wanted)).unwrap_err();
            error.is::<NoKernel>()
        };
        assert!(is_missing("9.9") && is_missing("7.2.9"));
        // The mirror has this kernel, but barlink does not support it.
        assert!(!is_missing("7.1"));
    }
}
