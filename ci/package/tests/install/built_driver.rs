// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The package of the built driver: it is installed, the system is booted, an ordinary user streams
//! data, and dkms takes its place and gives it back.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use barlink_package::{self as package, Modules};
use barlink_sandbox::builds::{Artifacts, target_folder};
use barlink_sandbox::debian::{Debian, SHOWN};
use barlink_vm::broker::Broker;

use crate::support::*;

/// Checks the cheapest way of `docs/install.md`: its time, its size, that udev loads the driver,
/// and that a kernel without a driver gets the reason.
#[test]
fn built_driver_loads_on_clean_debian() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run, since only root can install a Debian into a folder");
        return Ok(());
    }
    let artifacts = Artifacts::shared()?;
    let folder = tempfile::tempdir_in(target_folder()?)?;
    let debian = fresh(artifacts, folder.path())?;
    let release = debian.release();
    // The kernel of the other tests can be another one.
    let modules = Modules {
        kernels: vec![debian.tools(&artifacts.args.tools)?],
        signer: None,
    };
    let packages = package::build(folder.path(), Some(&modules))?;
    let other = "6.12.1+deb13-amd64";
    let kernels = format!("mkdir /lib/modules/{other}; touch /lib/modules/{other}/modules.dep");
    printed(debian.run(&kernels)?)?;

    let count = "dpkg-query --show | wc -l";
    let before = printed(debian.run(count)?)?;
    let here = format!("cd {SHOWN}\nsudo() {{ \"$@\"; }}\n");
    let install = format!(
        "{here}{}",
        commands("# install the built driver in the guest\n")?
    );
    let start = Instant::now();
    let output = printed(debian.run(&install)?)?;
    let elapsed = start.elapsed();
    ensure!(elapsed < Duration::from_secs(60), "it took {elapsed:?}");
    let numbers = [before, printed(debian.run(count)?)?].map(|text| text.trim().parse::<u32>());
    let [before, after] = numbers;
    ensure!(after? == before? + 2, "further packages came: {output}");
    let mut bytes = 0;
    for name in ["barlink-guest", "barlink-modules"] {
        bytes += fs::metadata(&packages[name])?.len();
    }
    let disk = "dpkg-query --show --showformat='${Installed-Size} KiB ${Package}, ' barlink-guest barlink-modules";
    let disk = printed(debian.run(disk)?)?;
    eprintln!("installed in {elapsed:.1?}: {bytes} bytes of packages; on disk {disk}");
    ensure!(bytes < 10_000_000, "{bytes} bytes");
    for line in [
        format!("kernel {release} has its driver"),
        format!(
            "kernel {other} has no driver: none was built for it: boot one of these, or install \
             barlink-dkms instead: {release}"
        ),
    ] {
        ensure!(output.contains(&line), "no `{line}` in {output}");
    }

    let image = folder.path().join("disk.img");
    disk_image(&debian, &image)?;
    let broker = Broker::start(artifacts, &[])?;
    let vm = boot(artifacts, &debian, &image, &broker, &[])?;
    let run = |script: &str| -> Result<String> { vm.run(["sh", "-ec", script])?.success() };
    eventually(|| run("test \"$(stat -c '%G %a' /dev/barlink0)\" = 'barlink 660'"))?;
    ensure!(run("modinfo -n barlink")?.contains("/updates/barlink.ko"));
    streams(&vm, &broker)?;
    drop(vm);

    // The other package of the driver replaces this one.
    let replace = format!("cd {SHOWN}; apt-get install --yes ./barlink-dkms_*.deb");
    let output = printed(debian.run(&replace)?)?;
    ensure!(
        output.contains("removed the driver from kernel"),
        "{output}"
    );
    let left = format!(
        "ls -d /lib/modules/{release}/updates/barlink* /usr/lib/barlink /usr/share/kernel/*/barlink* 2>/dev/null || true"
    );
    let left = printed(debian.run(&left)?)?;
    ensure!(left.is_empty(), "left behind: {left}");
    modules_replace_dkms(&debian)?;
    let removed = printed(debian.run(&format!("{here}{}", commands("# uninstall\n")?))?)?;
    ensure!(
        removed.contains("removed the driver from kernel"),
        "{removed}"
    );
    let left = format!(
        "ls -d /lib/modules/{release}/updates /usr/lib/barlink /usr/share/kernel/*/barlink* /usr/src/barlink-* \
         /usr/src/linux-headers-*/rust /var/lib/dkms/barlink /usr/lib/udev/rules.d/*barlink* \
         /usr/lib/sysusers.d/barlink* 2>/dev/null || true
         dpkg-query --show --showformat='${{db:Status-Status}} ${{Package}}\n' 'barlink*' 2>/dev/null |
            grep -v not-installed || true"
    );
    let left = printed(debian.run(&left)?)?;
    ensure!(left.is_empty(), "left behind: {left}");
    Ok(())
}

/// Checks the way back from barlink-dkms. The purge of that package leaves the built driver alone.
fn modules_replace_dkms(debian: &Debian) -> Result<()> {
    let release = debian.release();
    let replace = format!("cd {SHOWN}; apt-get install --yes ./barlink-modules_*.deb");
    let output = printed(debian.run(&replace)?)?;
    let text = format!("kernel {release} has its driver");
    ensure!(output.contains(&text), "no `{text}` in {output}");
    let look = format!(
        "dpkg --purge barlink-dkms
         ls -d /usr/src/barlink-* /var/lib/dkms/barlink /lib/modules/{release}/updates/dkms 2>/dev/null || true
         modinfo --set-version {release} --field filename barlink"
    );
    let seen = printed(debian.run(&look)?)?;
    ensure!(seen.contains("/updates/barlink.ko"), "{seen}");
    ensure!(!seen.contains("dkms/barlink"), "{seen}");
    ensure!(!seen.contains("/usr/src/barlink-"), "{seen}");
    Ok(())
}
