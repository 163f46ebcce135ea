// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Command-line code that the programs `barlink` and `barlink-guest` share: parsing, streams, taps,
//! `peek` and `poke`, cache modes, errors and exit codes.

pub mod cache;
pub mod failure;
mod meter;
pub mod place;
pub mod size;
pub mod standard;
pub mod stream;
pub mod tail;
pub mod tap;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Command, Parser};

use crate::standard::OutputClosed;

/// Parses the command line. On an error, prints one line that describes it and ends the program.
pub fn parse<Cli: Parser>() -> Cli {
    Cli::try_parse().unwrap_or_else(|error| {
        let shows_help = [
            ErrorKind::DisplayHelp,
            ErrorKind::DisplayVersion,
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand,
        ];
        if shows_help.contains(&error.kind()) {
            error.exit();
        }
        let command = Cli::command();
        let program = command.get_name();
        let _ = writeln!(
            std::io::stderr(),
            "{program}: {} (see {} --help)",
            one_line(&error.to_string()),
            meant(&command, std::env::args_os().skip(1))
        );
        std::process::exit(error.exit_code());
    })
}

/// Returns the command whose help the user needs: the first subcommand among `words`, otherwise the
/// program.
fn meant(command: &Command, mut words: impl Iterator<Item = OsString>) -> String {
    let program = command.get_name();
    match words.find_map(|word| command.find_subcommand(word)) {
        Some(subcommand) => format!("{program} {}", subcommand.get_name()),
        None => program.to_owned(),
    }
}

/// Returns clap's description of an error as one line, without the usage and the reference to the
/// help.
fn one_line(error: &str) -> String {
    let lines = error.lines().map(str::trim);
    let lines =
        lines.take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let lines: Vec<_> = lines.filter(|line| !line.is_empty()).collect();
    let lines = lines.join("; ").replace(":; ", ": ");
    lines.strip_prefix("error: ").unwrap_or(&lines).to_owned()
}

/// Prints the error of a program, if any, as one line. Returns the program's exit code: 0 for
/// success or a standard output without a reader, otherwise the result of `exit_code`.
pub fn end(
    program: &str,
    outcome: anyhow::Result<()>,
    exit_code: impl FnOnce(&anyhow::Error) -> u8,
) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<OutputClosed>() => ExitCode::SUCCESS,
        Err(error) => {
            // `eprintln` would panic where standard error is closed.
            let _ = writeln!(std::io::stderr(), "{program}: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_points_to_subcommand_help() {
        let command = Command::new("program").subcommand(Command::new("serve"));
        let meant = |words: &[&str]| meant(&command, words.iter().map(OsString::from));
        assert_eq!(meant(&["serve", "--size", "x"]), "program serve");
        assert_eq!(meant(&["--what", "serve"]), "program serve");
        assert_eq!(meant(&["sreve"]), "program");
    }

    #[test]
    fn command_line_errors_take_one_line() {
        let cases = [
            (
                "error: invalid value 'x' for '--size <SIZE>': invalid size `x`\n\nFor more information, try '--help'.\n",
                "invalid value 'x' for '--size <SIZE>': invalid size `x`",
            ),
            (
                "error: the following required arguments were not provided:\n  --ivshmem <SOCKET>\n\nUsage: barlink serve\n",
                "the following required arguments were not provided: --ivshmem <SOCKET>",
            ),
            (
                "error: unexpected argument '--siz' found\n\n  tip: a similar argument exists: '--size'\n\nUsage: x\n",
                "unexpected argument '--siz' found; tip: a similar argument exists: '--size'",
            ),
        ];
        for (error, line) in cases {
            assert_eq!(one_line(error), line);
        }
    }
}
