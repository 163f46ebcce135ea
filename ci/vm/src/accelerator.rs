// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The accelerator that runs the guest's instructions: KVM where it works, else QEMU's translator
//! TCG.

use std::path::Path;

use anyhow::{Result, bail};
use rustix::fs::{Access, access};
use rustix::io::Errno;

use barlink_sandbox::tools::Accel;

/// Path of KVM's device.
pub(crate) const KVM: &str = "/dev/kvm";

/// Kernel modules that are known to serve [`KVM`] well. The device alone proves little, because
/// guests may hang where something else serves it.
const MODULES: [&str; 2] = ["/sys/module/kvm_intel", "/sys/module/kvm_amd"];

/// Chooses the accelerator: the wanted one, else KVM if it works, else TCG.
pub fn accelerator(wanted: Option<Accel>) -> Accel {
    wanted.unwrap_or_else(|| match is_served() && check_kvm(Path::new(KVM)).is_ok() {
        true => Accel::Kvm,
        false => Accel::Tcg,
    })
}

/// Checks that the wanted accelerator is available, so that a caller can fail before long work.
pub fn check_accelerator(wanted: Option<Accel>) -> Result<()> {
    if wanted != Some(Accel::Kvm) {
        return Ok(());
    }
    check_kvm(Path::new(KVM))?;
    if !is_served() {
        eprintln!(
            "{KVM} is served by neither kvm_intel nor kvm_amd: if the guest hangs, take --accel tcg"
        );
    }
    Ok(())
}

/// Describes the guest's processors for the hash of a snapshot. Under KVM they are the host's.
pub(crate) fn identity(wanted: Option<Accel>) -> String {
    match accelerator(wanted) {
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

fn is_served() -> bool {
    MODULES.iter().any(|module| Path::new(module).exists())
}

fn check_kvm(device: &Path) -> Result<()> {
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
        Err(_) => ("cannot be used", "see what it is"),
    };
    bail!(
        "--accel kvm: {} {cause}: {cure}; or take --accel tcg",
        device.display()
    )
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
            let error = check_kvm(Path::new(device)).unwrap_err().to_string();
            assert!(error.contains(cure), "{error}");
            assert!(error.ends_with("or take --accel tcg"), "{error}");
        }
        check_kvm(Path::new("/dev/null")).unwrap();
        check_accelerator(Some(Accel::Tcg)).unwrap();
    }
}
