// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask demo`: streams real data through a PCI BAR from the host to a guest process and
//! back, and compares the received data with the original.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use indicatif::{BinaryBytes, HumanCount};
use serde_json::Value;
use sha2::{Digest, Sha256};
use signal_hook::consts::SIGINT;

use barlink_sandbox::builds::{Artifacts, Programs};
use barlink_sandbox::setup;
use barlink_sandbox::tools::{Accel, Tools, VmArgs};
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::{Config, Vm, accelerator, check_accelerator, check_kernel_boots};

/// Timeout of a transfer.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(300);
/// Minimum size of the file to send, in bytes.
const LEAST_FILE: u64 = 64 << 20;
/// Exit code after Ctrl-C.
const INTERRUPTED: u8 = 130;
/// Path of the file in the guest.
const GUEST_FILE: &str = "/tmp/file";

/// Options of the demo.
#[derive(Args, Debug)]
pub struct DemoArgs {
    /// Leave the guest running at the end, with a root shell on this terminal
    #[arg(long)]
    pub keep: bool,

    /// Send this file of at least 64 MiB [default: the kernel's source archive]
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,

    /// Transport by which the guest gets its device
    #[arg(long, value_enum, default_value_t)]
    pub transport: Transport,

    /// Options that choose the tools and the accelerator.
    #[command(flatten)]
    pub vm: VmArgs,
}

/// Sets up and builds everything that the demo needs, and runs it.
pub fn run(args: &DemoArgs) -> Result<ExitCode> {
    // Checks the arguments before the long work.
    args.file.as_deref().map(check_file).transpose()?;
    check_accelerator(args.vm.accel)?;
    if args.keep {
        ensure!(
            io::stdin().is_terminal() && io::stdout().is_terminal(),
            "--keep puts a shell on this terminal, and standard input or output is none: run it in a terminal, or \
             leave --keep out"
        );
    }
    let tools = setup::ensure(&args.vm.tools)?;
    let file = file_to_send(args, &tools)?;
    let artifacts = Artifacts::build(tools, args.vm.clone(), Programs::DEMO)?;
    check_kernel_boots(&artifacts)?;
    // From here on an interrupt must clean up. The programs that the demo has started receive the
    // Ctrl-C as well and end, which ends each wait for them with an error.
    let interrupted = Arc::<AtomicBool>::default();
    signal_hook::flag::register(SIGINT, Arc::clone(&interrupted))
        .context("signals cannot be caught")?;
    match show(args, &artifacts, &file) {
        Err(_) if interrupted.load(Ordering::Relaxed) => {
            eprintln!("interrupted; nothing is left behind");
            Ok(ExitCode::from(INTERRUPTED))
        }
        shown => shown.map(|()| ExitCode::SUCCESS),
    }
}

/// Boots a guest, streams data in both directions, and prints the results.
fn show(args: &DemoArgs, artifacts: &Artifacts, file: &Path) -> Result<()> {
    let broker = Broker::start_over(artifacts, &[args.transport], &["--size", "64M"])?;
    eprintln!("booting the guest ...");
    let vm = Vm::boot_with(
        artifacts,
        &Config {
            memory_mib: 1024,
            interactive: args.keep,
            preallocated: true,
            ..broker.vm()?
        },
    )?;
    vm.run(["insmod", "/lib/barlink.ko"])?.require_success()?;
    let info: Value =
        serde_json::from_str(&vm.run(["barlink-guest", "info", "--json"])?.success()?)?;
    println!(
        "guest    /dev/barlink0 is there, mapped {}",
        text(&info["cache_mode"])
    );

    let trip = round_trip(&broker, &vm, file)?;
    telemetry(&broker, &vm)?;
    window(&broker, &vm)?;
    let snapshot = broker.inspect()?;

    let channel = |name: &str| {
        let channels = snapshot["channels"].as_array();
        let channel = channels.and_then(|all| all.iter().find(|channel| channel["name"] == name));
        channel
            .map(|channel| {
                format!(
                    "{} rung, {} suppressed",
                    channel["rung"], channel["suppressed"]
                )
            })
            .unwrap_or_default()
    };
    let slot = &snapshot["broker"]["slots"][0];
    let release = vm.run(["uname", "-r"])?.success()?;
    println!();
    for (name, value) in [
        ("kernel", release.trim_end().to_owned()),
        ("accelerator", name(accelerator(artifacts)).to_owned()),
        (
            "transport",
            slot["transport"].as_str().unwrap_or_default().to_owned(),
        ),
        ("PCI address", text(&info["pci_address"])),
        ("cache mode", text(&info["cache_mode"])),
        ("each way", size(trip.bytes)),
        ("SHA-256", trip.sum.clone()),
        ("host to guest", format!("{:.0} MiB/s", trip.down)),
        ("guest to host", format!("{:.0} MiB/s", trip.up)),
        ("round trip", format!("{:.2} s", trip.seconds())),
        ("doorbells down", channel("down")),
        ("doorbells up", channel("up")),
    ] {
        println!("{name:<16} {value}");
    }
    if args.keep {
        println!("\nthe guest's console; Ctrl-] leaves and ends the guest");
        println!("to try in another terminal:");
        for (command, does) in [
            ("inspect", "shows the channels, until Ctrl-C"),
            (
                "recv",
                "receives: type `echo hello | barlink-guest send` here",
            ),
            (
                "send",
                "sends a FILE, such as a static program: type `barlink-guest recv -o /tmp/FILE` here",
            ),
        ] {
            println!("# {does}");
            println!("{}", shown(&broker, command));
        }
        vm.attach_terminal()?;
    }
    Ok(())
}

/// Returns the command line of a host app for this broker, as a user can type it.
fn shown(broker: &Broker, command: &str) -> String {
    let app = broker.app([command]);
    let words = std::iter::once(app.get_program()).chain(app.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    // A program that tests start gets its signals from `env`, which a shell need not.
    let own = words.iter().position(|word| word.ends_with("/barlink"));
    let file = if command == "send" { " FILE" } else { "" };
    format!("{}{file}", words[own.unwrap_or(0)..].join(" "))
}

/// Result of a file's round trip to the guest and back.
struct Trip {
    bytes: u64,
    sum: String,
    /// Throughput from host to guest in MiB/s, by the guest's clock.
    down: f64,
    /// Throughput from guest to host in MiB/s, by the host's clock.
    up: f64,
}

impl Trip {
    /// Returns the time of both transfers in seconds, without the hashing in between.
    fn seconds(&self) -> f64 {
        let size = mib(self.bytes);
        size / self.down + size / self.up
    }
}

/// Sends a file to the guest and back, and compares its SHA-256.
fn round_trip(broker: &Broker, vm: &Vm, file: &Path) -> Result<Trip> {
    let bytes = file.metadata()?.len();
    println!("file     {}, {}", file.display(), size(bytes));
    let sum =
        sha256(&mut File::open(file).with_context(|| format!("cannot open {}", file.display()))?)?;

    let receiver = vm.spawn(["barlink-guest", "recv", "--json", "-o", GUEST_FILE])?;
    let path = file.to_str().context("the file's name is not text")?;
    broker.run(["send", path])?;
    let received = receiver.wait(TRANSFER_TIMEOUT)?;
    received.require_success()?;
    let down = rate(&received.stderr, bytes)?;
    let guest_sum = vm
        .spawn(["sha256sum", GUEST_FILE])?
        .wait(TRANSFER_TIMEOUT)?
        .success()?;
    ensure!(
        guest_sum.starts_with(&sum),
        "the guest received something else: {guest_sum}, not {sum}"
    );
    println!("to guest {down:.0} MiB/s, SHA-256 is the same");

    // Receives into memory that is already allocated, as the guest's is, so that neither a disk nor
    // page faults on the host count.
    let mut back = tempfile::tempfile_in("/dev/shm")?;
    io::copy(&mut io::repeat(0).take(bytes), &mut back)?;
    back.rewind()?;
    let mut receiver = broker.app(["recv", "--json"]);
    receiver.stdout(back.try_clone()?);
    let receiver = Receiver::start(&mut receiver)?;
    vm.spawn(["barlink-guest", "send", GUEST_FILE])?
        .wait(TRANSFER_TIMEOUT)?
        .require_success()?;
    let received = receiver.wait()?;
    let up = rate(&received.stderr, bytes)?;
    back.rewind()?;
    let back_sum = sha256(&mut back)?;
    ensure!(
        back_sum == sum,
        "the host received something else: {back_sum}, not {sum}"
    );
    println!("to host  {up:.0} MiB/s, SHA-256 is the same");
    vm.run(["rm", GUEST_FILE])?.require_success()?;
    Ok(Trip {
        bytes,
        sum,
        down,
        up,
    })
}

/// A running `barlink recv`, killed on drop. It would otherwise wait forever if no sender starts.
struct Receiver(Option<Child>);

impl Receiver {
    /// Starts the program. Its standard error is collected instead of shown.
    fn start(command: &mut Command) -> Result<Self> {
        let child = command.stderr(Stdio::piped()).spawn();
        Ok(Self(Some(
            child.context("`barlink recv` cannot be started")?,
        )))
    }

    /// Waits until the program has received everything.
    fn wait(mut self) -> Result<Output> {
        let child = self.0.take().context("it has ended")?;
        let received = child.wait_with_output()?;
        let report = String::from_utf8_lossy(&received.stderr);
        ensure!(
            received.status.success(),
            "receiving on the host failed: {report}"
        );
        Ok(received)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // Ignores errors, because the program may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Returns the throughput in MiB/s from the summary that a receiver prints. An error
/// unless it received all `bytes`.
fn rate(summary: &[u8], bytes: u64) -> Result<f64> {
    let summary: Value =
        serde_json::from_slice(summary).context("a receiver printed no summary")?;
    ensure!(
        summary["bytes"] == bytes,
        "{} bytes arrived of {bytes}",
        summary["bytes"]
    );
    let seconds = summary["seconds"]
        .as_f64()
        .context("a summary has no time")?;
    Ok(mib(bytes) / seconds)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Formats a size as MiB, and as bytes for a comparison with other programs.
fn size(bytes: u64) -> String {
    format!("{} ({} bytes)", BinaryBytes(bytes), HumanCount(bytes))
}

/// Streams the guest's load to the host for two seconds, and checks the samples.
fn telemetry(broker: &Broker, vm: &Vm) -> Result<()> {
    let receiver = Receiver::start(broker.app(["recv"]).stdout(Stdio::piped()))?;
    vm.run([
        "barlink-guest",
        "telemetry",
        "--seconds",
        "2",
        "--rate",
        "100",
    ])?
    .require_success()?;
    let received = receiver.wait()?;
    let lines = String::from_utf8(received.stdout)?;
    let samples: Vec<Value> = lines
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let in_order = samples
        .iter()
        .enumerate()
        .all(|(index, sample)| sample["sequence"] == index);
    ensure!(
        samples.len() == 200 && in_order,
        "{} samples of 200 arrived, or not in order",
        samples.len()
    );
    let (first, last) = (&samples[0], &samples[samples.len() - 1]);
    println!(
        "load     {} samples in {:.2} s; the first and the last:",
        samples.len(),
        last["time_ms"].as_f64().unwrap_or_default() / 1e3
    );
    println!("         {first}\n         {last}");
    Ok(())
}

/// Writes a text to the raw window on each side, and reads it on the other.
fn window(broker: &Broker, vm: &Vm) -> Result<()> {
    let from_guest = "written by the guest";
    vm.run(["barlink-guest", "poke", from_guest])?
        .require_success()?;
    let seen = broker.run(["peek", "--raw", "--length", &from_guest.len().to_string()])?;
    ensure!(
        seen == from_guest.as_bytes(),
        "the host sees {:?}",
        String::from_utf8_lossy(&seen)
    );
    let from_host = "written by the host";
    broker.run(["poke", "--at", "4K", from_host])?;
    let length = from_host.len().to_string();
    let seen = vm
        .run([
            "barlink-guest",
            "peek",
            "--raw",
            "--at",
            "4K",
            "--length",
            &length,
        ])?
        .success()?;
    ensure!(seen == from_host, "the guest sees {seen:?}");
    println!("window   \"{from_guest}\" read on the host, \"{from_host}\" read in the guest");
    Ok(())
}

fn file_to_send(args: &DemoArgs, tools: &Tools) -> Result<PathBuf> {
    let sandbox = tools.sandbox.as_ref();
    let archive = || sandbox.and_then(|sandbox| sandbox.source_archive());
    let file = args.file.clone().or_else(archive);
    file.context("without a sandbox there is no file to send: name one with --file")
}

/// Checks that the user's file exists and is large enough.
fn check_file(path: &Path) -> Result<()> {
    let file = path.display();
    let size = File::open(path)
        .and_then(|file| file.metadata())
        .with_context(|| format!("--file {file} cannot be read: name another"))?
        .len();
    ensure!(
        size >= LEAST_FILE,
        "--file {file} has less than 64 MiB: name a larger one"
    );
    Ok(())
}

fn sha256(file: &mut File) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut part = vec![0; 1 << 20];
    loop {
        match file.read(&mut part)? {
            0 => break,
            length => hasher.update(&part[..length]),
        }
    }
    Ok(hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

fn name(accelerator: Accel) -> &'static str {
    match accelerator {
        Accel::Kvm => "KVM",
        Accel::Tcg => "TCG, software emulation",
    }
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use barlink_sandbox::tools::ToolArgs;

    #[test]
    fn demo_checks_file_first() {
        // With tools that do not exist, the demo fails when it looks for them.
        let nothing = || Some(PathBuf::from("/no/such/file"));
        let tools = ToolArgs {
            qemu: nothing(),
            kernel_image: nothing(),
            kernel_headers: nothing(),
            ..ToolArgs::default()
        };
        for file in ["/no/such/file", "/dev/null"] {
            let args = DemoArgs {
                keep: false,
                file: Some(file.into()),
                transport: Transport::default(),
                vm: VmArgs {
                    tools: tools.clone(),
                    accel: None,
                },
            };
            let error = run(&args).unwrap_err().to_string();
            assert!(error.starts_with(&format!("--file {file} ")), "{error}");
        }
    }
}
