// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The sandbox's system: Debian packages that are unpacked into a folder.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result};

use super::kernels::Kernel;
use crate::recipe::Recipe;
use crate::sandbox::Enter;
use crate::steps::Steps;

/// Makes the system in `folder`/root from the packages of the recipe and the kernel.
///
/// The packages are unpacked but not installed: none of their scripts runs, and no file changes its
/// owner. So root and an ordinary user do the same, and no user namespace has to map further users.
/// [`Recipe::links`] has the links that those scripts would make and that programs need.
pub(super) fn build(
    steps: &Steps,
    recipe: &Recipe,
    kernel: &Kernel,
    mirror: &str,
    settings: &str,
    folder: &Path,
) -> Result<()> {
    let preferences = folder.join("preferences");
    fs::write(&preferences, recipe.preferences())?;
    let apt_settings = folder.join("apt-settings");
    fs::write(
        &apt_settings,
        format!("{settings}APT::Install-Recommends \"false\";\n"),
    )?;

    let mut packages = recipe.packages.clone();
    let version = &kernel.package_version;
    packages.extend(
        kernel
            .packages
            .iter()
            .map(|package| format!("{package}={version}")),
    );
    let root = folder.join("root");
    let Recipe {
        suite,
        backports,
        components,
        ..
    } = recipe;
    steps.run(
        // All processes of mmdebstrap must end with this one, because they would otherwise write to
        // a folder that is being removed.
        Enter::host()
            .run("mmdebstrap")
            // Safe for root's system as well, because only package scripts endanger it in this mode
            // and none runs.
            .args([
                "--mode=chrootless",
                "--variant=extract",
                "--architectures=amd64",
            ])
            .arg(format!("--include={}", packages.join(",")))
            .arg(format!("--aptopt={}", apt_settings.display()))
            .env("BARLINK_PREFERENCES", &preferences)
            .arg("--setup-hook=mkdir -p \"$1\"/etc/apt/preferences.d")
            .arg("--setup-hook=cp \"$BARLINK_PREFERENCES\" \"$1\"/etc/apt/preferences.d/barlink")
            .arg(suite)
            .arg(&root)
            .arg(format!("deb {mirror} {suite} {components}"))
            .arg(format!("deb {mirror} {backports} {components}")),
    )?;
    for (link, target) in &recipe.links {
        let link = root.join(link);
        symlink(target, &link)
            .with_context(|| format!("the link {} cannot be made", link.display()))?;
    }
    fs::remove_file(preferences)?;
    fs::remove_file(apt_settings)?;
    Ok(())
}
