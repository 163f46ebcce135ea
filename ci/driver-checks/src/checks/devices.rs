// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of binding: the devices that the driver takes, their nodes, and their descriptions.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result};
use barlink_protocol::wire::layout::Layout;
use barlink_protocol::wire::uapi::{ASK, BUFFER, CLAIM, DOORBELL, INFO, SUPERBLOCK, UAPI_VERSION};
use rustix::fs::{SealFlags, SeekFrom};
use rustix::io::Errno;

use crate::ask::{RAW, Region};
use crate::binding::{attribute, bind, bound, is_virtio, node, open, unbind};
use crate::device::{Device, UP, UP1, fails};
use crate::{host, module};

pub(super) fn nodes_are_numbered_and_private_to_root() -> Result<()> {
    module::unload()?;
    module::load()?;
    let devices = bound()?;
    let mut pci: Vec<_> = devices.iter().map(|device| device.pci.as_str()).collect();
    // Numbers follow the order of binding, which can differ from the order of addresses: PCI
    // devices and virtio devices are bound at different times.
    pci.sort_unstable();
    assert_eq!(pci, Region::TAKEN.map(|region| region.facts().pci));
    for (number, device) in devices.iter().enumerate() {
        assert_eq!(device.node, Path::new(&format!("/dev/barlink{number}")));
        let metadata = fs::metadata(&device.node)?;
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        assert_eq!((metadata.uid(), metadata.gid()), (0, 0));
    }
    Ok(())
}

pub(super) fn foreign_memory_is_declined() -> Result<()> {
    let declined = || -> Result<usize> {
        let line = |line: &&str| {
            line.contains(Region::Foreign.facts().pci)
                && line.contains("declined: no barlink region")
        };
        Ok(module::log()?.lines().filter(line).count())
    };
    let before = declined()?;
    module::unload()?;
    module::load()?;
    assert_eq!(declined()?, before + 1);
    assert!(attribute(Region::Foreign, "vendor").exists());
    assert!(!attribute(Region::Foreign, "driver").exists());
    Ok(())
}

pub(super) fn info_describes_each_device() -> Result<()> {
    for (region, address) in Region::TAKEN.into_iter().zip([0x0100, 0x0200, 0x0300]) {
        let info = open(region)?.info()?;
        let facts = region.facts();
        assert_eq!(
            (info.version, info.id, info.vectors),
            (UAPI_VERSION, facts.slot, facts.vectors)
        );
        assert_eq!(info.pci_address, address);
        assert_eq!(
            (info.region_size, info.mappable_size),
            (facts.size, region.mappable())
        );
        let resources = fs::read_to_string(attribute(region, "resource"))?;
        let bar = if is_virtio(region)? { 4 } else { 2 };
        let start = resources.lines().nth(bar).and_then(|bar| bar.get(2..18));
        let start = u64::from_str_radix(start.context("no such BAR")?, 16)?;
        assert_eq!(info.region_address, start);
        assert!(start >= 4 << 30, "BAR {bar} is below 4 GiB");
        // The broker's control socket is `control.sock`.
        let identity = info.identity();
        let superblock = Layout::decode(&host::page(region, 0)?, facts.size)?;
        assert_eq!(identity, superblock.identity);
        assert_eq!(identity.name.as_str(), "control");
        let shown = |name: &str| {
            let node = node(region)?.file_name().context("no name")?.to_owned();
            let attribute = Path::new("/sys/class/misc").join(node).join(name);
            Ok::<_, anyhow::Error>(fs::read_to_string(attribute)?)
        };
        assert_eq!(shown("name")?, "control\n");
        assert_eq!(shown("instance")?, format!("{}\n", identity.instance));
        assert_eq!((info.epoch % 2, info.epoch), (1, host::epoch(region)?));
        assert_eq!(
            (info.granted, info.asked, info.mapper, info.reserved),
            (0, 0, 0, 0)
        );
    }
    Ok(())
}

pub(super) fn devices_are_independent() -> Result<()> {
    let (main, bus) = (open(Region::Main)?, open(Region::Bus)?);
    let (in_main, in_bus) = (main.map(RAW, 4096)?, bus.map(RAW, 4096)?);
    in_main.write(0, 1);
    in_bus.write(0, 2);
    assert_eq!(host::word(Region::Main, RAW)?, 1);
    assert_eq!(host::word(Region::Bus, RAW)?, 2);
    host::ring_through(Region::Main, 1)?;
    assert!(main.is_readable()?);
    assert!(!bus.is_readable()?);
    // The other device receives its own interrupts.
    host::ring(Region::Bus, 2)?;
    assert_eq!(bus.next_interrupts(1)?, [2]);
    main.claim(UP)?;
    bus.claim(UP1)?;
    unbind(Region::Main)?;
    fails(main.info(), Errno::NODEV);
    bus.info()?;
    in_bus.write(0, 3);
    assert_eq!(host::word(Region::Bus, RAW)?, 3);
    bus.ring(Region::Bus.host(), 0)?;
    bind(Region::Main)
}

pub(super) fn unknown_calls_are_refused() -> Result<()> {
    let device = open(Region::Main)?;
    // Number 0; the numbers of other calls, and the first free number, with INFO's direction and
    // size; another type; INFO's number with CLAIM's direction and size; a terminal's ioctl
    // (TCGETS).
    for number in [
        0,
        INFO + 5,
        INFO + 6,
        INFO + 7,
        INFO + 8,
        INFO + 9,
        INFO + 0x100,
        CLAIM & !1,
        0x5401,
    ] {
        fails(device.ioctl_on_null(number), Errno::NOTTY);
    }
    for number in [INFO, CLAIM, DOORBELL, BUFFER, SUPERBLOCK, ASK] {
        fails(device.ioctl_on_null(number), Errno::FAULT);
    }
    fails(rustix::io::write(&device, &[0; 32]), Errno::INVAL);
    fails(rustix::io::pread(&device, &mut [0; 32], 0), Errno::SPIPE);
    fails(rustix::fs::seek(&device, SeekFrom::Start(0)), Errno::SPIPE);
    // The files of a device share an address space. The kernel must not take one for a memfd
    // because of that.
    fails(rustix::fs::fcntl_get_seals(&device), Errno::INVAL);
    fails(
        rustix::fs::fcntl_add_seals(&device, SealFlags::SEAL),
        Errno::INVAL,
    );
    Ok(())
}

pub(super) fn device_takes_smallest_free_number() -> Result<()> {
    let rebind = |order: [Region; 2]| -> Result<()> {
        let mut free = [node(Region::Main)?, node(Region::Bus)?];
        free.sort();
        unbind(Region::Main)?;
        unbind(Region::Bus)?;
        for (name, region) in free.iter().zip(order) {
            bind(region)?;
            assert_eq!(node(region)?, *name);
            Device::open(name)?;
        }
        Ok(())
    };
    rebind([Region::Bus, Region::Main])?;
    rebind([Region::Main, Region::Bus])
}
