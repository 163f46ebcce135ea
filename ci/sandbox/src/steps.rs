// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Long work in named steps, with progress on standard error and the output of all programs in a
//! log.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGHUP, SIGINT};
use signal_hook::flag;

/// Number of lines of the log that an error shows.
const SHOWN_LINES: usize = 12;

/// The log of a series of steps.
#[derive(Debug)]
pub struct Steps {
    path: PathBuf,
    log: RefCell<File>,
    interrupted: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

impl Steps {
    /// Starts an empty log at `path`.
    ///
    /// Until this is dropped, Ctrl-C ends the programs that the steps run, but not this process. So
    /// the step fails, and its output is removed.
    pub fn start(path: &Path) -> Result<Self> {
        let interrupted = Arc::default();
        let ended = Arc::default();
        for signal in [SIGINT, SIGHUP] {
            // Once `ended` is set, the first action ends the process. Before that, the second
            // action records the signal.
            flag::register_conditional_default(signal, Arc::clone(&ended))
                .and_then(|_| flag::register(signal, Arc::clone(&interrupted)))
                .context("signals cannot be caught")?;
        }
        let log = File::create(path)
            .with_context(|| format!("the log {} cannot be made", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            log: RefCell::new(log),
            interrupted,
            ended,
        })
    }

    /// Does `work` as the step `what`. Shows the step while it runs, and how long it took.
    pub fn step<T>(&self, what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        writeln!(self.log.borrow_mut(), "=== {what}")?;
        let started = Instant::now();
        let terminal = std::io::stderr().is_terminal();
        let spinner = if terminal {
            let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})")?;
            ProgressBar::new_spinner()
                .with_style(style)
                .with_message(what.to_owned())
        } else {
            eprintln!("{what} ...");
            ProgressBar::hidden()
        };
        spinner.enable_steady_tick(Duration::from_millis(120));
        let result = work();
        spinner.finish_and_clear();
        if self.interrupted.load(Ordering::Relaxed) {
            bail!("interrupted; nothing unfinished is left behind");
        }
        let seconds = started.elapsed().as_secs_f64();
        match &result {
            Ok(_) if terminal => eprintln!("✓ {what} ({seconds:.1} s)"),
            Ok(_) => eprintln!("{what}: done in {seconds:.1} s"),
            Err(_) => eprintln!("{what}: failed after {seconds:.1} s"),
        }
        result.with_context(|| what.to_owned())
    }

    /// Runs a program to its end, with its output in the log. An error, with the end of the log, if
    /// it fails.
    pub fn run(&self, command: &mut Command) -> Result<()> {
        writeln!(self.log.borrow_mut(), "--- {command:?}")?;
        let log = self.log.borrow().try_clone()?;
        let status = command
            .stdin(Stdio::null())
            .stderr(log.try_clone()?)
            .stdout(log)
            .status()
            .with_context(|| format!("{} cannot be started", command.get_program().display()))?;
        if !status.success() {
            let text = fs::read(&self.path)?;
            let text = String::from_utf8_lossy(&text);
            let text = text.rsplit("\n=== ").next().unwrap_or_default();
            // Leaves out the commands themselves, which have many arguments for bubblewrap.
            let lines: Vec<&str> = text
                .lines()
                .skip(1)
                .filter(|line| !line.starts_with("--- "))
                .collect();
            let shown = &lines[lines.len().saturating_sub(SHOWN_LINES)..];
            let log = self.path.display();
            bail!(
                "a program failed ({status}); all its output is in {log}, which ends\n  {}",
                shown.join("\n  ")
            );
        }
        Ok(())
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}
