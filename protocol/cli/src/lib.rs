// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Command-line code that the programs `barlink` and `barlink-guest` share: parsing, streams, taps,
//! `peek` and `poke`, cache modes, descriptions of channels, errors and exit codes.

pub mod cache;
pub mod channel;
mod command_line;
mod early;
pub mod echo;
pub mod failure;
mod meter;
pub mod notice;
pub mod place;
pub mod size;
pub mod standard;
pub mod stream;
pub mod tail;
pub mod tap;
pub mod unread;

use std::io::Write;
use std::process::ExitCode;

pub use command_line::parse;
pub use early::was_ignored;

use crate::standard::OutputClosed;

/// Prints the error of a program, if any, as one line. Returns the program's exit code: 0 for
/// success or a standard output without a reader, otherwise the result of `exit_code`.
pub fn end(
    program: &str,
    outcome: anyhow::Result<()>,
    exit_code: impl FnOnce(&anyhow::Error) -> u8,
) -> ExitCode {
    report(program, outcome, exit_code).into()
}

fn report(
    program: &str,
    outcome: anyhow::Result<()>,
    exit_code: impl FnOnce(&anyhow::Error) -> u8,
) -> u8 {
    match outcome.and_then(|()| standard::flush_output()) {
        Ok(()) => 0,
        Err(error) if error.is::<OutputClosed>() => 0,
        Err(error) => {
            // `eprintln` would panic where standard error is closed.
            let _ = writeln!(
                std::io::stderr(),
                "{program}: {}",
                visible(&format!("{error:#}"))
            );
            exit_code(&error)
        }
    }
}

/// Returns a text with its control characters escaped. A name from the command line can have line
/// feeds, or control the terminal.
fn visible(text: &str) -> String {
    let mut visible = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() {
            true => visible.extend(c.escape_default()),
            false => visible.push(c),
        }
    }
    visible
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_take_one_line() {
        assert_eq!(visible("no channel `a\nb`"), "no channel `a\\nb`");
        assert_eq!(visible("\x1b[2J caf\u{e9}"), "\\u{1b}[2J caf\u{e9}");
    }
}
