// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The cost of ends that are attached and asleep.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use barlink_bench_load::Used;
use serde::Serialize;

use super::host::{TRIP, start};
use super::scene::{Load, Scene, Side};
use barlink_vm::broker::Transport;

/// Time until ends that have exchanged records sleep for good. In a guest, an end that has slept for
/// a second asks once whether the broker is alive, which wakes the host's ends, and looks for the
/// answer a second later (`docs/protocol.md`, 3.11).
const SETTLE: Duration = Duration::from_millis(2500);

/// The processor time that processes used while a pair of ends slept.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The transport between the two ends; `None` for two ends on the host.
    pub(super) transport: Option<Transport>,
    /// Length of the measurement, in seconds.
    seconds: f64,
    /// The ends on the host.
    host: Used,
    /// The end in the guest.
    guest: Option<Used>,
    /// The broker.
    broker: Used,
    /// QEMU with all other work of the guest, such as its kernel's timers.
    qemu: Used,
}

/// Returns the name of a pair of ends that sleep.
pub fn name(transport: Option<Transport>) -> String {
    let name = transport.map_or("within the host", Transport::name);
    format!("{name}, asleep")
}

/// Returns the transports whose ends are measured, and `None` for the pair of ends on the host.
pub fn all() -> impl Iterator<Item = Option<Transport>> {
    Transport::ALL.map(Some).into_iter().chain([None])
}

/// Starts two ends with a pair of channels, and measures them while they sleep.
pub fn measure(scene: &Scene, transport: Option<Transport>, time: Duration) -> Result<Row> {
    let control = format!("--control={}", scene.control().display());
    let words = |words: &[&str]| {
        words
            .iter()
            .map(|&word| word.to_owned())
            .collect::<Vec<_>>()
    };
    let (mut one, mut other) = match transport {
        None => {
            let [there, back] = TRIP;
            (
                start(scene, &["idle", there, back, &control, "--first"])?,
                start(scene, &["idle", back, there, &control])?,
            )
        }
        Some(transport) => {
            let slot = transport.index();
            let (up, down) = (format!("up{slot}"), format!("down{slot}"));
            let device = format!("--device=/dev/barlink{slot}");
            (
                start(scene, &["idle", &down, &up, &control, "--first"])?,
                scene.start(Side::Guest, &words(&["idle", &up, &down, &device]))?,
            )
        }
    };
    let numbers = [one.process()?, other.process()?];
    thread::sleep(SETTLE);
    let broker = scene.broker();
    let processes = [broker.process(), find_qemu(broker.folder())?];
    let [broker, qemu] = processes.map(|number| number.to_string());
    let time_option = format!("--time={}", time.as_millis());
    let watch = ["watch", &time_option, &broker, &qemu, &numbers[0]];
    // The host and the guest are measured at the same time.
    let (host, guest) = match transport {
        None => (start(scene, &[&watch[..], &[&numbers[1]]].concat())?, None),
        Some(_) => {
            let guest = scene.start(Side::Guest, &words(&["watch", &time_option, &numbers[1]]))?;
            (start(scene, &watch)?, Some(guest))
        }
    };
    let used: Vec<Used> = host.wait()?;
    let guest: Option<Vec<Used>> = guest.map(Load::wait).transpose()?;
    for load in [one, other] {
        load.end()?;
    }
    let [broker, qemu, host @ ..] = &used[..] else {
        bail!("what was watched is missing");
    };
    Ok(Row {
        transport,
        seconds: time.as_secs_f64(),
        host: host.iter().fold(Used::default(), |all, one| Used {
            cpu: all.cpu + one.cpu,
            switches: all.switches + one.switches,
        }),
        guest: match guest {
            None => None,
            Some(used) => Some(*used.first().context("the guest's end was not watched")?),
        },
        broker: *broker,
        qemu: *qemu,
    })
}

/// Returns the process ID of the QEMU whose devices are in this folder. The name of the process is
/// checked because the processes of its sandbox have the folder in their arguments as well.
fn find_qemu(folder: &Path) -> Result<u32> {
    let folder = folder.as_os_str().as_bytes();
    for process in fs::read_dir("/proc")? {
        let path = process?.path();
        let name = fs::read(path.join("comm")).unwrap_or_default();
        // The kernel truncates the name after 15 bytes.
        if !name.starts_with(b"qemu-system") {
            continue;
        }
        let arguments = fs::read(path.join("cmdline")).unwrap_or_default();
        let is_ours = arguments.windows(folder.len()).any(|part| part == folder);
        let number = path.file_name().and_then(OsStr::to_str);
        if let (true, Some(number)) = (is_ours, number) {
            return Ok(number.parse()?);
        }
    }
    bail!("there is no QEMU with a device in the broker's folder")
}

impl Row {
    /// Returns the name of the pair of ends, and their processor time in nanoseconds.
    pub(super) fn ends(&self) -> (String, u64) {
        let guest = self.guest.map_or(0, |used| used.cpu);
        (name(self.transport), self.host.cpu + guest)
    }
}

impl fmt::Display for Row {
    /// Formats a line of a table: microseconds of processor time and context switches, each for a
    /// second.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.transport.map_or("within the host", Transport::name);
        let cell = |used: &Used| {
            let micros = used.cpu as f64 / 1e3 / self.seconds;
            format!("{micros:.1} ({:.1})", used.switches as f64 / self.seconds)
        };
        let guest = self.guest.as_ref().map_or(String::new(), cell);
        let [host, broker, qemu] = [&self.host, &self.broker, &self.qemu].map(cell);
        writeln!(f, "| {name} | {host} | {guest} | {broker} | {qemu} |")
    }
}
