// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The parsing of the command line, and the description of its errors in one line.

use std::io::{IsTerminal, Write, stdout};

use anyhow::Context;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgMatches, Command, Parser};

use crate::notice;
use crate::standard::print;
use crate::{report, visible};

/// Parses the command line, and switches notices off if it has `--json`. On an error, prints one
/// line that describes it and ends the program.
pub fn parse<Cli: Parser>() -> Cli {
    let parsed = Cli::command().try_get_matches().and_then(|matches| {
        if is_json(&matches) {
            notice::silence();
        }
        Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut Cli::command()))
    });
    parsed.unwrap_or_else(|error| {
        let command = Cli::command();
        let program = command.get_name();
        let shows_help = [
            ErrorKind::DisplayHelp,
            ErrorKind::DisplayVersion,
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand,
        ];
        if shows_help.contains(&error.kind()) && !error.use_stderr() {
            std::process::exit(report(program, show(&error), |_| 1).into());
        }
        if shows_help.contains(&error.kind()) {
            error.exit();
        }
        let words = std::env::args_os().skip(1);
        let words: Vec<_> = words
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        let line = match value_tip(&command, &words, &error) {
            None => one_line(&error.to_string()),
            Some(tip) => {
                let text = error.to_string();
                let lines = text.lines();
                let mut lines: Vec<_> = lines
                    .filter(|line| !line.trim().starts_with("tip: to pass "))
                    .collect();
                // clap gives a tip only to commands that have other arguments.
                lines.insert(1, &tip);
                one_line(&lines.join("\n"))
            }
        };
        let _ = writeln!(
            std::io::stderr(),
            "{program}: {} (see {} --help)",
            visible(&line),
            meant(&command, &words)
        );
        std::process::exit(error.exit_code());
    })
}

/// Returns whether the command has the option `--json`, and was given it.
fn is_json(mut matches: &ArgMatches) -> bool {
    while let Some((_, inner)) = matches.subcommand() {
        matches = inner;
    }
    // A command without the option is an error here.
    matches!(matches.try_get_one("json"), Ok(Some(true)))
}

/// Prints the help or the version to standard output.
fn show(error: &clap::Error) -> anyhow::Result<()> {
    if !stdout().is_terminal() {
        return print(error.to_string());
    }
    // In colour.
    let printed = error.print().and_then(|()| stdout().flush());
    printed.context("cannot write to standard output")
}

/// Returns the command whose help the user needs: the last subcommand among `words`, otherwise the
/// program.
fn meant(command: &Command, words: &[String]) -> String {
    let path = subcommands(command, words);
    let names: Vec<_> = path.iter().map(|command| command.get_name()).collect();
    names.join(" ")
}

/// Finds the subcommands that `words` name. The program is the first of them.
fn subcommands<'a>(command: &'a Command, words: &[String]) -> Vec<&'a Command> {
    let mut path = vec![command];
    let mut last = command;
    for word in words {
        if let Some(found) = last.find_subcommand(word) {
            path.push(found);
            last = found;
        }
    }
    path
}

/// Returns a tip for the value of an option that looks like an option itself, as in `--count -1`.
/// clap's own tip, to put `--` before it, is right for other arguments only.
fn value_tip(command: &Command, words: &[String], error: &clap::Error) -> Option<String> {
    let Some(ContextValue::String(unexpected)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let at = words.iter().position(|word| word.starts_with(unexpected))?;
    let (option, value) = (&words[at.checked_sub(1)?], &words[at]);
    let path = subcommands(command, words);
    let mut arguments = path.iter().flat_map(|command| command.get_arguments());
    let takes_value = arguments.any(|argument| {
        let short = argument.get_short().map(|short| format!("-{short}"));
        let long = argument.get_long().map(|long| format!("--{long}"));
        let is_meant = [short, long].contains(&Some(option.clone()));
        is_meant && argument.get_action().takes_values()
    });
    takes_value.then(|| format!("tip: to pass '{value}' as a value, use '{option}={value}'"))
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

#[cfg(test)]
mod tests {
    use clap::Arg;

    use super::*;

    #[test]
    fn error_points_to_subcommand_help() {
        let command = Command::new("program").subcommand(Command::new("serve"));
        let meant = |words: &[&str]| {
            meant(
                &command,
                &words.iter().map(ToString::to_string).collect::<Vec<_>>(),
            )
        };
        assert_eq!(meant(&["serve", "--size", "x"]), "program serve");
        assert_eq!(meant(&["--what", "serve"]), "program serve");
        assert_eq!(meant(&["sreve"]), "program");
    }

    #[test]
    fn tip_for_value_of_option_names_option() {
        let command = Command::new("program").subcommand(
            Command::new("tail")
                .arg(Arg::new("count").short('n').long("count"))
                .arg(
                    Arg::new("json")
                        .long("json")
                        .num_args(0)
                        .action(clap::ArgAction::SetTrue),
                )
                .arg(Arg::new("file")),
        );
        let tip = |words: &[&str]| {
            let words: Vec<_> = words.iter().map(ToString::to_string).collect();
            let all = std::iter::once("program".to_owned()).chain(words.clone());
            let error = command.clone().try_get_matches_from(all).unwrap_err();
            value_tip(&command, &words, &error)
        };
        let text = |option| Some(format!("tip: to pass '-1' as a value, use '{option}=-1'"));
        assert_eq!(tip(&["tail", "--count", "-1"]), text("--count"));
        assert_eq!(tip(&["tail", "-n", "-1"]), text("-n"));
        assert_eq!(tip(&["tail", "--json", "-1"]), None);
        assert_eq!(tip(&["tail", "-1"]), None);
    }

    #[test]
    fn json_is_option_of_last_subcommand() {
        let json = Arg::new("json")
            .long("json")
            .action(clap::ArgAction::SetTrue);
        let list = Command::new("list").arg(json.clone());
        let command = Command::new("program")
            .subcommand(Command::new("channel").subcommand(list))
            .subcommand(Command::new("info").arg(json))
            .subcommand(Command::new("echo").arg(Arg::new("from")));
        let is_json = |words: &[&str]| {
            let words = std::iter::once(&"program").chain(words);
            is_json(&command.clone().try_get_matches_from(words).unwrap())
        };
        assert!(is_json(&["info", "--json"]));
        assert!(is_json(&["channel", "list", "--json"]));
        for words in [&["info"][..], &["channel", "list"], &["echo", "json"], &[]] {
            assert!(!is_json(words), "{words:?}");
        }
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
