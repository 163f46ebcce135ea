// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command `barlink qemu-args`.

use std::io::{IsTerminal, Write, stderr, stdout};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use barlink::Access;
use barlink_broker::transport::{VfioUser, VhostUser};
use barlink_cli::standard::print;
use barlink_protocol::wire::virtio;
use log::warn;

use super::qemu_version::QemuVersion;
use crate::args::QemuArgs;

/// Bytes of the window above 4 GiB that the root port requests. With 64 MiB the firmware still puts
/// the window below, where an MTRR makes it uncachable in any cache mode.
const WINDOW: u64 = 8 << 30;

pub fn qemu_args(args: &QemuArgs) -> Result<()> {
    let attachment = super::attach(&args.which, Access::ReadOnly)?;
    let status = attachment.status()?;
    let slot = status.slots.get(args.slot).with_context(|| {
        format!(
            "no slot {}: the broker's last slot is {}; choose another with --slot, or serve more slots with --ivshmem, --vfio-user or --vhost-user",
            args.slot,
            status.slots.len().saturating_sub(1)
        )
    })?;
    if let Some(qemu) = &args.qemu {
        let text = QemuVersion::of(qemu)?.check(&slot.transport)?;
        // Ignores the error, because standard error may be closed.
        let _ = writeln!(stderr(), "{text}");
    }
    let id = &args.id;
    let layout = attachment.layout();
    let window = WINDOW.max(layout.region_size.saturating_mul(2)) >> 30;
    let mut port = format!(
        "pcie-root-port,id={id}-port,chassis={},pref64-reserve={window}G",
        args.chassis
    );
    let mut arguments = Vec::new();
    let is_vfio_user = slot.transport == VfioUser::NAME;
    if is_vfio_user {
        // QEMU 11.1 ends itself when it unplugs such a device.
        port.push_str(",hotplug=off");
        arguments.push(("-device", port));
        arguments.push(("-device", vfio_user(id, &slot.socket)?));
    } else {
        // QEMU splits its options at commas. A doubled comma is a comma.
        let path = slot.socket.display().to_string().replace(',', ",,");
        let chardev = format!("socket,id={id}-socket,path={path}");
        arguments.push(("-chardev", chardev));
        arguments.push(("-device", port));
        let place = format!("id={id},bus={id}-port,chardev={id}-socket");
        let device = if slot.transport == VhostUser::NAME {
            // The arguments for memory are not printed, because only the user knows the size of the
            // VM's memory.
            warn!(
                "QEMU must share the guest's memory: add -object memory-backend-memfd,id=ram,share=on,size=SIZE -machine memory-backend=ram"
            );
            format!(
                "vhost-user-test-device-pci,{place},virtio-id={},num_vqs={},vq_size={},config_size={}",
                virtio::DEVICE_TYPE,
                virtio::QUEUES,
                virtio::QUEUE_SIZE,
                virtio::config::SIZE
            )
        } else {
            format!("ivshmem-doorbell,{place},vectors={}", layout.vectors)
        };
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
    } else if stdout().is_terminal() {
        // A user pastes this text into a shell, so it is quoted.
        let words = arguments
            .iter()
            .flat_map(|(name, value)| [(*name).into(), shell_words::quote(value)]);
        words.collect::<Vec<_>>().join(" ")
    } else {
        ensure_a_shell_keeps(&slot.socket, is_vfio_user)?;
        let words = arguments
            .iter()
            .map(|(name, value)| format!("{name} {value}"));
        words.collect::<Vec<_>>().join(" ")
    };
    print(format!("{text}\n"))
}

/// Returns the `-device` argument for vfio-user. It is JSON text because QEMU takes the socket of
/// this device in no other form. Without `rombar`, QEMU would warn of a missing ROM.
fn vfio_user(id: &str, socket: &Path) -> Result<String> {
    let path = socket.to_str();
    let path = path.with_context(|| {
        format!(
            "socket path {} is not UTF-8, as QEMU needs it",
            socket.display()
        )
    })?;
    let device = serde_json::json!({
        "driver": "vfio-user-pci",
        "id": id,
        "bus": format!("{id}-port"),
        "rombar": 0,
        "socket": { "type": "unix", "path": path },
    });
    Ok(device.to_string())
}

/// Fails if a shell splits or expands the words of `$(barlink qemu-args)` at a character of a
/// socket's path. Quotes do not help, because a shell takes quotes in the output of a command
/// literally. It takes all other characters literally as well, even braces.
fn ensure_a_shell_keeps(socket: &Path, is_json: bool) -> Result<()> {
    let path = socket.display().to_string();
    let is_changed = |c: &char| {
        // JSON text escapes these characters with a backslash, which a shell may change.
        let escaped = is_json && (*c == '"' || c.is_control());
        escaped || c.is_ascii_whitespace() || "*?[\\".contains(*c)
    };
    let changed = path.chars().find(is_changed);
    ensure!(
        changed.is_none(),
        "socket path {path:?} has a {:?}, which a shell changes in `$(barlink qemu-args)`: serve at a path without it, \
         or use --libvirt",
        changed.unwrap_or_default()
    );
    Ok(())
}

/// Escapes text for an XML attribute in single quotes.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('\'', "&apos;")
}
