// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A process of a peer on the host, to which QEMU connects.

use std::cell::RefCell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Time limit until QEMU can connect, and the time between two checks.
const TIMEOUT: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(10);

/// A process of a peer: see the module. Dropping it kills the process. Its command must make the
/// process end with the bench.
#[derive(Debug)]
pub struct Daemon {
    name: &'static str,
    child: RefCell<Child>,
    log: PathBuf,
}

impl Daemon {
    /// Starts the process in `folder`, where its log is written, and waits for its socket.
    pub fn start(
        name: &'static str,
        mut command: Command,
        folder: &Path,
        socket: &Path,
    ) -> Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let errors = File::create(&log)?;
        command.current_dir(folder).stdin(Stdio::null());
        command.stdout(errors.try_clone()?).stderr(errors);
        let program = command.get_program().to_owned();
        let child = command
            .spawn()
            .with_context(|| format!("{} cannot be started", program.display()))?;
        let daemon = Self {
            name,
            child: RefCell::new(child),
            log,
        };
        let start = Instant::now();
        while !socket.exists() {
            daemon.check()?;
            ensure!(start.elapsed() < TIMEOUT, "{name} makes no socket");
            thread::sleep(LOOK);
        }
        Ok(daemon)
    }

    /// Returns an error with the last line of the log if the process has ended.
    pub fn check(&self) -> Result<()> {
        let Some(status) = self.child.borrow_mut().try_wait()? else {
            return Ok(());
        };
        let log = fs::read(&self.log)?;
        let log = String::from_utf8_lossy(&log);
        let last = log.lines().last().unwrap_or("nothing");
        bail!("{} ended with {status}, and said {last}", self.name);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // The process may have ended already.
        let child = self.child.get_mut();
        let _ = child.kill();
        let _ = child.wait();
    }
}
