// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command line of `barlink-guest`, parsed into types. This module opens no files.

use std::path::PathBuf;
use std::time::Duration;

use barlink::guest;
use barlink_cli::size::{parse_size, parse_time};
use barlink_cli::{place, stream, tail};
use clap::builder::PossibleValue;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Shared memory as a PCI device of a QEMU guest: the guest's side.
#[derive(Debug, Parser)]
#[command(name = "barlink-guest", version, arg_required_else_help = true, after_help = AFTER_HELP)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// Name of the broker whose device it is, or path of the device. A text without a `/` is a
    /// name. Names and the links in /dev/barlink/by-name and by-path stay with a device when
    /// numbers change. sysfs:0000:01:00.0 is the device at that PCI address without its driver;
    /// vfio:0000:01:00.0 the same by VFIO, for one program at a time [default: /dev/barlink0, with
    /// a warning if there are further devices, or where that is missing the only device without a
    /// driver]
    #[arg(long, global = true, help_heading = "Device", value_name = "DEVICE")]
    pub device: Option<PathBuf>,
    /// Cache mode of the device's mapping; all processes have the same mode at a time [default:
    /// auto]
    #[arg(
        long,
        global = true,
        help_heading = "Device",
        value_name = "MODE",
        value_enum
    )]
    pub cache: Option<Cache>,
}

/// A cache mode of the command line: one of the library's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cache(pub guest::Cache);

impl Cache {
    const ALL: [Cache; guest::Cache::ALL.len()] = {
        let mut all = [Cache(guest::Cache::Same); guest::Cache::ALL.len()];
        let mut index = 0;
        while index < all.len() {
            all[index] = Cache(guest::Cache::ALL[index]);
            index += 1;
        }
        all
    };

    fn help(self) -> &'static str {
        match self.0 {
            guest::Cache::Same => {
                "Mode of the existing mappings of any process; noncached if there are none"
            }
            guest::Cache::Noncached => "Each access goes over the bus; shown as uncached-minus",
            guest::Cache::WriteCombining => {
                "Stores are combined, loads are noncached; shown as write-combining"
            }
            guest::Cache::WriteBack => {
                "As ordinary memory; needs a device above 4 GiB, otherwise uncached-minus is shown"
            }
            guest::Cache::Auto => {
                "Noncached unless a measurement of a few ms finds a mode more than twice as fast; `same` if the region is mapped"
            }
            _ => "Mode that this program does not describe",
        }
    }
}

impl ValueEnum for Cache {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.0.name()).help(self.help()))
    }
}

const AFTER_HELP: &str = "\
Start here:
  barlink-guest info
  barlink-guest recv > stream        # on the host: barlink send < stream

Exit codes:
  0    success, or the reader of standard output closed it
  1    failure: the last line says what failed and what to do
  2    invalid command line
  3    no device, or the device is gone or has lost its region
  4    another process holds the end of the channel or the DMA buffer, or has the device mapped in
       another cache mode; or a driver has the device that sysfs:… or vfio:… names, or by vfio:…
       another program
  5    the stream ended early: the sender left before its end
  6    the stream is not whole: `recv` found that records were dropped or missed (--tap), or that
       the beginning is missing (--partial); `send`, `telemetry` or `echo` had to drop records;
       the file of `send` became shorter; `echo` missed records
  7    no record came, or there was no room for one, within --timeout
  8    the broker is gone or does not answer, and no program has received what was sent
  130  interrupted by Ctrl-C";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Describe the device, the requested cache mode and the granted one; takes 10 s if the broker
    /// does not answer
    #[command(
        after_help = "Example:\n  barlink-guest --cache write-back info    # shows whether it is granted, and if not, why and what to do"
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
    /// Show the records of a channel as they come, without receiving them: time (and its clock,
    /// unless that is the sender's monotonic one), kind, number, length and content
    #[command(
        after_help = "Example:\n  barlink-guest tail down --latest    # while another program receives from `down`"
    )]
    Tail(Tail),
    /// Send every record of one channel back through another, until the stream ends
    #[command(
        after_help = "Example:\n  barlink-guest echo    # on the host: barlink send FILE & barlink recv | cmp - FILE"
    )]
    Echo(Echo),
    /// Send this guest's load (CPU, memory, interrupts) to the host, as lines of JSON
    #[command(
        after_help = "Example:\n  barlink-guest telemetry --seconds 10    # on the host: barlink recv"
    )]
    Telemetry(Telemetry),
    /// Fill a DMA buffer in this guest's memory, print its address, and keep it until interrupted
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
    #[command(
        after_help = "Example:\n  barlink-guest poke hello\n  barlink-guest poke --at 4K < image.bin"
    )]
    Poke(place::Poke),
}

#[derive(Debug, Args)]
pub struct Info {
    /// Print the description as JSON; standard error then has errors and nothing else
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Send {
    /// Name of the channel
    #[arg(long, default_value = "up")]
    pub channel: String,
    #[command(flatten)]
    pub stream: stream::Send,
}

#[derive(Debug, Args)]
pub struct Recv {
    /// Name of the channel
    #[arg(long, default_value = "down")]
    pub channel: String,
    #[command(flatten)]
    pub stream: stream::Recv,
}

#[derive(Debug, Args)]
pub struct Tail {
    /// Name of the channel
    #[arg(default_value = "down")]
    pub channel: String,
    #[command(flatten)]
    pub tail: tail::Tail,
}

#[derive(Debug, Args)]
pub struct Echo {
    /// Name of the channel to receive from
    #[arg(long, default_value = "down")]
    pub from: String,
    /// Name of the channel to send to
    #[arg(long, default_value = "up")]
    pub to: String,
    /// End if no record comes, or if there is no room for one, for so long: seconds, or a number
    /// with the unit ms, s, m or h [default: no limit]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub timeout: Option<Duration>,
}

#[derive(Debug, Args)]
pub struct Buffer {
    /// Size of the buffer, in whole pages, at most 4M: bytes, or a number with the unit K or M
    /// (powers of 1024)
    #[arg(long, default_value = "64K", value_parser = parse_size)]
    pub size: u64,
    /// File with the content of the buffer [default: standard input]
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Telemetry {
    /// Duration in seconds [default: until interrupted]
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<f64>,
    /// Records a second
    #[arg(long, value_name = "RATE", default_value = "100", value_parser = parse_rate)]
    pub rate: f64,
    /// Name of the channel
    #[arg(long, default_value = "up")]
    pub channel: String,
    /// End if the channel has no room for a record for so long: seconds, or a number with the unit
    /// ms, s, m or h [default: no limit]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub timeout: Option<Duration>,
}

/// Parses a rate in records per second, whose period must be a valid `Duration`.
fn parse_rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text
        .parse()
        .map_err(|_| format!("invalid rate `{text}`: use a number, such as 100"))?;
    match std::time::Duration::try_from_secs_f64(1.0 / rate) {
        Ok(_) if rate.is_finite() => Ok(rate),
        _ => Err(format!(
            "invalid rate `{text}`: use a number above 0, such as 100"
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
    fn rejects_rates_without_period() {
        assert_eq!(parse_rate("0.5"), Ok(0.5));
        for text in ["0", "-1", "1e-30", "inf", "nan", "x"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }
}
