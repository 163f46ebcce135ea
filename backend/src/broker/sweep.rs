// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Removes the files of a broker's sockets when it ends in good order.
//!
//! It has given up the right to do that itself (`confine.rs`): whoever could remove them when it is taken over could remove
//! their neighbours. So a process does that knows what to remove before anybody can talk to the broker, and is told
//! afterwards only that it is time. The broker waits for it, and holds the locks of its sockets until then: so nobody else
//! has come to listen there. A broker that is killed, or has a successor, tells it nothing, and it ends with the broker.

use std::ffi::{OsStr, OsString};
use std::fs::Metadata;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

/// How long the broker waits for it.
const PATIENCE: Duration = Duration::from_secs(2);

/// A file, by its path and by what it was there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Leftover {
    /// What is there now, if anything is.
    pub fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::symlink_metadata(path).ok()?;
        Some(Leftover {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }

    /// Whether that is the same file.
    pub fn is(&self, metadata: &Metadata) -> bool {
        (self.device, self.inode) == (metadata.dev(), metadata.ino())
    }

    /// Removes it, unless something else has its name by now.
    fn remove(&self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|there| self.is(&there)) {
            // Whoever removed it before us did our work.
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// As a word of a command line: `DEVICE:INODE:PATH`.
    fn word(&self) -> OsString {
        let mut word = OsString::from(format!("{}:{}:", self.device, self.inode));
        word.push(&self.path);
        word
    }

    /// What [`Self::word`] gave.
    pub fn parse(word: &OsStr) -> Option<Self> {
        let mut parts = word.as_bytes().splitn(3, |byte| *byte == b':');
        let mut number = || u64::from_str(std::str::from_utf8(parts.next()?).ok()?).ok();
        let (device, inode) = (number()?, number()?);
        Some(Leftover {
            path: OsString::from_vec(parts.next()?.to_owned()).into(),
            device,
            inode,
        })
    }
}

/// The broker's side of that process.
#[derive(Debug)]
pub struct Sweeper(UnixStream);

impl Sweeper {
    /// Starts it, as this very program with this subcommand and the files behind it.
    pub fn start(subcommand: &str, files: &[Leftover]) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg(subcommand)
            .args(files.iter().map(Leftover::word));
        command.stdin(OwnedFd::from(theirs)).current_dir("/");
        command.stdout(Stdio::null()).stderr(Stdio::null());
        // Its end is not waited for: the two end together.
        command.spawn()?;
        Ok(Sweeper(ours))
    }

    /// Has it remove the files, and waits until it has.
    pub fn sweep(mut self) -> io::Result<()> {
        self.0.write_all(&[1])?;
        self.0.read_to_end(&mut Vec::new()).map(drop)
    }
}

/// That process: waits for a word, and removes the files then; none if the other side ends before.
pub fn sweep(mut broker: impl Read, files: &[Leftover]) {
    if broker.read_exact(&mut [0]).is_ok() {
        files.iter().for_each(Leftover::remove);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_there_is_removed_and_only_at_a_word() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, name).unwrap();
            path
        };
        let (kept, replaced) = (file("kept"), file("replaced"));
        let files: Vec<_> = [&kept, &replaced]
            .into_iter()
            .map(|path| Leftover::of(path).unwrap())
            .collect();
        // Another file, while the first one's number is still in use.
        let _open = std::fs::File::open(&replaced).unwrap();
        std::fs::remove_file(&replaced).unwrap();
        file("replaced");
        sweep(&[][..], &files);
        assert!(kept.exists() && replaced.exists());
        sweep(&[1][..], &files);
        assert!(!kept.exists() && replaced.exists());
    }

    #[test]
    fn files_of_any_name_come_through_a_command_line() {
        for name in [&b"/tmp/a:b.sock"[..], b"/tmp/\xff\n", b""] {
            let leftover = Leftover {
                path: PathBuf::from(OsStr::from_bytes(name)),
                device: u64::MAX,
                inode: 7,
            };
            assert_eq!(Leftover::parse(&leftover.word()), Some(leftover));
        }
        for wrong in ["", "1", "1:2", "x:2:/tmp", "-1:2:/tmp"] {
            assert_eq!(Leftover::parse(OsStr::new(wrong)), None, "{wrong}");
        }
    }
}
