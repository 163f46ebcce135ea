// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The accelerator that runs the guest's instructions: KVM where a guest of the kind boots under it
//! (`probe.rs`), else QEMU's translator TCG.

use std::path::Path;
use std::sync::Once;

use anyhow::{Context, Result, bail};
use rustix::fs::{Access, access};
use rustix::io::Errno;

use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::tools::Accel;

use crate::probe::{Guest, probe};

/// Path of KVM's device.
pub(crate) const KVM: &str = "/dev/kvm";

/// Chooses the accelerator of VMs with a kernel: the wanted one, else KVM if the kernel boots under
/// it, else TCG. Prints the reason for TCG once in a process.
pub fn accelerator(artifacts: &Artifacts) -> Accel {
    let chosen = artifacts.args.accel;
    chosen.unwrap_or_else(|| match kvm_boots(artifacts, Guest::Linux) {
        Ok(()) => Accel::Kvm,
        Err(reason) => {
            static TOLD: Once = Once::new();
            TOLD.call_once(|| eprintln!("TCG runs the guests, because {reason:#}"));
            Accel::Tcg
        }
    })
}

/// Checks that the bare guest runs under KVM. The error is the reason why tests leave KVM out.
pub fn check_bare_kvm(artifacts: &Artifacts) -> Result<()> {
    if artifacts.args.accel == Some(Accel::Tcg) {
        bail!("--accel tcg was given");
    }
    kvm_boots(artifacts, Guest::Bare)
}

/// Checks that the wanted accelerator is available, so that a caller can fail before long work.
pub fn check_accelerator(wanted: Option<Accel>) -> Result<()> {
    match wanted {
        Some(Accel::Kvm) => wanted_kvm(check_device(Path::new(KVM))),
        _ => Ok(()),
    }
}

/// Checks that the kernel boots under KVM, if KVM is wanted.
pub fn check_kernel_boots(artifacts: &Artifacts) -> Result<()> {
    match artifacts.args.accel {
        Some(Accel::Kvm) => wanted_kvm(kvm_boots(artifacts, Guest::Linux)),
        _ => Ok(()),
    }
}

fn wanted_kvm(checked: Result<()>) -> Result<()> {
    checked.map_err(|error| anyhow::anyhow!("--accel kvm: {error:#}; or take --accel tcg"))
}

fn kvm_boots(artifacts: &Artifacts, guest: Guest) -> Result<()> {
    check_device(Path::new(KVM))?;
    probe(artifacts, guest)
}

/// Describes the guest's processors for the hash of a snapshot. Under KVM they are the host's.
pub(crate) fn identity(artifacts: &Artifacts) -> String {
    match accelerator(artifacts) {
        Accel::Tcg => "tcg".to_owned(),
        Accel::Kvm => {
            let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let model = cpus.split("\n\n").next().unwrap_or_default();
            let stable = |line: &&str| line.starts_with("model") || line.starts_with("flags");
            let model: Vec<_> = model.lines().filter(stable).collect();
            format!("kvm {}", model.join(" "))
        }
    }
}

fn check_device(device: &Path) -> Result<()> {
    let (cause, cure) = match access(device, Access::READ_OK | Access::WRITE_OK) {
        Ok(()) => return Ok(()),
        Err(Errno::NOENT) => (
            "is not there",
            "load kvm_intel or kvm_amd, for which virtualisation must be on in the firmware",
        ),
        Err(Errno::ACCESS) => (
            "is closed to this user",
            "join the group that has it, mostly `kvm`, and log in anew",
        ),
        Err(_) => ("cannot be used", "replace that file by KVM's device"),
    };
    Err(anyhow::anyhow!("{cure}")).with_context(|| format!("{} {cause}", device.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_missing_kvm_with_cure() {
        for (device, cure) in [
            ("/no/such/file", "is not there: load kvm_intel or kvm_amd"),
            ("/dev/null/kvm", "cannot be used"),
        ] {
            let error = wanted_kvm(check_device(Path::new(device))).unwrap_err();
            let error = error.to_string();
            assert!(error.contains(cure), "{error}");
            assert!(error.ends_with("or take --accel tcg"), "{error}");
        }
        check_device(Path::new("/dev/null")).unwrap();
        check_accelerator(Some(Accel::Tcg)).unwrap();
    }
}
