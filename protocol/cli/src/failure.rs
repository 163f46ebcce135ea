// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Errors that have an exit code of their own, as the help of both programs documents it.

use std::fmt::{Display, Formatter};
use std::time::Duration;

/// The stream ended early, because its sender left.
pub(crate) const INCOMPLETE: u8 = 5;
/// The stream is not whole.
pub(crate) const MISSING: u8 = 6;
/// Nothing moved within `--timeout`.
pub(crate) const TIMED_OUT: u8 = 7;

/// The broker is gone, and no program has received the records or bytes.
pub(crate) const UNREAD: u8 = 8;

/// The remedy for a stream whose channel was reset.
pub(crate) const RESET_CURE: &str =
    "and the rest of the stream is lost: end the programs at both ends, and send it again";

/// Error of a stream that has an exit code of its own.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) text: String,
    pub(crate) code: u8,
}

impl Display for Failure {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Failure {}

/// Returns the error of a command that sent something that no program has received, because the
/// broker is gone.
pub(crate) fn unread(text: &str) -> anyhow::Error {
    let text = text.to_owned();
    let code = UNREAD;
    Failure { text, code }.into()
}

/// Returns the error of a command that forwards records, of which some were missing before it got
/// them, or had to be dropped because the next channel was full.
pub(crate) fn records_lost(missed: u64, dropped: u64) -> anyhow::Error {
    let records = |count| match count {
        1 => "1 record was".to_owned(),
        count => format!("{count} records were"),
    };
    let missed = (missed > 0).then(|| format!("{} missing when they came", records(missed)));
    let dropped =
        (dropped > 0).then(|| format!("{} dropped because the channel was full", records(dropped)));
    let texts: Vec<_> = missed.into_iter().chain(dropped).collect();
    let (text, code) = (texts.join(", and "), MISSING);
    Failure { text, code }.into()
}

/// Returns the error of a command whose `--timeout` is over.
pub fn timed_out(timeout: Duration) -> anyhow::Error {
    let seconds = timeout.as_secs_f64();
    let text = format!("nothing moved through the channel for {seconds} s");
    let code = TIMED_OUT;
    Failure { text, code }.into()
}

/// Returns the exit code of an error, if the error has one of its own.
pub fn exit_code(error: &anyhow::Error) -> Option<u8> {
    error.downcast_ref::<Failure>().map(|failure| failure.code)
}
