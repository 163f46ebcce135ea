// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `barlink qemu-args`.

use std::io::{Write, stdout};

use anyhow::{Context, Result, ensure};
use barlink::Access;

use crate::args::QemuArgs;

/// Bytes of the window above 4 GiB that the root port asks for: with 64 MiB the firmware still puts it below, where
/// an MTRR makes it uncachable whatever the driver asks for.
const WINDOW: u64 = 8 << 30;

pub fn qemu_args(args: &QemuArgs) -> Result<()> {
    let attachment = super::attach(&args.which, Access::ReadOnly)?;
    let status = attachment.status()?;
    let slot = status.slots.get(args.slot).with_context(|| {
        format!(
            "no slot {}: the broker's last one is {}; choose another with --slot, or serve more with further --ivshmem",
            args.slot,
            status.slots.len().saturating_sub(1)
        )
    })?;
    let id = &args.id;
    let layout = attachment.layout();
    let window = WINDOW.max(layout.region_size.saturating_mul(2)) >> 30;
    // QEMU splits its options at commas; a doubled one stands for itself.
    let path = slot.socket.display().to_string().replace(',', ",,");
    let arguments = [
        ("-chardev", format!("socket,id={id}-socket,path={path}")),
        (
            "-device",
            format!(
                "pcie-root-port,id={id}-port,chassis={},pref64-reserve={window}G",
                args.chassis
            ),
        ),
        (
            "-device",
            format!(
                "ivshmem-doorbell,id={id},bus={id}-port,chardev={id}-socket,vectors={}",
                layout.vectors
            ),
        ),
    ];
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
        let changed = path.chars().find(|c| is_changed_by_a_shell(*c));
        ensure!(
            changed.is_none(),
            "socket path {path:?} has a {:?}, which a shell does not leave alone in `$(barlink qemu-args)`: serve at a \
             path without it (--libvirt can have this one)",
            changed.unwrap_or_default()
        );
        let words = arguments.map(|(name, value)| format!("{name} {value}"));
        words.join(" ")
    };
    writeln!(stdout(), "{text}").context("cannot write to standard output")
}

/// Whether a shell splits or expands the words of `$(...)` at a character. No quotes keep it from that: it takes quotes
/// that come out of a command for themselves, as it takes all other characters.
fn is_changed_by_a_shell(c: char) -> bool {
    c.is_ascii_whitespace() || "*?[\\".contains(c)
}

/// Escapes text for an XML attribute in single quotes.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('\'', "&apos;")
}
