// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of `barlink qemu-args --libvirt`, some with libvirt's own validator.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::support::*;

/// Starts a broker with slots of all transports, whose sockets have characters that XML escapes.
fn serve_all() -> Broker {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (user, vhost) = (path("user, '1' &<2>.sock"), path("vhost &amp; 'x'.sock"));
    let odd = path("vm, 'a' & \"b\" <c>.sock");
    let vms = ["--vfio-user", &user, "--vhost-user", &vhost];
    Broker::start_in(folder, &[&vms[..], &["--ivshmem", &odd]].concat())
}

/// Returns a domain with what `barlink qemu-args --libvirt` printed in the places that its comments
/// name.
fn domain(printed: &[String]) -> String {
    let (mut devices, mut rest) = (String::new(), String::new());
    for printed in printed {
        let parts = printed.split_once("<!-- after </devices>");
        let (device, last) = parts.expect("no comment names the place after <devices>");
        devices += device;
        rest += &format!("<!-- after </devices>{last}");
    }
    format!(
        "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>vm1</name>
<memory unit='GiB'>2</memory>
<os><type arch='x86_64' machine='q35'>hvm</type></os>
<devices>
{devices}</devices>
{rest}</domain>
"
    )
}

/// Returns the error of libvirt's validator, if it rejects a domain.
fn rejection(domain: &str) -> Option<String> {
    // The type of the document is named, so that the tool does not look for it.
    let mut validator = Command::new("virt-xml-validate")
        .args(["-", "domain"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .start();
    let mut input = validator.stdin.take().unwrap();
    input.write_all(domain.as_bytes()).unwrap();
    drop(input);
    let errors = errors_of(&mut validator);
    (!wait(&mut validator).success()).then_some(errors)
}

/// Returns whether libvirt's validator is there. If not, it prints that a part of the test is not
/// run.
fn has_validator() -> bool {
    // Debian's virt-xml-validate is a script that calls xmllint.
    let missing = ["virt-xml-validate", "xmllint"].into_iter().find(|name| {
        let folders = std::env::var_os("PATH").unwrap_or_default();
        !std::env::split_paths(&folders).any(|folder| folder.join(name).is_file())
    });
    if let Some(name) = missing {
        eprintln!(
            "without {name} (Debian: libvirt-clients and libxml2-utils) no domain is validated"
        );
    }
    missing.is_none()
}

#[test]
fn libvirt_gets_native_ivshmem_device() {
    let broker = Broker::start(&["--size", "8G", "--channel", "a=up,64K"]);
    let args = ["qemu-args", "--libvirt", "--id", "two", "--chassis", "32"];
    let printed = works(&mut broker.app(&args));
    let socket = broker.path("vm.sock");
    let vectors = broker.attach().layout().vectors;
    let expected = format!(
        "<!-- in <devices>; if the domain has a controller 32, choose another number \
         with the option chassis -->
<controller type='pci' index='32' model='pcie-root-port'>
  <alias name='ua-two-port'/>
</controller>
<shmem name='two'>
  <model type='ivshmem-doorbell'/>
  <server path='{}'/>
  <msi vectors='{vectors}'/>
  <alias name='ua-two'/>
  <address type='pci' domain='0x0000' bus='0x20' slot='0x00' function='0x0'/>
</shmem>
<!-- after </devices>, in <domain type='kvm' \
         xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'> -->
<qemu:override>
  <qemu:device alias='ua-two-port'>
    <qemu:frontend>
      <qemu:property name='pref64-reserve' type='unsigned' value='{}'/>
    </qemu:frontend>
  </qemu:device>
</qemu:override>
",
        socket.display(),
        16_u64 << 30,
    );
    assert_eq!(printed, expected);
    let default = works(&mut broker.app(&["qemu-args", "--libvirt"]));
    assert!(default.contains("index='16'") && default.contains("bus='0x10'"));
}

#[test]
fn libvirt_validates_devices_of_all_transports() {
    if !has_validator() {
        return;
    }
    let broker = serve_all();
    let printed = |slot| works(&mut broker.app(&["qemu-args", "--libvirt", "--slot", slot]));
    for slot in ["0", "1", "2", "3"] {
        let domain = domain(&[printed(slot)]);
        assert_eq!(rejection(&domain), None, "slot {slot}: {domain}");
    }
    // The validator looks at all that was printed.
    let domain = domain(&[printed("0")]);
    for (part, wrong) in [
        ("ivshmem-doorbell", "ivshmem-other"),
        ("<server path='/", "<server path='"),
        ("vectors='", "vectors='x"),
        ("index='16'", "index='x'"),
        ("type='unsigned'", "type='size'"),
    ] {
        assert!(domain.contains(part), "{part}");
        assert!(
            rejection(&domain.replace(part, wrong)).is_some(),
            "{wrong} passes"
        );
    }
}

#[test]
fn libvirt_rejects_paths_that_xml_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (bell, tab) = (path("a\u{7}.sock"), path("a\tb.sock"));
    let broker = Broker::start_in(folder, &["--ivshmem", &bell, "--vhost-user", &tab]);
    for slot in ["1", "2"] {
        fails(
            &mut broker.app(&["qemu-args", "--libvirt", "--slot", slot]),
            1,
            &["which XML cannot express", "serve at a path without it"],
        );
    }
}
