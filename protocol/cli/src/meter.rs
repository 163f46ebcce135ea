// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The progress of a stream on a terminal: its bytes, a message while it waits for the other end,
//! and a summary.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use barlink::stream::{Misplaced, StreamError};
use barlink_protocol::stream::{Progress, Watch};
use indicatif::{BinaryBytes, HumanCount, ProgressBar, ProgressStyle};

use crate::notice::{broker_ended, is_silent, tell};

/// Time between two updates. An update at each record would slow the stream down.
const INTERVAL: Duration = Duration::from_millis(100);

/// Text about a stream that was taken up in its middle.
pub(crate) const NO_BEGINNING: &str = "the beginning of the stream is missing";

/// Time for which a stream waits for the other end before it shows a message.
const MESSAGE_AFTER: Duration = Duration::from_secs(1);

/// A message on the terminal that the stream waits for the other end. It is shown at most once.
pub struct Wait {
    /// Message if no process holds the other end.
    away: String,
    /// Message if a process holds the other end.
    held: String,
    /// Whether no message follows: one was shown, standard error is not a terminal, or it is for
    /// JSON.
    is_over: bool,
}

impl Wait {
    /// Creates the messages of a receiver, which waits for a sender.
    pub fn for_sender(channel: &str) -> Self {
        Self::new(
            format!("waiting for a sender on channel `{channel}`"),
            format!("waiting for the sender on channel `{channel}` to send something"),
        )
    }

    /// Creates the messages of a sender, which waits for a receiver.
    pub fn for_receiver(channel: &str) -> Self {
        Self::new(
            format!("channel `{channel}` has no room for a record: waiting for a receiver on it"),
            format!("channel `{channel}` has no room for a record: waiting for its receiver"),
        )
    }

    fn new(away: String, held: String) -> Self {
        Wait {
            away,
            held,
            is_over: is_silent() || !io::stderr().is_terminal(),
        }
    }
}

/// The display of one stream's progress.
pub struct Meter<'a> {
    bar: ProgressBar,
    wait: &'a mut Wait,
    /// Whether the progress is shown.
    visible: bool,
    shown: Instant,
    /// Time of the first record.
    start: Option<Instant>,
    timeout: Option<Duration>,
    /// Whether the summary is printed as JSON, and nothing else.
    json: bool,
    /// The progress as last seen.
    progress: Progress,
    /// Whether the source has become longer while it was sent.
    has_grown: bool,
}

impl<'a> Meter<'a> {
    /// Creates the meter of a stream between a channel and `file`. `size` is the number of bytes of
    /// the stream, if it is known. If the file is a terminal, the meter shows nothing, because it
    /// would draw over the text of the stream, and neither with JSON. The stream ends after a
    /// `timeout` without a record.
    pub fn new(
        file: &impl IsTerminal,
        size: Option<u64>,
        timeout: Option<Duration>,
        json: bool,
        wait: &'a mut Wait,
    ) -> Self {
        let visible = !json && io::stderr().is_terminal() && !file.is_terminal();
        let bar = if visible {
            ProgressBar::new_spinner()
        } else {
            ProgressBar::hidden()
        };
        let template = match size {
            Some(_) => "{binary_bytes} of {binary_total_bytes} {wide_bar} {binary_bytes_per_sec}",
            None => "{binary_bytes} {binary_bytes_per_sec}",
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
            timeout,
            json,
            progress: Progress::default(),
            has_grown: false,
        }
    }

    /// Returns whether the source has become longer while it was sent.
    pub fn has_grown(&self) -> bool {
        self.has_grown
    }

    /// Removes the progress bar and prints the summary to standard error.
    pub fn finish(self, done: &str, total: &Progress) {
        self.bar.finish_and_clear();
        if self.json {
            let is_whole = total.dropped == 0 && !total.headless && !total.went_back;
            return self.print_json(total, is_whole);
        }
        if self.visible {
            let seconds = self.seconds();
            let rate = BinaryBytes((total.bytes as f64 / seconds.max(1e-9)) as u64);
            let bytes = BinaryBytes(total.bytes);
            tell(&format!("{done} {bytes} in {seconds:.2} s, {rate}/s"));
        }
        if total.headless {
            tell(NO_BEGINNING);
        }
        if total.went_back {
            tell("the numbers of the records went back: some records may have come twice");
        }
    }

    /// Removes the progress bar, and prints the summary of a stream that ended early or is not
    /// whole to standard error.
    pub fn fail(self, error: &StreamError) {
        let mut total = match error {
            StreamError::Missing(total)
            | StreamError::Shrunk {
                progress: total, ..
            }
            | StreamError::BeginDropped(total)
            | StreamError::EndDropped(total)
            | StreamError::Close {
                progress: total, ..
            } => *total,
            _ => self.progress,
        };
        let misplaced = match error {
            StreamError::Misplaced(misplaced) => Some(misplaced),
            _ => None,
        };
        total.headless |= misplaced == Some(&Misplaced::NoBeginning);
        total.went_back |= matches!(misplaced, Some(Misplaced::WentBack { .. }));
        self.bar.finish_and_clear();
        if self.json {
            self.print_json(&total, false);
        } else if !matches!(error, StreamError::Missing(_))
            && let Some(text) = dropped_text(total.dropped)
        {
            tell(&text);
        }
    }

    /// Removes the progress bar, and prints the summary of a stream that was moved, and that its
    /// file or its receiver does not get.
    pub fn spoil(self, total: &Progress) {
        self.bar.finish_and_clear();
        if self.json {
            self.print_json(total, false);
        }
    }

    /// Returns the time since the first record.
    fn seconds(&self) -> f64 {
        self.start
            .map_or(0.0, |start| start.elapsed().as_secs_f64())
    }

    fn print_json(&self, total: &Progress, is_whole: bool) {
        let mut summary = serde_json::json!({
            "bytes": total.bytes,
            "records": total.records,
            "dropped": total.dropped,
            "seconds": self.seconds(),
            "beginning": !total.headless,
            "in_order": !total.went_back,
            "complete": is_whole,
        });
        if self.has_grown {
            summary["grown"] = true.into();
        }
        // The error is ignored because standard error may be closed.
        let _ = writeln!(io::stderr(), "{summary}");
    }
}

/// Returns the text about records that were dropped, if there are any.
pub(crate) fn dropped_text(dropped: u64) -> Option<String> {
    let records = match dropped {
        0 => return None,
        1 => "1 record was".to_owned(),
        count => format!("{} records were", HumanCount(count)),
    };
    Some(format!("{records} dropped because the channel was full"))
}

impl Watch for Meter<'_> {
    fn progress(&mut self, progress: &Progress) {
        self.progress = *progress;
        let start = *self.start.get_or_insert_with(Instant::now);
        if !self.bar.is_hidden() && (self.shown.elapsed() >= INTERVAL || start > self.shown) {
            self.shown = Instant::now();
            self.bar.set_position(progress.bytes);
        }
    }

    fn report_after(&self) -> Option<Duration> {
        (!self.wait.is_over).then_some(MESSAGE_AFTER)
    }

    fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    fn source_has_grown(&mut self) {
        self.has_grown = true;
    }

    fn broker_ended(&mut self) {
        broker_ended();
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
            tell(&format!("{what} (press Ctrl-C to stop)"));
        });
    }
}
