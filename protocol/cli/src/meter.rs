// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Shows how far a stream is, on a terminal, whom it waits for, and how it went.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use barlink_protocol::stream::{Progress, Watch};
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};

/// Looking at the clock and the terminal at each record would be felt.
const INTERVAL: Duration = Duration::from_millis(100);

/// How long the other end is waited for without a word.
const PATIENCE: Duration = Duration::from_secs(1);

/// Says once, on a terminal, that the other end is waited for.
pub struct Wait {
    /// What to say where nobody holds the other end, and where somebody does.
    away: String,
    held: String,
    /// There is nobody to tell, or he was told.
    is_over: bool,
}

impl Wait {
    /// Of a receiver.
    pub fn for_sender(channel: &str) -> Self {
        Self::new(
            format!("waiting for a sender on channel `{channel}`"),
            format!("waiting for the sender on channel `{channel}` to send something"),
        )
    }

    /// Of a sender.
    pub fn for_receiver(channel: &str) -> Self {
        Self::new(
            format!("channel `{channel}` is full: waiting for a receiver on it"),
            format!("channel `{channel}` is full: waiting for its receiver to go on"),
        )
    }

    fn new(away: String, held: String) -> Self {
        Wait {
            away,
            held,
            is_over: !io::stderr().is_terminal(),
        }
    }
}

/// See the module.
pub struct Meter<'a> {
    bar: ProgressBar,
    wait: &'a mut Wait,
    /// Whether it shows how far the stream is.
    visible: bool,
    shown: Instant,
    /// When the first record was there.
    start: Option<Instant>,
}

impl<'a> Meter<'a> {
    /// For a stream between a channel and `file`, of so many bytes if that is known. Where the file is a terminal, what
    /// it shows or is typed there is not drawn over.
    pub fn new(file: &impl IsTerminal, size: Option<u64>, wait: &'a mut Wait) -> Self {
        let visible = io::stderr().is_terminal() && !file.is_terminal();
        let bar = if visible {
            ProgressBar::new_spinner()
        } else {
            ProgressBar::hidden()
        };
        let template = match size {
            Some(_) => "{bytes} of {total_bytes} {wide_bar} {binary_bytes_per_sec}",
            None => "{bytes} {binary_bytes_per_sec}",
        };
        if let Some(size) = size {
            bar.set_length(size);
        }
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Meter {
            bar,
            wait,
            visible,
            shown: Instant::now(),
            start: None,
        }
    }

    /// At the end.
    pub fn finish(self, done: &str, total: &Progress, json: bool) {
        self.bar.finish_and_clear();
        let seconds = self
            .start
            .map_or(0.0, |start| start.elapsed().as_secs_f64());
        // Nobody may be there to be told.
        let mut told = io::stderr();
        if json {
            let summary = serde_json::json!({
                "bytes": total.bytes,
                "records": total.records,
                "dropped": total.dropped,
                "seconds": seconds,
            });
            let _ = writeln!(told, "{summary}");
        } else if self.visible {
            let rate = HumanBytes((total.bytes as f64 / seconds.max(1e-9)) as u64);
            let bytes = HumanBytes(total.bytes);
            let _ = writeln!(told, "{done} {bytes} in {seconds:.2} s, {rate}/s");
        }
        if total.dropped > 0 && !json {
            let records = match total.dropped {
                1 => "1 record was".to_owned(),
                count => format!("{} records were", HumanCount(count)),
            };
            let _ = writeln!(told, "{records} dropped, since the channel was full");
        }
    }
}

impl Watch for Meter<'_> {
    fn progress(&mut self, progress: &Progress) {
        let start = *self.start.get_or_insert_with(Instant::now);
        if !self.bar.is_hidden() && (self.shown.elapsed() >= INTERVAL || start > self.shown) {
            self.shown = Instant::now();
            self.bar.set_position(progress.bytes);
        }
    }

    fn patience(&self) -> Option<Duration> {
        (!self.wait.is_over).then_some(PATIENCE)
    }

    fn waits(&mut self, is_away: bool) {
        if std::mem::replace(&mut self.wait.is_over, true) {
            return;
        }
        let what = match is_away {
            true => &self.wait.away,
            false => &self.wait.held,
        };
        self.bar.suspend(|| {
            // Nobody may be there to be told.
            let _ = writeln!(io::stderr(), "{what} (Ctrl-C ends this)");
        });
    }
}
