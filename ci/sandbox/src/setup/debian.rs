// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An ordinary Debian system, installed into a folder without any part of barlink, to try packages
//! on.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};

use super::kernels::Kernel;
use crate::recipe::Recipe;
use crate::sandbox::{Enter, Manifest};
use crate::steps::Steps;

/// Packages of an ordinary Debian, and the packages that barlink-dkms needs, because their
/// installation takes minutes.
const PACKAGES: &str = "systemd-sysv,udev,kmod,e2fsprogs,initramfs-tools,dkms,bc,bindgen,bison,dwarves,flex,gcc,libc6-dev,\
                        libelf-dev,libssl-dev,make,python3,rust-src,rustc,xz-utils";

/// Makes the system in `folder`/root with the kernel. The kernel's headers and source are
/// downloaded but not installed, so that they can be installed later without the network.
///
/// Scripts of packages run, so this process must be root's.
pub(super) fn build(
    steps: &Steps,
    recipe: &Recipe,
    kernel: &Kernel,
    mirror: &str,
    settings: &str,
    folder: &Path,
) -> Result<Manifest> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "only root can install a Debian: run this as root"
    );
    let Recipe {
        suite,
        backports,
        components,
        ..
    } = recipe;
    let Kernel {
        release,
        package_version: version,
        ..
    } = kernel;
    let apt_settings = folder.join("apt-settings");
    fs::write(
        &apt_settings,
        format!("{settings}APT::Install-Recommends \"false\";\n"),
    )?;
    let later = format!(
        "linux-headers-{release}={version} linux-source-{}={version}",
        kernel.version.series()
    );
    let root = folder.join("root");
    steps.run(
        // All processes of mmdebstrap must end with this one, because they would otherwise write to
        // a folder that is being removed.
        Enter::host()
            .run("mmdebstrap")
            .args(["--mode=root", "--variant=apt", "--architectures=amd64"])
            // Keeps apt's package lists.
            .arg("--skip=cleanup/apt,cleanup/reproducible")
            .arg(format!("--include={PACKAGES}"))
            .arg(format!("--aptopt={}", apt_settings.display()))
            .arg(format!(
                "--customize-hook=chroot \"$1\" apt-get install --yes --target-release {backports} linux-image-{release}"
            ))
            .arg("--customize-hook=rm -f \"$1\"/var/cache/apt/archives/*.deb")
            .arg(format!(
                "--customize-hook=chroot \"$1\" apt-get install --yes --download-only {later}"
            ))
            .arg(suite)
            .arg(&root)
            .arg(format!("deb {mirror} {suite} {components}"))
            .arg(format!("deb {mirror} {backports} {components}")),
    )?;
    fs::remove_file(apt_settings)?;
    Ok(Manifest {
        release: release.clone(),
        package_version: version.clone(),
        kernel_image: format!("boot/vmlinuz-{release}").into(),
    })
}
