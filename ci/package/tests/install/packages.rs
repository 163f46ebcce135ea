// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The packages of the host and of dkms: they are installed, the system is booted, an ordinary user
//! streams data, and the packages are removed.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use barlink_package as package;
use barlink_sandbox::builds::{Artifacts, target_folder};
use barlink_sandbox::debian::{Debian, SHOWN};
use barlink_vm::Vm;
use barlink_vm::broker::Broker;
use serde_json::Value;

use crate::support::*;

/// Start of the foreign device's memory.
const FOREIGN: &[u8] = b"somebody else's memory";

/// A Python program that maps a device's memory by sysfs, as a driver in user space does. It prints
/// the start of the memory, and writes to it.
const MAP: &str = "import mmap, sys\n\
                   file = open(sys.argv[1] + '/resource2', 'r+b')\n\
                   memory = mmap.mmap(file.fileno(), 1 << 20)\n\
                   print(memory[:22].decode())\n\
                   memory[4096:4101] = b'reply'\n";

#[test]
fn packages_install_and_stream_on_clean_debian() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run, since only root can install a Debian into a folder");
        return Ok(());
    }
    let artifacts = Artifacts::shared()?;
    let folder = tempfile::tempdir_in(target_folder()?)?;
    package::build(folder.path(), None)?;
    let debian = fresh(artifacts, folder.path())?;
    let release = debian.release();

    // Names the kernel explicitly, because it is not the running one.
    let here = format!("cd {SHOWN}\nsudo() {{ \"$@\"; }}\n");
    let install = format!("{here}{}", commands("# install in the guest\n")?);
    let install = install.replace(
        "barlink-kernel-rust-headers",
        &format!("barlink-kernel-rust-headers {release}"),
    );
    let output = printed(debian.run(&install)?)?;
    ensure!(output.contains("the headers of"), "{output}");
    ensure!(
        output.contains(&format!("the driver is built for {release}")),
        "{output}"
    );
    header_tool_refuses_unusable_kernels(&debian)?;
    printed(debian.run(&format!("{here}{}", commands("# install on the host\n")?))?)?;
    manuals_are_there(&debian)?;

    let image = folder.path().join("disk.img");
    disk_image(&debian, &image)?;
    boots_and_streams(artifacts, &debian, &image)?;

    upgrades_keep_the_driver(&debian)?;
    header_tool_marks_unfinished_headers(&debian)?;
    let removed = printed(debian.run(&format!("{here}{}", commands("# uninstall\n")?))?)?;
    ensure!(removed.contains("removed the metadata in"), "{removed}");
    let left = printed(debian.run(&format!(
        "ls -d /usr/src/barlink-* /usr/src/linux-headers-*/rust /lib/modules/{release}/updates/dkms/barlink* \
         /var/tmp/barlink-* 2>/dev/null || true"
    ))?)?;
    ensure!(left.is_empty(), "left behind: {left}");
    Ok(())
}

/// Checks an upgrade, here to the same version. It builds the driver again for each kernel whose
/// headers are complete, but not if another revision of the script has completed them.
fn upgrades_keep_the_driver(debian: &Debian) -> Result<()> {
    let release = debian.release();
    let script = format!(
        "cd {SHOWN}
         again() {{ apt-get install --yes --reinstall ./barlink-dkms_*.deb; }}
         again
         dkms status -m barlink -k {release} | grep installed
         echo other >/usr/src/linux-headers-{release}/rust/made-by-barlink
         again
         ! dkms status -m barlink -k {release} | grep installed"
    );
    printed(debian.run(&script)?).map(drop)
}

/// Leaves the remains of two failed runs for another kernel. The first run fails while it installs
/// its files, because a file cannot be copied. The second run was killed. The removal of the
/// packages calls the script with `--remove`, which removes all remains.
fn header_tool_marks_unfinished_headers(debian: &Debian) -> Result<()> {
    let release = debian.release();
    let series: Vec<_> = release.split('.').take(2).collect();
    let other = format!("{}.99-other", series.join("."));
    let script = format!(
        "headers=/usr/src/linux-headers-{other}
         mkdir -p $headers/scripts /var/tmp/barlink-headers.killed/source
         cp /usr/src/linux-headers-{release}/.config /usr/src/linux-headers-{release}/Module.symvers $headers/
         mv /usr/bin/make /usr/bin/make.kept
         cat >/usr/bin/make <<'END'
#!/bin/sh
for word; do case $word in O=*) output=${{word#O=}} ;; esac; done
mkdir -p $output/rust $output/scripts
touch $output/rust/core.rmeta $output/scripts/target.json
ln -sf nothing $output/rust/lost.so
cp /usr/src/linux-headers-{release}/Module.symvers $output/rust/exports_core_generated.h
END
         chmod +x /usr/bin/make
         barlink-kernel-rust-headers --no-apt {other} 2>&1 && exit 9
         mv /usr/bin/make.kept /usr/bin/make
         ls $headers/rust
         cat $headers/rust/made-by-barlink"
    );
    let output = printed(debian.run(&script)?)?;
    for part in [
        "lost.so",
        "failed for the reason above",
        "core.rmeta",
        "unfinished",
    ] {
        ensure!(output.contains(part), "no `{part}` in {output}");
    }
    Ok(())
}

fn header_tool_refuses_unusable_kernels(debian: &Debian) -> Result<()> {
    let headers = "/usr/src/linux-headers-9.9-other";
    let missing = debian.run("barlink-kernel-rust-headers --no-apt 9.9-other")?;
    let errors = String::from_utf8_lossy(&missing.stderr);
    ensure!(missing.status.code() == Some(1), "{errors}");
    ensure!(
        errors.contains("there are no headers of kernel 9.9-other"),
        "{errors}"
    );
    for (configuration, message) in [
        ("CONFIG_MODULES=y", "was built without Rust (CONFIG_RUST)"),
        (
            "CONFIG_RUST=y\nCONFIG_RUSTC_VERSION_TEXT=\"rustc 9.9\"",
            "was built by 'rustc 9.9', and /usr/bin/rustc is 'rustc 1.",
        ),
    ] {
        let refused = debian.run(&format!(
            "mkdir -p {headers}; echo '{configuration}' >{headers}/.config
             barlink-kernel-rust-headers --no-apt 9.9-other"
        ))?;
        let errors = String::from_utf8_lossy(&refused.stderr);
        ensure!(refused.status.code() == Some(1), "{errors}");
        ensure!(errors.contains(message), "no `{message}` in {errors}");
    }
    printed(debian.run(&format!("rm -r {headers}"))?).map(drop)
}

fn manuals_are_there(debian: &Debian) -> Result<()> {
    let pages = "barlink.1 barlink-serve.1 barlink-guest.1 barlink-guest-send.1";
    let script = format!(
        "cd /usr/share/man/man1; for page in {pages}; do gzip -dc $page.gz | grep -q '^.SH OPTIONS'; done"
    );
    printed(debian.run(&script)?).map(drop)
}

/// Boots the system with barlink's device and a foreign device, and uses both.
fn boots_and_streams(artifacts: &Artifacts, debian: &Debian, image: &Path) -> Result<()> {
    let broker = Broker::start(artifacts, &[])?;
    let foreign = broker.folder().join("foreign");
    let mut file = fs::File::create(&foreign)?;
    file.write_all(FOREIGN)?;
    file.set_len(1 << 20)?;

    let options = [
        (
            "-object",
            format!(
                "memory-backend-file,id=foreign,share=on,size=1M,mem-path={}",
                foreign.display()
            ),
        ),
        ("-device", "ivshmem-plain,memdev=foreign,addr=1e".to_owned()),
    ];
    let vm = boot(artifacts, debian, image, &broker, &options)?;
    let run = |script: &str| -> Result<String> { vm.run(["sh", "-ec", script])?.success() };

    // udev alone loads the driver, by the module's alias.
    eventually(|| run("test -c /dev/barlink0"))?;
    ensure!(run("lsmod")?.contains("barlink"));
    eventually(|| run("test \"$(stat -c '%G %a' /dev/barlink0)\" = 'barlink 660'"))?;

    let as_member = |command: &str| run(&format!("runuser -u member -- {command}"));
    ensure!(as_member("barlink-guest info")?.contains("cache mode"));
    let refused = run("! runuser -u somebody -- barlink-guest info 2>&1")?;
    ensure!(refused.contains("no permission to open"), "{refused}");
    let refused = run("chmod o+r /dev/barlink0; ! runuser -u somebody -- barlink-guest send 2>&1")?;
    ensure!(refused.contains("for writing"), "{refused}");
    run("runuser -u somebody -- barlink-guest info; chmod o-r /dev/barlink0")?;
    by_path(&run)?;
    streams(&vm, &broker)?;

    foreign_device_is_left_alone(&vm, &foreign)?;
    the_unit_runs(&vm)
}

/// Uses the device by the link that names its PCI address, before and after the driver has released
/// it.
fn by_path(run: &impl Fn(&str) -> Result<String>) -> Result<()> {
    let info = run("barlink-guest info --json")?;
    let info: serde_json::Value = serde_json::from_str(&info)?;
    let address = info["pci_address"].as_str().context("no address")?;
    let link = format!("/dev/barlink/by-path/pci-{address}");
    eventually(|| run(&format!("test \"$(readlink -f {link})\" = /dev/barlink0")))?;
    let by_link = run(&format!("barlink-guest --device {link} info"))?;
    ensure!(by_link.contains(address), "{by_link}");
    // The broker's control socket is `control.sock`.
    let name = info["name"].as_str().context("no name")?;
    let link_of_name = format!("/dev/barlink/by-name/{name}");
    eventually(|| {
        run(&format!(
            "test \"$(readlink -f {link_of_name})\" = /dev/barlink0"
        ))
    })?;
    ensure!(run(&format!("barlink-guest --device {name} info"))?.contains(address));
    let drivers = "/sys/bus/pci/drivers/barlink";
    run(&format!("echo {address} >{drivers}/unbind"))?;
    eventually(|| run(&format!("test ! -e {link}")))?;
    run(&format!("echo {address} >{drivers}/bind"))?;
    eventually(|| run(&format!("barlink-guest --device {link} info")))?;
    Ok(())
}

/// Checks an ivshmem device with foreign memory. The driver declines it, and a program and another
/// driver can use it.
fn foreign_device_is_left_alone(vm: &Vm, foreign: &Path) -> Result<()> {
    let run = |script: &str| -> Result<String> { vm.run(["sh", "-ec", script])?.success() };
    let device = "/sys/bus/pci/devices/0000:00:1e.0";
    ensure!(run(&format!("cat {device}/modalias"))?.starts_with("pci:v00001AF4d00001110"));
    eventually(|| run("dmesg | grep -q '0000:00:1e.0: declined: no barlink region'"))?;
    run(&format!(
        "test ! -e {device}/driver; test ! -e /dev/barlink1"
    ))?;
    run(&format!("echo 1 >{device}/enable"))?;
    let read = vm.run(["python3", "-c", MAP, device])?.success()?;
    ensure!(read.trim_end().as_bytes() == FOREIGN, "{read}");
    ensure!(&fs::read(foreign)?[4096..4101] == b"reply");
    run(&format!(
        "modprobe uio_pci_generic
         echo uio_pci_generic >{device}/driver_override
         echo 0000:00:1e.0 >/sys/bus/pci/drivers_probe
         readlink {device}/driver | grep -q uio_pci_generic"
    ))?;
    eventually(|| run("test -c /dev/uio0"))?;
    Ok(())
}

/// Checks the host's package under a real systemd: a restarted broker keeps its region.
fn the_unit_runs(vm: &Vm) -> Result<()> {
    let run = |script: &str| -> Result<String> { vm.run(["sh", "-ec", script])?.success() };
    let inspect = || -> Result<Value> {
        Ok(serde_json::from_str(&run(
            "barlink inspect --json --control /run/barlink/vm1.sock",
        )?)?)
    };
    run(
        "mkdir -p /etc/barlink; echo 'BARLINK_ARGS=--size 4M' >/etc/barlink/vm1.conf; systemctl start barlink@vm1",
    )?;
    let user = run("stat -c %U /proc/$(systemctl show --value -p MainPID barlink@vm1)")?;
    ensure!(user.trim() == "barlink", "{user}");
    inspect()?;
    run("echo kept | barlink poke --control /run/barlink/vm1.sock; systemctl restart barlink@vm1")?;
    let kept = run("barlink peek --control /run/barlink/vm1.sock --raw --length 4")?;
    ensure!(kept == "kept", "{kept}");
    mistakes_in_the_configuration_lose_no_region(&run)
}

/// Checks that a mistake is found before the running broker ends, and that the region outlives
/// failed starts.
fn mistakes_in_the_configuration_lose_no_region(
    run: &dyn Fn(&str) -> Result<String>,
) -> Result<()> {
    let peek = || run("barlink peek --control /run/barlink/vm1.sock --raw --length 4");
    run("echo 'BARLINK_ARGS=--size 5M' >/etc/barlink/vm1.conf; ! systemctl reload barlink@vm1")?;
    let found = run("journalctl --unit barlink@vm1 --output cat")?;
    ensure!(found.contains("is not a power of two"), "{found}");
    ensure!(peek()? == "kept", "a check changed the region");
    run("! systemctl restart barlink@vm1")?;
    // systemd gives a service up after five failed starts in ten seconds, by default.
    run("for try in 1 2 3 4 5 6; do sleep 1; done")?;
    run("echo 'BARLINK_ARGS=--size 4M' >/etc/barlink/vm1.conf; systemctl restart barlink@vm1")?;
    ensure!(peek()? == "kept", "failed starts lost the region");
    run("systemctl reload barlink@vm1")?;
    run(
        "echo 'BARLINK_SLOTS=--ivshmem /tmp/vm.sock' >>/etc/barlink/vm1.conf; ! systemctl reload barlink@vm1",
    )?;
    let found = run("journalctl --unit barlink@vm1 --output cat")?;
    ensure!(found.contains("hidden from VMs by PrivateTmp="), "{found}");
    run("echo 'BARLINK_ARGS=--size 8M' >/etc/barlink/vm1.conf
         systemctl stop barlink@vm1
         systemctl clean --what=fdstore barlink@vm1 || true
         systemctl start barlink@vm1")?;
    ensure!(peek()? == "\0\0\0\0", "the region was not given up");
    Ok(())
}
