// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The version of a QEMU program, and what that version can do over each transport.

use std::fmt::{Display, Formatter};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use barlink_broker::transport::{Ivshmem, VfioUser, VhostUser};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// Time in which QEMU must print its version and end. It takes some milliseconds on an idle host.
const TIME_LIMIT: Duration = Duration::from_secs(5);
/// Bytes of each output that are read. QEMU prints two lines.
const OUTPUT_LIMIT: usize = 4096;
/// Characters of a line of output that an error quotes.
const QUOTE_LIMIT: usize = 200;
/// Text before the version in QEMU's output.
const BEFORE_VERSION: &str = "QEMU emulator version ";
/// Micro versions from this on are release candidates of the next release, such as 10.0.93 of
/// 10.1.0. Those from 50 on are development versions before the first candidate.
const FIRST_CANDIDATE: u32 = 90;
/// Last minor version of a major one: 10.0 comes after 9.2.
const LAST_MINOR: u32 = 2;

/// Transport, oldest release of QEMU (major and minor) that barlink supports over it, and a remark
/// about the releases that barlink was tested with.
const NEEDS: [(&str, (u32, u32), &str); 3] = [
    (Ivshmem::NAME, (7, 2), "tested with 7.2, 10.0 and 11.1"),
    (
        VfioUser::NAME,
        (10, 1),
        "tested with 11.1, tried with 10.1 and 10.2",
    ),
    (VhostUser::NAME, (11, 1), "tested with 11.1, experimental"),
];

/// A version of QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuVersion {
    /// Version and suffix as QEMU prints them, such as `7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`.
    text: String,
    /// Release whose features this version has: major and minor.
    release: (u32, u32),
}

impl QemuVersion {
    /// Runs `program --version`, and parses its output. A name without a slash is looked for in
    /// `PATH`, as by a shell. No shell is involved.
    pub fn of(program: &Path) -> Result<Self> {
        let name = program.display();
        let mut command = Command::new(program);
        // Without a process group of its own, the children of a script could not be ended.
        command
            .arg("--version")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let child = command.spawn();
        let child = child.with_context(|| {
            format!("--qemu {name} cannot be run: name a program that is QEMU's")
        })?;
        let running = Running {
            child,
            is_reaped: false,
        };
        let output = running.output();
        let output = output.with_context(|| format!("`{name} --version` failed"))?;
        Self::parse(&output).with_context(|| {
            format!(
                "`{name} --version` printed {:?} and not `{BEFORE_VERSION}...`: name QEMU's \
                 program for the whole system, such as qemu-system-x86_64",
                first_line(&output)
            )
        })
    }

    /// Parses the output of `qemu-system-x86_64 --version`. The version is in the first line that
    /// begins as QEMU's does, because a script around QEMU can print others before.
    fn parse(output: &str) -> Option<Self> {
        let mut lines = output.lines();
        let text = lines.find_map(|line| line.trim_end().strip_prefix(BEFORE_VERSION))?;
        let (version, _) = text.split_once(' ').unwrap_or((text, ""));
        let (numbers, _) = version.split_once('-').unwrap_or((version, ""));
        let mut numbers = numbers.split('.').map(parse_number);
        let (major, minor) = (numbers.next()??, numbers.next()??);
        // QEMU always prints a third number. A version without one is a release.
        let micro = numbers.next().unwrap_or(Some(0))?;
        if numbers.next().is_some() {
            return None;
        }
        let release = match (micro < FIRST_CANDIDATE, minor < LAST_MINOR) {
            (true, _) => (major, minor),
            (false, true) => (major, minor + 1),
            (false, false) => (major.checked_add(1)?, 0),
        };
        Some(Self {
            text: text.to_owned(),
            release,
        })
    }

    /// Says what this QEMU can do with a slot that has this transport. An error if it cannot use
    /// the slot.
    pub fn check(&self, transport: &str) -> Result<String> {
        let needed = |(name, ..): &&(&str, _, _)| *name == transport;
        let Some((_, oldest, tested)) = NEEDS.iter().find(needed) else {
            // A broker of a later release can have a transport that this program does not know.
            bail!("no version of QEMU is known for the transport {transport}: leave --qemu out");
        };
        let (major, minor) = oldest;
        if self.release < *oldest {
            let others: Vec<String> = NEEDS
                .iter()
                .filter(|(_, oldest, _)| self.release >= *oldest)
                .map(|(name, ..)| format!("--{name}"))
                .collect();
            let cure = match others.is_empty() {
                true => String::new(),
                false => format!(", or serve the slot with {}", others.join(" or ")),
            };
            bail!(
                "QEMU {self} is too old for {transport}, which needs {major}.{minor} or later: \
                 name a later QEMU{cure}"
            );
        }
        Ok(format!(
            "QEMU {self} can use the slot over {transport}, which needs {major}.{minor} or later \
             and was {tested}"
        ))
    }
}

impl Display for QemuVersion {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        for c in self.text.chars().take(QUOTE_LIMIT) {
            match c.is_control() {
                true => write!(f, "{}", c.escape_default())?,
                false => write!(f, "{c}")?,
            }
        }
        Ok(())
    }
}

/// Parses digits alone. The parser of the standard library takes a sign as well.
fn parse_number(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

/// Returns the start of the first line.
fn first_line(output: &str) -> String {
    let line = output.lines().next().unwrap_or_default();
    line.chars().take(QUOTE_LIMIT).collect()
}

/// A process that leads a process group. Both end when this is dropped.
struct Running {
    child: Child,
    is_reaped: bool,
}

impl Running {
    /// Returns the standard output of the process after its end. An error if it fails, takes too
    /// long, or prints too much.
    fn output(mut self) -> Result<String> {
        let deadline = Instant::now() + TIME_LIMIT;
        let pid = Pid::from_child(&self.child);
        let ended = pidfd_open(pid, PidfdFlags::empty())?;
        let mut output = Pipe::new(self.child.stdout.take().context("no output")?.into())?;
        let mut errors = Pipe::new(self.child.stderr.take().context("no errors")?.into())?;
        // Waits for the process and not for the end of its output, because a process that it left
        // behind can hold the pipes.
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(
                !left.is_zero(),
                "it did not end within {} s: name a QEMU that prints its version",
                TIME_LIMIT.as_secs()
            );
            let has_ended = {
                let mut files = vec![PollFd::new(&ended, PollFlags::IN)];
                let open = [&output, &errors].into_iter().filter(|pipe| !pipe.at_end);
                files.extend(open.map(|pipe| PollFd::new(&pipe.file, PollFlags::IN)));
                match poll(&mut files, Some(&Timespec::try_from(left)?)) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
                !files[0].revents().is_empty()
            };
            output.read()?;
            errors.read()?;
            if has_ended {
                break;
            }
        }
        let status = self.end()?;
        ensure!(
            status.success(),
            "{status}, and its error output begins with {:?}: name a QEMU that runs here",
            first_line(&errors.text())
        );
        Ok(output.text())
    }

    /// Kills what is left of the process group, and reaps the process. In this order, because the
    /// group's number can belong to other processes afterwards.
    fn end(&mut self) -> io::Result<ExitStatus> {
        // Ignores the error, because the whole group may have ended.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let status = self.child.wait();
        self.is_reaped = true;
        status
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.is_reaped {
            let _ = self.end();
        }
    }
}

/// The reading end of a pipe, and what was read.
struct Pipe {
    file: File,
    bytes: Vec<u8>,
    at_end: bool,
}

impl Pipe {
    fn new(file: OwnedFd) -> Result<Self> {
        fcntl_setfl(&file, fcntl_getfl(file.as_fd())? | OFlags::NONBLOCK)?;
        Ok(Self {
            file: file.into(),
            bytes: Vec::new(),
            at_end: false,
        })
    }

    /// Reads what is there. An error if that is more than a QEMU prints.
    fn read(&mut self) -> Result<()> {
        let mut part = [0; OUTPUT_LIMIT];
        while !self.at_end {
            match self.file.read(&mut part) {
                Ok(length) => {
                    self.at_end = length == 0;
                    self.bytes.extend_from_slice(&part[..length]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
            ensure!(
                self.bytes.len() <= OUTPUT_LIMIT,
                "it printed more than {OUTPUT_LIMIT} bytes: name a QEMU that prints no more than \
                 its version"
            );
        }
        Ok(())
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(version: &str) -> Option<(u32, u32)> {
        let output =
            format!("{BEFORE_VERSION}{version}\nCopyright (c) 2003-2022 Fabrice Bellard\n");
        QemuVersion::parse(&output).map(|version| version.release)
    }

    #[test]
    fn parses_versions_of_distributions() {
        for (version, expected) in [
            ("7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", (7, 2)),
            ("8.2.2 (Debian 1:8.2.2+ds-0ubuntu1.4)", (8, 2)),
            ("9.1.0 (qemu-kvm-9.1.0-15.el9)", (9, 1)),
            ("10.0.2", (10, 0)),
            ("10.1", (10, 1)),
            ("11.1.3 (v11.1.3-12-gabcdef-dirty)", (11, 1)),
        ] {
            assert_eq!(release(version), Some(expected), "{version}");
        }
    }

    #[test]
    fn counts_candidates_as_their_release() {
        for (version, expected) in [
            ("7.1.93 (v7.2.0-rc3)", (7, 2)),
            ("9.2.90 (Debian 1:10.0.0~rc0+ds-1)", (10, 0)),
            ("10.0.93", (10, 1)),
            ("10.1.0-rc3", (10, 1)),
            // Development versions lack what comes before the release.
            ("10.0.50 (v10.0.0-1234-g0123456789)", (10, 0)),
            ("10.0.89", (10, 0)),
        ] {
            assert_eq!(release(version), Some(expected), "{version}");
        }
    }

    #[test]
    fn rejects_output_without_version() {
        for version in [
            "",
            "7",
            "7.",
            "x.y",
            "+7.2",
            "7.2.0.1",
            "99999999999.0.0",
            "4294967295.2.90",
        ] {
            assert_eq!(release(version), None, "{version}");
        }
        assert_eq!(QemuVersion::parse("qemu-img version 7.2.22"), None);
        assert_eq!(QemuVersion::parse(""), None);
    }

    #[test]
    fn each_transport_needs_its_version() {
        let can = |version: &str| {
            let output = format!("warning: old\n{BEFORE_VERSION}{version}\n");
            let version = QemuVersion::parse(&output).unwrap();
            NEEDS.map(|(transport, ..)| version.check(transport).is_ok())
        };
        assert_eq!(can("7.1.0"), [false, false, false]);
        assert_eq!(can("7.2.0"), [true, false, false]);
        assert_eq!(can("10.0.8"), [true, false, false]);
        assert_eq!(can("10.1.0"), [true, true, false]);
        assert_eq!(can("11.0.2"), [true, true, false]);
        assert_eq!(can("11.1.0"), [true, true, true]);
    }

    #[test]
    fn error_names_usable_transports() {
        let check = |version: &str, transport| {
            let output = format!("{BEFORE_VERSION}{version}");
            let version = QemuVersion::parse(&output).unwrap();
            version.check(transport).unwrap_err().to_string()
        };
        assert_eq!(
            check("10.1.0", VhostUser::NAME),
            "QEMU 10.1.0 is too old for vhost-user, which needs 11.1 or later: name a later QEMU, \
             or serve the slot with --ivshmem or --vfio-user"
        );
        assert_eq!(
            check("6.2.0", Ivshmem::NAME),
            "QEMU 6.2.0 is too old for ivshmem, which needs 7.2 or later: name a later QEMU"
        );
    }
}
