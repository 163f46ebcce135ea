// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command `barlink qemu-args`.

use std::io::{IsTerminal, Write, stderr, stdout};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use barlink::Access;
use barlink_broker::transport::{Ivshmem, VfioUser, VhostUser};
use barlink_cli::standard::print;
use barlink_protocol::wire::virtio;
use log::warn;

use super::qemu_version::QemuVersion;
use crate::args::QemuArgs;

/// Bytes of the window above 4 GiB that the root port requests. With 64 MiB the firmware still puts
/// the window below, where an MTRR makes it uncachable in any cache mode.
const WINDOW: u64 = 8 << 30;
/// Chassis number of the root port in QEMU's arguments, unless the user chooses one.
const QEMU_CHASSIS: u8 = 64;
/// Index of the root port's controller in libvirt's elements, unless the user chooses one. libvirt
/// makes a root port for each index below that is free, and the domains of virt-install have up to
/// 14 of them.
const LIBVIRT_INDEX: u8 = 16;
/// Start of the domain whose parts are in QEMU's namespace.
const NAMESPACE: &str =
    "in <domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>";

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
    let layout = attachment.layout();
    let device = Device {
        id: &args.id,
        socket: &slot.socket,
        transport: &slot.transport,
        vectors: layout.vectors,
        window: WINDOW.max(layout.region_size.saturating_mul(2)),
        chassis: args.chassis,
    };
    let text = if args.libvirt {
        device.ensure_xml_can_express_it()?;
        match device.transport {
            Ivshmem::NAME => device.native_elements(),
            _ => in_command_line(device.arguments()?),
        }
    } else if stdout().is_terminal() {
        // A user pastes this text into a shell, so it is quoted.
        let arguments = device.arguments()?;
        let words = arguments
            .iter()
            .flat_map(|(name, value)| [(*name).into(), shell_words::quote(value)]);
        words.collect::<Vec<_>>().join(" ")
    } else {
        ensure_a_shell_keeps(&slot.socket, device.transport == VfioUser::NAME)?;
        let arguments = device.arguments()?;
        let words = arguments
            .iter()
            .map(|(name, value)| format!("{name} {value}"));
        words.collect::<Vec<_>>().join(" ")
    };
    print(format!("{text}\n"))
}

/// A device of a VM and its root port.
struct Device<'a> {
    id: &'a str,
    socket: &'a Path,
    transport: &'a str,
    vectors: u32,
    /// Bytes of the window above 4 GiB that the root port requests.
    window: u64,
    /// Number of the chassis that the user has chosen.
    chassis: Option<u8>,
}

impl Device<'_> {
    /// Returns QEMU's options and their values.
    fn arguments(&self) -> Result<Vec<(&'static str, String)>> {
        let id = self.id;
        let mut port = format!(
            "pcie-root-port,id={id}-port,chassis={},pref64-reserve={}G",
            self.chassis.unwrap_or(QEMU_CHASSIS),
            self.window >> 30
        );
        let mut arguments = Vec::new();
        if self.transport == VfioUser::NAME {
            // QEMU 11.1 ends itself when it unplugs such a device.
            port.push_str(",hotplug=off");
            arguments.push(("-device", port));
            arguments.push(("-device", vfio_user(id, self.socket)?));
            return Ok(arguments);
        }
        // QEMU splits its options at commas. A doubled comma is a comma.
        let path = self.socket.display().to_string().replace(',', ",,");
        let chardev = format!("socket,id={id}-socket,path={path}");
        arguments.push(("-chardev", chardev));
        arguments.push(("-device", port));
        let place = format!("id={id},bus={id}-port,chardev={id}-socket");
        let device = if self.transport == VhostUser::NAME {
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
            format!("ivshmem-doorbell,{place},vectors={}", self.vectors)
        };
        arguments.push(("-device", device));
        Ok(arguments)
    }

    /// Returns libvirt's own elements for an ivshmem device. libvirt then knows the socket, and
    /// permits it to QEMU. It has no element for the window of a root port, so the last element
    /// sets that property of QEMU's device.
    fn native_elements(&self) -> String {
        let Self {
            id,
            vectors,
            window,
            ..
        } = self;
        let path = escape(&self.socket.display().to_string());
        let index = self.chassis.unwrap_or(LIBVIRT_INDEX);
        format!(
            "<!-- in <devices>; if the domain has a controller {index}, choose another number with \
             the option chassis -->
<controller type='pci' index='{index}' model='pcie-root-port'>
  <alias name='ua-{id}-port'/>
</controller>
<shmem name='{id}'>
  <model type='ivshmem-doorbell'/>
  <server path='{path}'/>
  <msi vectors='{vectors}'/>
  <alias name='ua-{id}'/>
  <address type='pci' domain='0x0000' bus='0x{index:02x}' slot='0x00' function='0x0'/>
</shmem>
<!-- after </devices>, {NAMESPACE} -->
<qemu:override>
  <qemu:device alias='ua-{id}-port'>
    <qemu:frontend>
      <qemu:property name='pref64-reserve' type='unsigned' value='{window}'/>
    </qemu:frontend>
  </qemu:device>
</qemu:override>"
        )
    }

    /// Fails if the socket's path has a character that no XML text can have, or that an attribute
    /// does not keep.
    fn ensure_xml_can_express_it(&self) -> Result<()> {
        let path = utf8(self.socket)?;
        let odd = path.chars().find(|c| c.is_control());
        ensure!(
            odd.is_none(),
            "socket path {path:?} has a {:?}, which XML cannot express: serve at a path without it",
            odd.unwrap_or_default()
        );
        Ok(())
    }
}

/// Returns the element that passes arguments to QEMU, for devices that libvirt does not know.
fn in_command_line(arguments: Vec<(&str, String)>) -> String {
    let mut lines = vec![
        format!("<!-- after </devices>, {NAMESPACE} -->"),
        "<qemu:commandline>".to_owned(),
    ];
    for (name, value) in arguments {
        lines.push(format!("  <qemu:arg value='{name}'/>"));
        lines.push(format!("  <qemu:arg value='{}'/>", escape(&value)));
    }
    lines.push("</qemu:commandline>".to_owned());
    lines.join("\n")
}

fn utf8(socket: &Path) -> Result<&str> {
    socket.to_str().with_context(|| {
        format!(
            "socket path {} is not UTF-8, as QEMU and libvirt need it",
            socket.display()
        )
    })
}

/// Returns the `-device` argument for vfio-user. It is JSON text because QEMU takes the socket of
/// this device in no other form. Without `rombar`, QEMU would warn of a missing ROM.
fn vfio_user(id: &str, socket: &Path) -> Result<String> {
    let path = utf8(socket)?;
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
