// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command line, as text becomes types. Nothing is opened here.

use std::path::PathBuf;

use barlink_cli::size::parse_size;
use barlink_cli::{place, stream};
use clap::{Args, Parser, Subcommand, ValueEnum};

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
        help_heading = "Device",
        value_name = "DEVICE",
        default_value = "/dev/barlink0"
    )]
    pub device: PathBuf,
    /// Cache mode of its mapping, one for all processes at a time
    #[arg(
        long,
        global = true,
        help_heading = "Device",
        value_name = "MODE",
        value_enum,
        default_value_t
    )]
    pub cache: Cache,
}

/// The cache modes, as the command line names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// As the region's mappings that live, whosever they are; noncached if there are none
    #[default]
    Same,
    /// Noncached: each access is one of the bus's; shown as uncached-minus
    Noncached,
    /// Write-combining: stores are gathered, loads are as noncached ones; shown so
    WriteCombining,
    /// Write-back, as the guest's own memory; needs a device above 4 GiB, else uncached-minus is shown
    WriteBack,
    /// The fastest that the guest's kernel grants, by a short measurement; `same` if the region is mapped
    Auto,
}

impl From<Cache> for barlink::guest::Cache {
    fn from(cache: Cache) -> Self {
        match cache {
            Cache::Same => Self::Same,
            Cache::Noncached => Self::Noncached,
            Cache::WriteCombining => Self::WriteCombining,
            Cache::WriteBack => Self::WriteBack,
            Cache::Auto => Self::Auto,
        }
    }
}

const AFTER_HELP: &str = "\
Exit codes:
  0    it worked; or the reader of its output has had enough
  1    it failed: the last line says what, on what, and what to do
  2    the command line is wrong
  3    there is no device, or it is gone
  4    somebody else holds that end of the channel, or has the device mapped in another cache mode,
       or has its DMA buffer
  5    the stream ended early: its sender left before its end
  130  interrupted by Ctrl-C";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Tell what the device is, and which cache mode was asked for, and granted
    #[command(
        after_help = "Example:\n  barlink-guest --cache write-back info    # is it granted? if not, why, and what to do"
    )]
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
    #[command(
        after_help = "Example:\n  barlink-guest echo    # on the host: barlink send FILE & barlink recv | cmp - FILE"
    )]
    Echo(Echo),
    /// Send this guest's own load to the host, as lines of JSON: CPU, memory, interrupts
    #[command(
        after_help = "Example:\n  barlink-guest telemetry --seconds 10    # on the host: barlink recv"
    )]
    Telemetry(Telemetry),
    /// Fill a DMA buffer, memory of this guest that the device can reach, say where it is, and keep it until interrupted
    #[command(
        after_help = "Example:\n  date | barlink-guest buffer    # on the host: barlink peek --guest 0 --buffer"
    )]
    Buffer(Buffer),
    /// Print bytes of the raw window
    #[command(
        after_help = "Example:\n  barlink-guest peek --length 64\n  barlink-guest peek --raw --length 5"
    )]
    Peek(place::Peek),
    /// Write bytes into the raw window
    #[command(after_help = "Example:\n  barlink-guest poke hello")]
    Poke(place::Poke),
}

#[derive(Debug, Args)]
pub struct Info {
    /// Print it as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Send {
    /// The channel
    #[arg(long, default_value = "up")]
    pub channel: String,
    #[command(flatten)]
    pub stream: stream::Send,
}

#[derive(Debug, Args)]
pub struct Recv {
    /// The channel
    #[arg(long, default_value = "down")]
    pub channel: String,
    #[command(flatten)]
    pub stream: stream::Recv,
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
pub struct Buffer {
    /// Bytes in the buffer, whole pages; K and M are powers of 1024
    #[arg(long, default_value = "64K", value_parser = parse_size)]
    pub size: u64,
    /// What to fill it with; standard input if not given
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Telemetry {
    /// How long; for ever if not given
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<f64>,
    /// Records a second
    #[arg(long, value_name = "RATE", default_value = "100", value_parser = parse_rate)]
    pub rate: f64,
    /// The channel
    #[arg(long, default_value = "up")]
    pub channel: String,
}

/// Parses a rate of which one period can be waited for.
fn parse_rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|_| format!("`{text}` is no number"))?;
    match std::time::Duration::try_from_secs_f64(1.0 / rate) {
        Ok(_) if rate.is_finite() => Ok(rate),
        _ => Err(format!(
            "`{text}` is no rate: take a number above 0, say 100"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn cache_modes_have_the_names_of_the_library() {
        for cache in Cache::value_variants() {
            let value = cache.to_possible_value().unwrap();
            assert_eq!(value.get_name(), barlink::guest::Cache::from(*cache).name());
        }
    }

    #[test]
    fn rejects_rates_without_period() {
        assert_eq!(parse_rate("0.5"), Ok(0.5));
        for text in ["0", "-1", "1e-30", "inf", "nan", "x"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }
}
