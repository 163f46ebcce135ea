// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `barlink qemu-args`.

use std::io::{IsTerminal, Write, stdout};

use std::path::Path;

use anyhow::{Context, Result};
use barlink::Access;
use barlink::transport::VfioUser;

use crate::args::QemuArgs;

/// Bytes of the window above 4 GiB that the root port asks for: with 64 MiB the firmware still puts it below, where
/// an MTRR makes it uncachable whatever the driver asks for.
const WINDOW: u64 = 8 << 30;

pub fn qemu_args(args: &QemuArgs) -> Result<()> {
    let attachment = super::attach(&args.which, Access::ReadOnly)?;
    let status = attachment.status()?;
    let slot = status.slots.get(args.slot).with_context(|| {
        format!(
            "no slot {}: the broker has {}, and the first is 0",
            args.slot,
            status.slots.len()
        )
    })?;
    let id = &args.id;
    let layout = attachment.layout();
    let window = WINDOW.max(layout.region_size.saturating_mul(2)) >> 30;
    let mut port = format!(
        "pcie-root-port,id={id}-port,chassis={},pref64-reserve={window}G",
        args.chassis
    );
    let mut arguments = Vec::new();
    if slot.transport == VfioUser::NAME {
        // QEMU 11.1 ends itself when it unplugs such a device.
        port.push_str(",hotplug=off");
        arguments.push(("-device", port));
        arguments.push(("-device", vfio_user(id, &slot.socket)?));
    } else {
        // QEMU splits its options at commas; a doubled one stands for itself.
        let path = slot.socket.display().to_string().replace(',', ",,");
        let chardev = format!("socket,id={id}-socket,path={path}");
        arguments.push(("-chardev", chardev));
        arguments.push(("-device", port));
        let vectors = layout.vectors;
        let device =
            format!("ivshmem-doorbell,id={id},bus={id}-port,chardev={id}-socket,vectors={vectors}");
        arguments.push(("-device", device));
    }
    let text = if args.libvirt {
        let mut lines = vec![
            "<!-- in <domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'> -->".to_owned(),
            "<qemu:commandline>".to_owned(),
        ];
        for (name, value) in arguments {
            lines.push(format!("  <qemu:arg value='{name}'/>"));
            lines.push(format!("  <qemu:arg value='{}'/>", escape(&value)));
        }
        lines.push("</qemu:commandline>".to_owned());
        lines.join("\n")
    } else {
        let pasted = stdout().is_terminal();
        let words = arguments
            .iter()
            .flat_map(|(name, value)| [(*name).to_owned(), quote(value, pasted)]);
        words.collect::<Vec<_>>().join(" ")
    };
    writeln!(stdout(), "{text}").context("cannot write to standard output")
}

/// A device whose socket QEMU takes as JSON text alone. Without `rombar` it would complain that there is no ROM.
fn vfio_user(id: &str, socket: &Path) -> Result<String> {
    let path = socket.to_str();
    let path =
        path.with_context(|| format!("QEMU cannot be told the path {}", socket.display()))?;
    let device = serde_json::json!({
        "driver": "vfio-user-pci",
        "id": id,
        "bus": format!("{id}-port"),
        "rombar": 0,
        "socket": { "type": "unix", "path": path },
    });
    Ok(device.to_string())
}

/// Quotes a word for a shell, if it must be: for a person to paste. `$(barlink qemu-args)` splits at spaces, expands
/// patterns, and looks at no quotes and braces, so these go there as they are.
fn quote(word: &str, pasted: bool) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,=:@%+".contains(c);
    let split = |c: char| plain(c) || "{}\"".contains(c);
    if word.chars().all(plain) || !pasted && word.chars().all(split) {
        word.to_owned()
    } else {
        shell_words::quote(word).into_owned()
    }
}

/// Escapes text for an XML attribute in single quotes.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('\'', "&apos;")
}
