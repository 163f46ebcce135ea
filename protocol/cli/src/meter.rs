// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Shows how far a stream is, on a terminal, and how it went.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use barlink_protocol::stream::Progress;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// Looking at the clock and the terminal at each record would be felt.
const INTERVAL: Duration = Duration::from_millis(100);

/// See the module.
pub struct Meter {
    bar: ProgressBar,
    /// Whether it shows anything.
    visible: bool,
    shown: Instant,
    /// When the first record was there.
    start: Option<Instant>,
}

impl Meter {
    /// For a stream between a channel and `file`, of so many bytes if that is known. Where the file is a terminal, what
    /// it shows or is typed there is not drawn over.
    pub fn new(file: &impl IsTerminal, size: Option<u64>) -> Self {
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
            visible,
            shown: Instant::now(),
            start: None,
        }
    }

    /// At each record.
    pub fn show(&mut self, progress: &Progress) {
        let start = *self.start.get_or_insert_with(Instant::now);
        if !self.bar.is_hidden() && (self.shown.elapsed() >= INTERVAL || start > self.shown) {
            self.shown = Instant::now();
            self.bar.set_position(progress.bytes);
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
    }
}
