// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Addresses of PCI devices, as `lspci -D` prints them, and the texts by which programs name a
//! device without a driver.

use std::fmt::{self, Display, Formatter};
use std::path::Path;
use std::str::FromStr;

use crate::guest::direct::sysfs::error::SysfsError;
use crate::guest::direct::vfio;

/// The kernel's interface to a device without a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// The files of the device's folder in sysfs.
    Sysfs,
    /// The driver `vfio-pci`.
    Vfio,
}

impl Way {
    const ALL: [Way; 2] = [Way::Sysfs, Way::Vfio];

    /// Returns the text before an address by which a program names the device.
    const fn prefix(self) -> &'static str {
        match self {
            Way::Sysfs => "sysfs:",
            Way::Vfio => "vfio:",
        }
    }

    /// Returns the interface to a device that has this driver, `None` if the driver keeps programs
    /// away from it.
    pub(super) fn by_driver(driver: Option<&str>) -> Option<Self> {
        match driver {
            None => Some(Way::Sysfs),
            Some(vfio::DRIVER) => Some(Way::Vfio),
            Some(_) => None,
        }
    }

    /// Returns the text by which a program names the device.
    pub(crate) fn name(self, address: PciAddress) -> String {
        format!("{}{address}", self.prefix())
    }
}

/// The address of a PCI device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PciAddress(u32);

impl PciAddress {
    /// Returns the interface and the address that a program names, as by `sysfs:ADDRESS`; `None` if
    /// the text begins otherwise.
    pub(crate) fn named_by(device: &Path) -> Option<(Way, Result<Self, SysfsError>)> {
        let text = device.to_str()?;
        let mut ways = Way::ALL.into_iter();
        ways.find_map(|way| Some((way, text.strip_prefix(way.prefix())?.parse())))
    }

    /// Returns the number, as [`Info::pci_address`](barlink_protocol::wire::uapi::Info) has it.
    pub(crate) fn number(self) -> u32 {
        self.0
    }
}

impl FromStr for PciAddress {
    type Err = SysfsError;

    /// Parses `DDDD:BB:DD.F`. The domain can be left out.
    fn from_str(text: &str) -> Result<Self, SysfsError> {
        let part = |digits: &str, limit: u32| {
            let is_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            let number = u32::from_str_radix(digits, 16).ok()?;
            (is_hex && number <= limit).then_some(number)
        };
        let parse = || {
            let (rest, function) = text.split_once('.')?;
            let (bus, device) = rest.rsplit_once(':')?;
            let (domain, bus) = bus.split_once(':').unwrap_or(("0", bus));
            Some(PciAddress(
                part(domain, 0xffff)? << 16
                    | part(bus, 0xff)? << 8
                    | part(device, 0x1f)? << 3
                    | part(function, 7)?,
            ))
        };
        parse().ok_or_else(|| SysfsError::Address {
            text: text.to_owned(),
        })
    }
}

impl Display for PciAddress {
    /// Writes `DDDD:BB:DD.F`, the name of the device's folder in `/sys/bus/pci/devices`.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let number = self.0;
        let (domain, bus) = (number >> 16, number >> 8 & 0xff);
        let (device, function) = (number >> 3 & 0x1f, number & 7);
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_lspci() {
        for (text, number, whole) in [
            ("0000:01:00.0", 0x100, "0000:01:00.0"),
            ("01:00.0", 0x100, "0000:01:00.0"),
            ("fFfF:ff:1f.7", 0xffff_ffff, "ffff:ff:1f.7"),
        ] {
            let address: PciAddress = text.parse().unwrap();
            assert_eq!(
                (address.number(), address.to_string()),
                (number, whole.to_owned())
            );
        }
        for text in [
            "",
            "01:00",
            "01:00.8",
            "01:20.0",
            "100:00.0",
            "10000:01:00.0",
            "+1:00.0",
            "1:2:3:4.0",
        ] {
            let error = text.parse::<PciAddress>().unwrap_err().to_string();
            assert!(
                error.contains(&format!("invalid PCI address `{text}`")),
                "{error}"
            );
        }
    }

    #[test]
    fn prefix_names_device_without_driver() {
        let named = |text: &str| {
            let (way, address) = PciAddress::named_by(Path::new(text))?;
            Some((way, address.ok()))
        };
        let address: PciAddress = "01:00.0".parse().unwrap();
        for way in Way::ALL {
            assert_eq!(named(&way.name(address)), Some((way, Some(address))));
        }
        assert_eq!(named("sysfs:01:00.0"), Some((Way::Sysfs, Some(address))));
        assert_eq!(named("sysfs:vm1"), Some((Way::Sysfs, None)));
        assert_eq!(named("vfio:01:00.0"), Some((Way::Vfio, Some(address))));
        assert_eq!(named("/dev/barlink0"), None);
        assert_eq!(named("vm1"), None);
        assert_eq!(Way::Sysfs.name(address), "sysfs:0000:01:00.0");
    }
}
