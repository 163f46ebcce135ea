// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Probes that show whether guests of a kind boot under KVM.
//!
//! The device `/dev/kvm` proves little: behind it can be a KVM under which a stock kernel hangs
//! before its first message, while the bare guest runs. So each kind of guest is booted once.
//! Whether it booted or hung is stored in the user's cache folder, and holds until the host boots
//! again, or its KVM, QEMU or the guest is another one. An error, such as a full disk, is not
//! stored.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::unix::fs::MetadataExt;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use barlink_sandbox::builds::{Artifacts, file_identity};
use barlink_sandbox::setup::cache_folder;
use barlink_sandbox::tools::Accel;
use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

use crate::Config;
use crate::accelerator::KVM;
use crate::bare::written;
use crate::qemu::{option_value, processor, program};
use crate::running::Running;

/// Name of the file with the results in the user's cache folder.
const RESULTS: &str = "kvm-probes.json";
/// Identifier of this boot of the host.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";
/// Time between two looks at the guest's serial port.
const LOOK: Duration = Duration::from_millis(10);
/// Factor of the limit on a busy host.
const BUSY: u32 = 3;

/// The kinds of guests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Guest {
    /// The firmware image of `ci/bare-guest`.
    Bare,
    /// A Linux kernel.
    Linux,
}

impl Guest {
    /// Returns the text at its serial port that shows that it has booted. A kernel without any file
    /// system panics at the end of its boot.
    fn booted(self) -> &'static str {
        match self {
            Guest::Bare => "READY",
            Guest::Linux => "Kernel panic - not syncing: VFS",
        }
    }

    /// Returns the limit on its boot, which takes 0.1 s or 1 s under a KVM that works.
    fn limit(self) -> Duration {
        match self {
            Guest::Bare => Duration::from_secs(10),
            Guest::Linux => Duration::from_secs(20),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Guest::Bare => "the bare guest",
            Guest::Linux => "the guest's kernel",
        }
    }
}

/// Results by guest. The value is the reason why the guest does not boot, empty if it does.
type Results = BTreeMap<String, String>;

/// Returns success if the guest boots under KVM. Runs the probe if there is no result yet; other
/// processes wait meanwhile.
pub(crate) fn probe(artifacts: &Artifacts, guest: Guest) -> Result<()> {
    let path = cache_folder()?.join(RESULTS);
    let mut file = File::options();
    file.read(true).write(true).create(true).truncate(false);
    let mut file = file
        .open(&path)
        .with_context(|| format!("{} cannot be opened", path.display()))?;
    flock(&file, FlockOperation::LockExclusive)?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    // A file that was cut short has no results.
    let mut results: Results = serde_json::from_str(&text).unwrap_or_default();
    let host = host()?;
    let key = format!("{host} {}", identity(artifacts, guest)?);
    let reason = match results.get(&key) {
        Some(reason) => reason.clone(),
        None => {
            // An error is not stored: it says something of the host, such as a full disk.
            let reason = match boot(artifacts, guest, Accel::Kvm, guest.limit())? {
                Outcome::Boots => String::new(),
                Outcome::Hangs(reason) => reason,
            };
            results.retain(|key, _| key.starts_with(&host));
            results.insert(key, reason.clone());
            file.set_len(0)?;
            file.rewind()?;
            serde_json::to_writer(&file, &results)?;
            reason
        }
    };
    if reason.is_empty() {
        return Ok(());
    }
    bail!("{reason} (remove {} to try again)", path.display())
}

/// Describes this boot of the host, and its KVM: a module that is loaded anew has a new device.
fn host() -> Result<String> {
    let boot = fs::read_to_string(BOOT)?;
    let device = fs::metadata(KVM)?;
    Ok(format!(
        "{} {} {}",
        boot.trim_end(),
        device.ino(),
        device.ctime()
    ))
}

/// Describes QEMU and the guest.
fn identity(artifacts: &Artifacts, guest: Guest) -> Result<String> {
    let image = match guest {
        // The name has a hash of the sources.
        Guest::Bare => {
            let name = artifacts.bare_guest().file_name();
            name.unwrap_or_default().to_string_lossy().into_owned()
        }
        Guest::Linux => file_identity(&artifacts.tools.kernel_image)?,
    };
    Ok(format!("{} {image}", artifacts.qemu_identity()?))
}

/// The outcome of a probe.
#[derive(Debug)]
enum Outcome {
    Boots,
    /// The guest did not boot in time, while QEMU ran. The text says so.
    Hangs(String),
}

/// Boots a guest, and waits for its text.
///
/// # Errors
///
/// QEMU could not be started, or ended, which can have many causes.
fn boot(artifacts: &Artifacts, guest: Guest, accel: Accel, limit: Duration) -> Result<Outcome> {
    let folder = TempDir::with_prefix_in("probe-", &artifacts.logs)?;
    let log = folder.path().join("serial.log");
    let config = Config::default();
    let mut command = program(artifacts, &config, folder.path(), accel)?;
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-machine", "q35", "-m", "256M", "-no-reboot"]);
    command.args(processor(accel, &config));
    match guest {
        Guest::Bare => command.arg("-bios").arg(artifacts.bare_guest()),
        Guest::Linux => {
            command.arg("-kernel").arg(&artifacts.tools.kernel_image);
            command.args([
                "-append",
                "console=ttyS0 tsc=reliable no_timer_check panic=-1",
            ])
        }
    };
    let path = option_value(&log);
    command.args(["-chardev", &format!("file,id=serial,path={path}")]);
    command.args(["-serial", "chardev:serial"]);
    let errors = tempfile::tempfile()?;
    command.stdin(Stdio::null()).stderr(errors.try_clone()?);
    let mut process = Running::start(command)?;
    let (start, stalled) = (Instant::now(), stalled());
    let mut limit = limit;
    let mut can_extend = true;
    loop {
        // Asks first, so that no text of a QEMU that ends is missed.
        let status = process.child.try_wait()?;
        let text = fs::read(&log).unwrap_or_default();
        if String::from_utf8_lossy(&text).contains(guest.booted()) {
            return Ok(Outcome::Boots);
        }
        let name = guest.name();
        if let Some(status) = status {
            let errors = written(&errors)?;
            let line = errors.lines().next_back().unwrap_or_default();
            bail!("{name} does not boot under {accel:?}: QEMU ended with {status}: {line}");
        }
        let elapsed = start.elapsed();
        if elapsed > limit && can_extend && self::stalled() > stalled + elapsed / 4 {
            can_extend = false;
            limit *= BUSY;
        }
        if elapsed > limit {
            let reason = format!("{name} does not boot within {limit:?} under {accel:?}");
            return Ok(Outcome::Hangs(reason));
        }
        thread::sleep(LOOK);
    }
}

/// Returns for how long tasks of this host have waited for a processor so far, 0 if the kernel does
/// not say (`Documentation/accounting/psi.rst`).
fn stalled() -> Duration {
    let text = fs::read_to_string("/proc/pressure/cpu").unwrap_or_default();
    let total = text
        .lines()
        .next()
        .and_then(|line| line.split("total=").nth(1));
    let micros = total.and_then(|total| total.trim().parse().ok());
    Duration::from_micros(micros.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Under TCG both kinds of guests boot everywhere.
    #[test]
    fn probe_tells_booted_from_hung_guests() {
        let artifacts = Artifacts::shared().unwrap();
        let minutes = Duration::from_secs(120);
        for guest in [Guest::Bare, Guest::Linux] {
            let outcome = boot(artifacts, guest, Accel::Tcg, minutes).unwrap();
            assert!(matches!(outcome, Outcome::Boots), "{outcome:?}");
        }
        let moment = Duration::from_millis(50);
        let outcome = boot(artifacts, Guest::Linux, Accel::Tcg, moment).unwrap();
        let Outcome::Hangs(reason) = outcome else {
            panic!("{outcome:?}");
        };
        assert!(reason.contains("does not boot within"), "{reason}");
        // A QEMU that ends is an error, which is not stored.
        let image = "/no/such/kernel".into();
        let broken = artifacts.with_kernel("none", image, artifacts.initramfs.clone());
        let error = boot(&broken, Guest::Linux, Accel::Tcg, minutes).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("QEMU ended with"), "{error}");
    }
}
