// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command line, as text becomes types. Nothing is opened here.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Shared memory as a PCI device of a QEMU guest: the guest's side.
#[derive(Debug, Parser)]
#[command(name = "barlink-guest", version, arg_required_else_help = true, after_help = AFTER_HELP)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// The device
    #[arg(
        long,
        global = true,
        value_name = "DEVICE",
        default_value = "/dev/barlink0"
    )]
    pub device: PathBuf,
}

const AFTER_HELP: &str = "\
Exit codes:
  0    it worked; or the reader of its output has had enough
  1    it failed: the last line says what, on what, and what to do
  2    the command line is wrong
  3    there is no device, or it is gone
  4    somebody else holds that end of the channel
  5    the stream ended early: its sender left before its end
  130  interrupted by Ctrl-C";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Tell what the device is, and what cache mode the kernel granted to its mappings
    Info(Info),
    /// Send a file or standard input to the host
    #[command(
        after_help = "Example:\n  tar c logs | barlink-guest send    # on the host: barlink recv | tar x"
    )]
    Send(Send),
    /// Receive a stream from the host, to a file or standard output
    #[command(
        after_help = "Example:\n  barlink-guest recv | tar x         # on the host: tar c photos | barlink send"
    )]
    Recv(Recv),
    /// Send every record of one channel back through another, until its stream ends
    Echo(Echo),
    /// Send this guest's own load to the host, as lines of JSON: CPU, memory, interrupts
    #[command(
        after_help = "Example:\n  barlink-guest telemetry --seconds 10    # on the host: barlink recv"
    )]
    Telemetry(Telemetry),
    /// Print bytes of the raw window
    #[command(
        after_help = "Example:\n  barlink-guest peek --length 64\n  barlink-guest peek --raw --length 5"
    )]
    Peek(Peek),
    /// Write bytes into the raw window
    #[command(after_help = "Example:\n  barlink-guest poke hello")]
    Poke(Poke),
}

#[derive(Debug, Args)]
pub struct Info {
    /// Print it as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Send {
    /// The file; standard input if not given
    pub file: Option<PathBuf>,
    /// The channel
    #[arg(long, default_value = "up")]
    pub channel: String,
    /// Most bytes in a record; at most half the channel's size
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = parse_size)]
    pub record_size: u64,
    /// Print a summary as JSON to standard error
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Recv {
    /// The file; standard output if not given
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// The channel
    #[arg(long, default_value = "down")]
    pub channel: String,
    /// Go on with the next stream when one ends
    #[arg(long)]
    pub follow: bool,
    /// Print a summary as JSON to standard error
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Echo {
    /// The channel to read
    #[arg(long, default_value = "down")]
    pub from: String,
    /// The channel to write
    #[arg(long, default_value = "up")]
    pub to: String,
}

#[derive(Debug, Args)]
pub struct Telemetry {
    /// How long; for ever if not given
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<f64>,
    /// Records a second
    #[arg(long, value_name = "RATE", default_value_t = 100.0)]
    pub rate: f64,
    /// The channel
    #[arg(long, default_value = "up")]
    pub channel: String,
}

/// A place in the region.
#[derive(Debug, Args)]
pub struct Place {
    /// Offset in the raw window
    #[arg(long, value_name = "OFFSET", default_value = "0", value_parser = parse_size)]
    pub at: u64,
    /// Count OFFSET from the region's start instead
    #[arg(long)]
    pub region: bool,
}

#[derive(Debug, Args)]
pub struct Peek {
    /// How many bytes
    #[arg(long, default_value = "256", value_parser = parse_size)]
    pub length: u64,
    /// Print the bytes as they are, rather than a hex dump
    #[arg(long)]
    pub raw: bool,
    #[command(flatten)]
    pub place: Place,
}

#[derive(Debug, Args)]
pub struct Poke {
    /// The text; standard input if not given
    pub text: Option<String>,
    #[command(flatten)]
    pub place: Place,
}

/// Parses a size in bytes, with K, M, G (powers of 1024) if wanted.
fn parse_size(text: &str) -> Result<u64, String> {
    parse_size::Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|error| format!("`{text}` is no size: {error} (say 64M, 1G or a number of bytes)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
