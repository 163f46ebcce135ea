// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The driver as a kernel module: loads it, unloads it, and searches the kernel log for complaints.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use rustix::fs::OFlags;
use rustix::system::{delete_module, finit_module};

/// Words in the kernel log that report a fault.
const COMPLAINTS: [&str; 10] = [
    "WARNING",
    "BUG",
    "Oops",
    "Call Trace",
    "cut here",
    "general protection",
    "panicked",
    "memory leaks",
    "corrupt",
    "x86/PAT",
];

/// Words that mark a line of every boot as harmless, although it contains one of [`COMPLAINTS`].
const HARMLESS: [&str; 2] = ["Command line", "PAT: Configuration"];

/// Loads the module.
pub(crate) fn load() -> Result<()> {
    Ok(finit_module(File::open("/lib/barlink.ko")?, c"", 0)?)
}

/// Unloads the module. `WOULDBLOCK` if it is in use.
pub(crate) fn unload() -> rustix::io::Result<()> {
    // `rmmod` passes O_NONBLOCK as well. The kernel has no other mode.
    delete_module(c"barlink", OFlags::NONBLOCK.bits().cast_signed())
}

/// Returns whether the module is loaded.
pub(crate) fn is_loaded() -> bool {
    Path::new("/sys/module/barlink").exists()
}

/// Reads the kernel log.
pub(crate) fn log() -> Result<String> {
    let output = Command::new("dmesg").output()?;
    ensure!(!output.stdout.is_empty(), "there is no kernel log");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Checks the kernel log. A complaint since the boot is an error that holds its lines.
pub(crate) fn check_log() -> Result<()> {
    let complaint = complaint(&log()?);
    ensure!(complaint.is_empty(), "the kernel complains:\n{complaint}");
    Ok(())
}

/// Returns up to 40 lines of a kernel log from its first complaint on. Empty if there is none.
pub fn complaint(log: &str) -> String {
    let holds = |line: &str, words: &[&str]| words.iter().any(|word| line.contains(word));
    let complains = |line: &&str| holds(line, &COMPLAINTS) && !holds(line, &HARMLESS);
    let lines = log.lines().skip_while(|line| !complains(line)).take(40);
    lines.collect::<Vec<_>>().join("\n")
}
