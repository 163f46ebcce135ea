// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command line of `barlink`, parsed into types. This module opens no files and no sockets.

use std::path::PathBuf;

use barlink_broker::broker::{BROKER_NAME_BYTES, ChannelPlan, Reserve};
use barlink_cli::size::parse_size;
use barlink_cli::{place, stream, tail};
use clap::{ArgMatches, Args, FromArgMatches, Parser, Subcommand};

/// Shared memory as a PCI device of a QEMU guest: the host's side.
#[derive(Debug, Parser)]
#[command(name = "barlink", version, arg_required_else_help = true, after_help = AFTER_HELP)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

const AFTER_HELP: &str = "\
Start here:
  barlink serve --ivshmem /tmp/vm.sock --size 64M &
  qemu-system-x86_64 -machine q35 ... $(barlink qemu-args)
  barlink recv > stream        # while the guest runs: barlink-guest send < stream

Exit codes:
  0    success, or the reader of standard output closed it
  1    failure: the last line says what failed and what to do
  2    invalid command line
  3    no broker, or one that has ended, is of another release, or rejected this process
  4    another process holds the end of the channel or has replaced the broker first, or the
       broker is busy: try again
  5    the stream ended early: the sender left before its end
  6    the stream is not whole: `recv` found that records were dropped or missed (--tap), or that
       the beginning is missing (--partial); `send` had to drop records, or its file became
       shorter
  7    no record came, or there was no room for one, within --timeout
  8    the broker has ended, and no program is known to have received what was sent
  130  interrupted by Ctrl-C; `serve` ends with 0 then

Environment (an empty variable counts as not set):
  RUST_LOG         lines of the log: off, error, warn, info, debug or trace. By default `serve` logs
                   info, the other commands warn
  RUST_LOG_STYLE   auto, always or never: colors of the log
  NO_COLOR         no colors
  TERM             no colors in the log of `serve` if it is dumb
  XDG_RUNTIME_DIR  folder of the control sockets; see --name";

const AFTER_SERVE: &str = "\
Example:
  barlink serve --ivshmem /tmp/vm.sock --size 64M \\
      --channel camera=up,16M,drop --channel commands=down,64K

Environment (an empty variable counts as not set):
  RUST_LOG         lines of the log: off, error, warn, info (the default), debug or trace. debug adds
                   host apps that come and go
  RUST_LOG_STYLE   auto, always or never: colors of the log
  NO_COLOR         no colors
  TERM             no colors if it is dumb
  XDG_RUNTIME_DIR  folder of the control socket; see --name

Set by systemd, or by another service manager:
  NOTIFY_SOCKET    receives notices and descriptors to store
  FDSTORE          number of descriptors that the manager stores. 0 means that it stores none
  LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES
                   the stored descriptors, of a predecessor
  SYSTEMD_EXEC_PID the process that is the service
  MAINPID          set for a check before a reload
  JOURNAL_STREAM   the journal, whose lines need no time";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a region to VMs and host apps, until interrupted
    #[command(after_help = AFTER_SERVE)]
    Serve(Serve),
    /// Send a file or standard input to a guest
    #[command(
        after_help = "Example:\n  tar c photos | barlink send    # in the guest: barlink-guest recv | tar x"
    )]
    Send(Send),
    /// Receive a stream from a guest, to a file or standard output
    #[command(
        after_help = "Example:\n  barlink recv | tar x           # in the guest: tar c logs | barlink-guest send"
    )]
    Recv(Recv),
    /// Show the records of a channel as they come, without receiving them: time (and its clock,
    /// unless that is the sender's monotonic one), kind, number, length and content
    #[command(
        after_help = "Example:\n  barlink tail up --latest       # while another program receives from `up`"
    )]
    Tail(Tail),
    /// Show a region while it is in use: its VMs and host apps, its channels, and its bytes
    #[command(
        after_help = "Records count from the channel's last reset, without the marks at the beginning and end of a stream.\n\n\
                            Age is the time since the newest record or mark. It is exact if the sender is on this host.\n\
                            A guest has another clock, so for its channels the live view shows the time for which it\n\
                            has seen no new record itself, as in `≥12 s`, and --once and --json show nothing.\n\n\
                            Keys:\n  arrows, page up, page down, home, end   move through the bytes\n  \
                            tab                                     next part of the region\n  \
                            q, Esc, Ctrl-C                          quit\n\n\
                            Example:\n  barlink inspect --once"
    )]
    Inspect(Inspect),
    /// List the brokers that this user can reach by their names
    #[command(
        after_help = "The list has the brokers whose control sockets are in barlink/ in $XDG_RUNTIME_DIR,\n\
                            /run/user/UID and /run, and leaves out those with another --control socket.\n\n\
                            Example:\n  barlink list"
    )]
    List(List),
    /// Print bytes of the raw window, or of a guest's memory
    #[command(
        after_help = "Example:\n  barlink peek --length 64\n  barlink peek --raw --length 5\n  \
                            barlink peek --guest 0 --buffer    # in the guest: date | barlink-guest buffer"
    )]
    Peek(Peek),
    /// Write bytes into the raw window
    #[command(after_help = "Example:\n  barlink poke hello\n  barlink poke --at 4K < image.bin")]
    Poke(Poke),
    /// Empty a channel while no process holds its ends; records that were not received are lost
    #[command(
        after_help = "A guest whose VMM lost its connection, or whose device was reset, holds its ends until its driver\n\
                            is there again, or the process of the VMM has ended.\n\n\
                            Example:\n  barlink reset-channel up"
    )]
    ResetChannel(ResetChannel),
    /// Add a channel to a region that is in use, or list its channels
    #[command(
        after_help = "Example:\n  barlink channel add lidar=up,8M,drop\n  barlink channel list"
    )]
    Channel(Channel),
    /// Print the QEMU arguments, or the libvirt elements, that add the device to a VM
    #[command(
        after_help = "Example:\n  qemu-system-x86_64 -machine q35 -m 2G ... $(barlink qemu-args)\n\n\
                            Do not add reconnect-ms to the chardev: QEMU's ivshmem then hangs at start."
    )]
    QemuArgs(QemuArgs),
    /// Remove the files of a broker's sockets; `serve` starts it
    #[command(hide = true)]
    RemoveSockets { files: Vec<PathBuf> },
}

/// Selection of a broker.
#[derive(Clone, Debug, Args)]
#[group(multiple = false)]
pub struct Which {
    /// Name of the broker. `serve` makes its control socket barlink/NAME.sock in $XDG_RUNTIME_DIR,
    /// or in /run for root if that is not set; the other commands look there, in /run/user/UID and
    /// in /run
    #[arg(long, value_name = "NAME", default_value = "default", value_parser = parse_name)]
    pub name: String,
    /// Path of the broker's control socket, instead of a name
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    pub sockets: Sockets,
    /// Size of the region, a power of two: bytes, or a number with the unit K, M or G (powers of
    /// 1024)
    #[arg(long, default_value = "64M", value_parser = parse_size)]
    pub size: u64,
    /// Add a channel; can be repeated: NAME=DIRECTION,SIZE[,POLICY]. DIRECTION is up (slot 0 to
    /// host), down (host to slot 0), or FROM-TO with slot numbers or `host`. SIZE is a power of
    /// two, 4K or more. POLICY is for a channel that is full: with `wait`, the default, the sender
    /// waits; with `drop` it drops its record; with `overwrite` it writes over the oldest records.
    /// Such a channel has no receiver, but taps (`recv --tap`, `tail`), and its DIRECTION is up,
    /// down or FROM-taps. By default, slot 0 has `up` and `down`, slot 1 has `up1` and `down1`, and
    /// so on, as large as fits. Sizes are powers of two, so about half of the region then belongs
    /// to no channel: it is the raw window, for `peek` and `poke`. Channels of different sizes use
    /// more of it: --channel up=up,32M --channel down=down,16M for 64M
    #[arg(long, value_name = "CHANNEL")]
    pub channel: Vec<ChannelPlan>,
    /// Keep room for channels that `barlink channel add` makes while VMs and host apps go on:
    /// SIZE,VECTORS. A channel takes its size and 4K more. VECTORS are added to those of each peer,
    /// so that as many new channels have a vector of their own. Without further vectors, new
    /// channels share those of the others. With --vectors, channels of --channel may use reserved
    /// vectors
    #[arg(long, value_name = "RESERVE")]
    pub reserve: Option<Reserve>,
    /// Number of interrupt vectors of each peer, at most 256 [default: one for each channel, and
    /// one more]
    #[arg(long, value_name = "COUNT", default_value_t = 0, hide_default_value = true,
          value_parser = clap::value_parser!(u32).range(0..=256))]
    pub vectors: u32,
    /// Admit processes of this user, by name or number, besides the broker's own user and root; can
    /// be repeated. Every user can then see the sockets, but the broker rejects other users
    #[arg(long, value_name = "USER")]
    pub allow_user: Vec<String>,
    /// Admit processes of this group, by name or number, as --allow-user does for a user. A process
    /// belongs to the groups that it had when it connected
    #[arg(long, value_name = "GROUP")]
    pub allow_group: Vec<String>,
    /// Admit host apps of this user, by name or number, for reading only; can be repeated. They can
    /// use `tail`, `recv --tap`, `recv --latest`, `inspect`, `channel list`, `peek` and taps in
    /// programs. They cannot claim an end of a channel, write, or connect to the sockets for VMs
    #[arg(long, value_name = "USER")]
    pub allow_reader: Vec<String>,
    /// Admit host apps of this group for reading only, as --allow-reader does for a user
    #[arg(long, value_name = "GROUP")]
    pub allow_reader_group: Vec<String>,
    /// Let host apps read copies of the memory of guests that use vfio-user. QEMU needs -object
    /// memory-backend-memfd,id=ram,share=on,size=SIZE -machine memory-backend=ram
    #[arg(long)]
    pub guest_memory: bool,
    /// Check the arguments, and whether they fit the running broker, then exit. Changes nothing
    #[arg(long, conflicts_with = "replace")]
    pub check: bool,
    /// Replace the running broker that has the same arguments, without a break for VMs and host
    /// apps. If the broker is a systemd service, use `systemctl restart` instead
    #[arg(long)]
    pub replace: bool,
    #[command(flatten)]
    pub which: Which,
}

/// The sockets for VMs.
#[derive(Debug, Args)]
#[group(id = "sockets", required = true, multiple = true)]
struct SocketArgs {
    /// Create a socket for one VM that uses QEMU's ivshmem-doorbell; can be repeated for more VMs
    /// on the same region. The sockets have the slots 0, 1 and so on, in the order of the command
    /// line
    #[arg(long, value_name = "SOCKET")]
    ivshmem: Vec<PathBuf>,
    /// Create a socket for one VM that uses vfio-user (QEMU 10.1 or later); can be repeated. Do not
    /// migrate such a VM: QEMU permits it, but leaves the region behind. Do not reboot the VM after
    /// the broker has died: QEMU would exit
    #[arg(long, value_name = "SOCKET")]
    vfio_user: Vec<PathBuf>,
    /// Create a socket for one VM that uses vhost-user (QEMU 11.1 or later); can be repeated.
    /// Experimental, because QEMU's support is experimental. After the broker has ended or
    /// restarted, QEMU exits when the guest's driver next reads the device's configuration
    #[arg(long, value_name = "SOCKET")]
    vhost_user: Vec<PathBuf>,
}

/// Transport of a socket for a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransportKind {
    Ivshmem,
    VfioUser,
    VhostUser,
}

/// The sockets of all transports for VMs, in the order of the command line.
#[derive(Debug)]
pub struct Sockets(pub Vec<(TransportKind, PathBuf)>);

impl FromArgMatches for Sockets {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let args = SocketArgs::from_arg_matches(matches)?;
        let places = |id| matches.indices_of(id).into_iter().flatten();
        let ivshmem = places("ivshmem").zip(args.ivshmem);
        let vfio_user = places("vfio_user").zip(args.vfio_user);
        let vhost_user = places("vhost_user").zip(args.vhost_user);
        let mut sockets: Vec<_> = ivshmem
            .map(|(place, path)| (place, TransportKind::Ivshmem, path))
            .chain(vfio_user.map(|(place, path)| (place, TransportKind::VfioUser, path)))
            .chain(vhost_user.map(|(place, path)| (place, TransportKind::VhostUser, path)))
            .collect();
        sockets.sort_by_key(|(place, ..)| *place);
        let sockets = sockets.into_iter();
        Ok(Sockets(
            sockets.map(|(_, kind, path)| (kind, path)).collect(),
        ))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Sockets {
    fn augment_args(command: clap::Command) -> clap::Command {
        SocketArgs::augment_args(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        SocketArgs::augment_args_for_update(command)
    }
}

#[derive(Debug, Args)]
pub struct Send {
    /// Name of the channel
    #[arg(long, default_value = "down")]
    pub channel: String,
    #[command(flatten)]
    pub stream: stream::Send,
    #[command(flatten)]
    pub which: Which,
}

#[derive(Debug, Args)]
pub struct Recv {
    /// Name of the channel
    #[arg(long, default_value = "up")]
    pub channel: String,
    #[command(flatten)]
    pub stream: stream::Recv,
    #[command(flatten)]
    pub which: Which,
}

#[derive(Debug, Args)]
pub struct Tail {
    /// Name of the channel
    #[arg(default_value = "up")]
    pub channel: String,
    #[command(flatten)]
    pub tail: tail::Tail,
    #[command(flatten)]
    pub which: Which,
}

#[derive(Debug, Args)]
pub struct Inspect {
    /// Print one snapshot as JSON and exit; standard error then has errors and nothing else
    #[arg(long)]
    pub json: bool,
    /// Print one snapshot as text and exit [default if standard input or output is not a terminal]
    #[arg(long, conflicts_with = "json")]
    pub once: bool,
    #[command(flatten)]
    pub which: Which,
}

#[derive(Debug, Args)]
pub struct List {
    /// Print the list as JSON; standard error then has errors and nothing else
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Peek {
    /// Read the memory of the guest in this slot instead. OFFSET is a guest-physical address, or a
    /// DMA address of the device if the guest has an IOMMU
    #[arg(long, value_name = "SLOT", conflicts_with = "region")]
    pub guest: Option<u32>,
    /// Count OFFSET from the start of that guest's DMA buffer, which its driver has announced to
    /// the device
    #[arg(long, requires = "guest")]
    pub buffer: bool,
    #[command(flatten)]
    pub peek: place::Peek,
    #[command(flatten)]
    pub which: Which,
}

#[derive(Debug, Args)]
pub struct Poke {
    #[command(flatten)]
    pub poke: place::Poke,
    #[command(flatten)]
    pub which: Which,
}

#[derive(Debug, Args)]
pub struct ResetChannel {
    /// Name of the channel
    pub channel: String,
    /// Empty the channel even if its ends are in use. This breaks the streams of the programs that
    /// hold them: each gets an error, and must be started again
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub which: Which,
}

#[derive(Debug, Args)]
pub struct Channel {
    #[command(subcommand)]
    pub command: ChannelCommand,
}

#[derive(Debug, Subcommand)]
pub enum ChannelCommand {
    /// Add a channel in the room that `barlink serve --reserve` keeps. It stays as long as the
    /// region
    #[command(after_help = "Example:\n  barlink channel add lidar=up,8M,drop")]
    Add(AddChannel),
    /// List the channels, and the room for more
    #[command(after_help = "Example:\n  barlink channel list --json")]
    List(ListChannels),
}

#[derive(Debug, Args)]
pub struct AddChannel {
    /// The channel, in the form of `barlink serve --channel`: NAME=DIRECTION,SIZE[,POLICY]
    pub channel: ChannelPlan,
    #[command(flatten)]
    pub which: Which,
}

#[derive(Debug, Args)]
pub struct ListChannels {
    /// Print the list as JSON: `entries` is the number of channels that the table still takes, and
    /// `room` the bytes that are left for them. Standard error then has errors and nothing else
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub which: Which,
}

#[derive(Debug, Args)]
pub struct QemuArgs {
    /// Number of the VM's slot, from 0 in the order of the sockets that `serve` got
    #[arg(long, default_value_t = 0)]
    pub slot: usize,
    /// Prefix of the IDs in the QEMU arguments; change it for a second barlink device in one VM
    #[arg(long, default_value = "barlink", value_parser = parse_id)]
    pub id: String,
    /// Chassis number of the root port, and with --libvirt the index of its controller; change it
    /// for a second barlink device in one VM [default: 64, over ivshmem with --libvirt 16]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..))]
    pub chassis: Option<u8>,
    /// Print the elements of a libvirt domain instead of QEMU arguments: `<shmem>` over ivshmem
    /// (libvirt 8.2 or later), else `<qemu:commandline>`
    #[arg(long)]
    pub libvirt: bool,
    /// Run `PATH --version`, and fail if that QEMU is too old for the slot's transport. Without
    /// this option nothing is run
    #[arg(long, value_name = "PATH")]
    pub qemu: Option<PathBuf>,
    #[command(flatten)]
    pub which: Which,
}

/// Parses the name of a broker.
pub fn parse_name(text: &str) -> Result<String, String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if text.is_empty() || text.starts_with('.') || !text.chars().all(legal) {
        return Err(format!(
            "invalid name `{text}`: use letters, digits, `-`, `_` and `.`, without a `.` at the start"
        ));
    }
    if text.len() > BROKER_NAME_BYTES {
        return Err(format!(
            "invalid name `{text}`: use {BROKER_NAME_BYTES} characters at the most"
        ));
    }
    Ok(text.to_owned())
}

fn parse_id(text: &str) -> Result<String, String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    if !text.starts_with(|c: char| c.is_ascii_alphabetic()) || !text.chars().all(legal) {
        return Err(format!(
            "invalid QEMU ID `{text}`: use a letter, then letters, digits, `-` and `_`"
        ));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    /// Returns the keys and values of the systemd unit.
    fn unit() -> Vec<(&'static str, &'static str)> {
        let text = include_str!("../systemd/barlink@.service");
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.filter_map(|line| line.split_once('=')).collect()
    }

    /// The broker is up before a VM starts, and stops after the last VM. systemd stops services in
    /// the reverse order.
    #[test]
    fn systemd_unit_encloses_libvirts_vms() {
        let unit = unit();
        let named = |key: &str| -> Vec<&str> {
            let values = unit.iter().filter(|(name, _)| *name == key);
            values.flat_map(|(_, value)| value.split(' ')).collect()
        };
        let before = named("Before");
        // libvirt runs its VMs as scopes in machine.slice. They end after libvirt's daemons.
        for unit in [
            "machine.slice",
            "libvirtd.service",
            "virtqemud.service",
            "libvirt-guests.service",
        ] {
            assert!(before.contains(&unit), "not before {unit}: {before:?}");
            for key in ["After", "Requires", "Wants", "BindsTo", "PartOf"] {
                assert!(!named(key).contains(&unit), "{key}={unit}");
            }
        }
        // Without these properties, systemd starts the broker late, or ends it early or not at all.
        assert!(named("DefaultDependencies").is_empty());
        assert_eq!(named("WantedBy"), ["multi-user.target"]);
    }

    #[test]
    fn systemd_unit_starts_broker_with_enough_descriptors() {
        use barlink_broker::transport::MAX_FILES;
        use barlink_protocol::wire::layout::{MAX_SLOTS, MAX_VECTORS};
        let unit = unit();
        let value = |key| {
            let mut found = unit.iter().filter(|(name, _)| *name == key);
            let value = found.next().unwrap_or_else(|| panic!("no {key}")).1;
            assert!(found.next().is_none(), "{key} twice");
            value
        };
        let example = include_str!("../systemd/barlink@.service");
        let example = |name: &str| {
            let mut lines = example.lines();
            let prefix = format!("#     {name}=");
            lines.find_map(|line| line.strip_prefix(&prefix)).unwrap()
        };
        let command = value("ExecStart").replace("%i", "vm1");
        let slots = value("Environment").trim_matches('"').replace("%i", "vm1");
        let slots = slots.strip_prefix("BARLINK_SLOTS=").unwrap();
        let ivshmem = (
            TransportKind::Ivshmem,
            PathBuf::from("/run/barlink/vm1.vm.sock"),
        );
        let user = (
            TransportKind::VfioUser,
            PathBuf::from("/run/barlink/vm1.user.sock"),
        );
        for (slots, further, expected) in [
            (slots, "", &ivshmem),
            (slots, example("BARLINK_ARGS"), &ivshmem),
            (example("BARLINK_SLOTS"), example("BARLINK_ARGS"), &user),
        ] {
            let words = command.replace("$BARLINK_ARGS", further);
            let words = words.replace("$BARLINK_SLOTS", slots);
            let cli = Cli::try_parse_from(words.split_whitespace()).unwrap();
            let Command::Serve(serve) = cli.command else {
                panic!("no broker: {words}");
            };
            assert_eq!(serve.sockets.0, std::slice::from_ref(expected));
        }
        // The broker stores its eventfds; a listener, its lock, a VM and its process for each slot,
        // and as many for host apps; 128 host apps; the region's memory and the stored state. A
        // slot of vfio-user adds its session, an eventfd for each vector, and the files of the
        // guest's memory.
        let most = (MAX_SLOTS + 1) * MAX_VECTORS + 4 * (MAX_SLOTS + 1) + 128 + 2;
        let most = most + MAX_SLOTS * (1 + MAX_VECTORS + MAX_FILES);
        let number = |key| value(key).parse::<u32>().unwrap();
        assert!(number("FileDescriptorStoreMax") >= most);
        assert!(number("LimitNOFILE") >= 2 * most);
        assert_eq!((value("Type"), value("Restart")), ("notify", "always"));
        let filters = unit.iter().filter(|(name, _)| *name == "SystemCallFilter");
        let filters: Vec<_> = filters.map(|(_, filter)| *filter).collect();
        for call in [
            "landlock_create_ruleset",
            "landlock_restrict_self",
            "seccomp",
        ] {
            assert!(
                filters[0].split(' ').any(|allowed| allowed == call),
                "{call}"
            );
        }
    }

    #[test]
    fn sockets_keep_command_line_order() {
        let words = "barlink serve --vfio-user a --ivshmem b --size 1M --vhost-user x --ivshmem c --vfio-user d";
        let cli = Cli::try_parse_from(words.split(' ')).unwrap();
        let Command::Serve(serve) = cli.command else {
            panic!("{cli:?}");
        };
        let expected = [
            (TransportKind::VfioUser, "a"),
            (TransportKind::Ivshmem, "b"),
            (TransportKind::VhostUser, "x"),
            (TransportKind::Ivshmem, "c"),
            (TransportKind::VfioUser, "d"),
        ];
        assert_eq!(
            serve.sockets.0,
            expected.map(|(kind, path)| (kind, PathBuf::from(path)))
        );
        assert!(Cli::try_parse_from(["barlink", "serve"]).is_err());
    }

    #[test]
    fn rejects_paths_as_broker_names() {
        assert!(parse_name("vm-1.a").is_ok());
        for text in ["", "..", ".x", "a/b", "a b"] {
            assert!(parse_name(text).is_err(), "{text:?}");
        }
    }
}
