// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The driver as a module of the kernel: loading it, unloading it, and what the kernel's log says meanwhile.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use rustix::fs::OFlags;
use rustix::system::{delete_module, finit_module};

/// What the kernel's log does not hold while all is well.
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

/// What stands in lines of every boot that hold such words.
const HARMLESS: [&str; 2] = ["Command line", "PAT: Configuration"];

/// Loads the module.
pub(crate) fn load() -> Result<()> {
    Ok(finit_module(File::open("/lib/barlink.ko")?, c"", 0)?)
}

/// Unloads the module. `WOULDBLOCK` while it is in use.
pub(crate) fn unload() -> rustix::io::Result<()> {
    // O_NONBLOCK is what `rmmod` says, too, and the kernel knows nothing else.
    delete_module(c"barlink", OFlags::NONBLOCK.bits().cast_signed())
}

/// Whether it is loaded.
pub(crate) fn is_loaded() -> bool {
    Path::new("/sys/module/barlink").exists()
}

/// The kernel's log.
pub(crate) fn log() -> Result<String> {
    let output = Command::new("dmesg").output()?;
    ensure!(!output.stdout.is_empty(), "there is no kernel log");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// An error, with the lines, if the kernel has complained of anything since it booted.
pub(crate) fn check_log() -> Result<()> {
    let complaint = complaint(&log()?);
    ensure!(complaint.is_empty(), "the kernel complains:\n{complaint}");
    Ok(())
}

/// The lines of a kernel's log from its first complaint on, if there is any.
pub fn complaint(log: &str) -> String {
    let holds = |line: &str, words: &[&str]| words.iter().any(|word| line.contains(word));
    let complains = |line: &&str| holds(line, &COMPLAINTS) && !holds(line, &HARMLESS);
    let told = log.lines().skip_while(|line| !complains(line)).take(40);
    told.collect::<Vec<_>>().join("\n")
}
