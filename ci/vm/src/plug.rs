// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Plugs the devices of a QEMU command line into a running VM.
//!
//! QEMU's human monitor takes character devices, objects and devices in the syntax of the command
//! line, so they need no translation. A device in JSON goes to QMP's `device_add`, which takes the
//! same object.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::qmp::Qmp;

/// Maps the names of root ports in a test's arguments to ports of the restored guest.
pub(crate) type Ports = HashMap<String, &'static str>;

/// Plugs in everything that `arguments`, in the syntax of QEMU's command line, describe:
/// `-chardev`, `-object` and `-device`.
///
/// A root port cannot be plugged in. So the first `pcie-root-port` of the arguments stands for the
/// first of the VM's own `ports`, the second for the second, and so on. Returns the port of each
/// name.
///
/// # Errors
///
/// QEMU refuses a part, there are more ports than the VM has, or an argument is of another kind.
pub(crate) fn plug(qmp: &Qmp, arguments: &[String], ports: &[&'static str]) -> Result<Ports> {
    let mut free = ports.iter();
    let mut names = Ports::new();
    let (pairs, rest) = arguments.as_chunks();
    ensure!(rest.is_empty(), "{rest:?} has no value");
    for [option, value] in pairs {
        match option.as_str() {
            "-chardev" => monitor(qmp, &format!("chardev-add {value}"))?,
            "-object" => monitor(qmp, &format!("object_add {value}"))?,
            "-device" if value.starts_with("pcie-root-port,") => {
                let name = property(value, "id").context("a root port has no id")?;
                let port = free.next().with_context(|| {
                    format!("a restored guest has {} root ports: boot one", ports.len())
                })?;
                names.insert(name.to_owned(), *port);
            }
            "-device" if value.starts_with('{') => {
                let mut device: Value = serde_json::from_str(value)?;
                rename_port(&mut device, &names);
                qmp.execute("device_add", &device)?;
            }
            "-device" => {
                let port = property(value, "bus").and_then(|bus| Some((bus, names.get(bus)?)));
                let device = match port {
                    Some((bus, port)) => {
                        value.replace(&format!("bus={bus}"), &format!("bus={port}"))
                    }
                    None => value.clone(),
                };
                monitor(qmp, &format!("device_add {device}"))?;
            }
            _ => bail!("{option} cannot be given to a restored guest: boot one"),
        }
    }
    Ok(names)
}

/// Replaces the `bus` of a device in JSON by the port that it stands for.
pub(crate) fn rename_port(device: &mut Value, ports: &Ports) {
    if let Some(port) = device["bus"].as_str().and_then(|bus| ports.get(bus)) {
        device["bus"] = json!(port);
    }
}

/// Runs a command of QEMU's human monitor. Any output is an error message.
fn monitor(qmp: &Qmp, command: &str) -> Result<()> {
    let printed = qmp.execute("human-monitor-command", &json!({ "command-line": command }))?;
    let printed = printed.as_str().unwrap_or_default().trim();
    ensure!(printed.is_empty(), "QEMU refuses `{command}`: {printed}");
    Ok(())
}

/// Returns a property of a device in the syntax of the command line: `driver,NAME=VALUE,…`.
fn property<'a>(device: &'a str, name: &str) -> Option<&'a str> {
    let mut properties = device.split(',');
    properties.find_map(|property| property.strip_prefix(name)?.strip_prefix('='))
}
