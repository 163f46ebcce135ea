// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command `barlink list`.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use barlink::host::{self, AttachOptions, ControlError};
use barlink::{Access, Error};
use barlink_cli::standard::print;
use indicatif::BinaryBytes;
use serde::Serialize;

use crate::args::{List, parse_name};

/// A broker, as its control socket shows it.
#[derive(Debug, Serialize)]
struct Entry {
    /// Name of the broker.
    name: String,
    /// Control socket of the broker.
    control: PathBuf,
    #[serde(flatten)]
    state: State,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum State {
    Serves {
        /// Process ID of the broker.
        pid: u32,
        /// Number of the region.
        instance: String,
        /// Bytes in the region.
        size: u64,
        /// Slots for VMs.
        slots: usize,
        /// VMs that are connected.
        vms: usize,
    },
    Fails {
        /// The reason why a request to the broker failed.
        error: String,
    },
}

pub fn list(args: &List) -> Result<()> {
    let folders = host::socket_folders();
    let mut entries = Vec::new();
    let mut unread = Vec::new();
    for folder in &folders {
        match sockets(folder) {
            Ok(sockets) => {
                let found = sockets.into_iter();
                entries.extend(found.filter_map(|(name, control)| entry(name, control)));
            }
            Err(error) => unread.push(format!("cannot list {}: {error}", folder.display())),
        }
    }
    let text = if args.json {
        serde_json::to_string_pretty(&entries)?
    } else if entries.is_empty() && !unread.is_empty() {
        return Err(unlisted(&unread));
    } else if entries.is_empty() {
        let folders: Vec<_> = folders.iter().map(|folder| folder.display()).collect();
        format!(
            "no broker in {}: start one with `barlink serve`",
            join(&folders)
        )
    } else {
        table(&entries)
    };
    print(format!("{text}\n"))?;
    match unread.is_empty() {
        true => Ok(()),
        false => Err(unlisted(&unread)),
    }
}

/// Returns the error of folders that this process may not read.
fn unlisted(unread: &[String]) -> anyhow::Error {
    let unread = unread.join(", ");
    anyhow!(
        "{unread}: brokers there are not listed, and a user whom they admit reaches each by its --name, as in \
         `barlink inspect --name NAME`"
    )
}

fn join(parts: &[impl ToString]) -> String {
    parts
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(" or ")
}

/// Returns the files of a folder that may be control sockets: their names and paths, sorted.
fn sockets(folder: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut sockets: Vec<_> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let name = path.file_name()?.to_str()?.strip_suffix(".sock")?;
            // A file with another name is no broker's, and the name may spoil the terminal.
            Some((parse_name(name).ok()?, path))
        })
        .collect();
    sockets.sort();
    Ok(sockets)
}

/// Asks the broker at a socket. Returns `None` for a socket that is not the control socket of a
/// running broker.
fn entry(name: String, control: PathBuf) -> Option<Entry> {
    let options = AttachOptions::new().access(Access::ReadOnly);
    let asked = options.connect_path(&control).and_then(|broker| {
        let status = broker.status()?;
        Ok(State::Serves {
            pid: status.broker,
            instance: broker.layout().identity.instance.to_string(),
            size: broker.layout().region_size,
            slots: status.slots.len(),
            vms: status.slots.iter().filter(|slot| slot.vm.is_some()).count(),
        })
    });
    let state = match asked {
        Ok(state) => state,
        // The kernel checks the permission before the type, so such a file can be any socket.
        Err(Error::Control(
            ControlError::NoBroker { .. }
            | ControlError::NotASocket { .. }
            | ControlError::NotABroker { .. }
            | ControlError::Permission { .. },
        )) => {
            return None;
        }
        Err(error) => State::Fails {
            error: error.to_string(),
        },
    };
    Some(Entry {
        name,
        control,
        state,
    })
}

fn table(entries: &[Entry]) -> String {
    let mut rows = vec![["name", "region", "VMs", "process", "control socket"].map(str::to_owned)];
    for entry in entries {
        let control = entry.control.display().to_string();
        rows.push(match &entry.state {
            State::Serves {
                pid,
                size,
                slots,
                vms,
                ..
            } => [
                entry.name.clone(),
                BinaryBytes(*size).to_string(),
                format!("{vms} of {slots}"),
                pid.to_string(),
                control,
            ],
            State::Fails { error } => {
                let none = || "-".to_owned();
                [entry.name.clone(), none(), none(), none(), error.clone()]
            }
        });
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; 5] = std::array::from_fn(width);
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(widths);
        let line: String = cells
            .map(|(cell, width)| format!("{cell:width$}  "))
            .collect();
        line.trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}
