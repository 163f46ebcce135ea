// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The cache mode of a guest's mappings: the mode asked for, the mode that the kernel granted, and
//! the reason if they differ.

use core::fmt::{self, Display, Formatter};
use core::ops::Deref;

use crate::region::Region;
use crate::sync::AtomicU64;
use crate::wire::layout::presence;
use crate::wire::uapi::{CacheMode, Info};

/// End of the 32-bit window, in bytes. Firmware covers all of the window that is not memory with an
/// uncachable MTRR.
const FOUR_GIB: u64 = 4 << 30;

/// The cache modes and the address of a region, as its guest's driver reports them. A guest can
/// write any number into its driver's page, so the numbers are unchecked.
///
/// ```
/// use barlink_protocol::CacheState;
/// use barlink_protocol::wire::uapi::{CacheMode, Info};
///
/// let info = Info {
///     asked: CacheMode::WriteBack as u32,
///     granted: CacheMode::UncachedMinus as u32,
///     region_address: 0xc000_0000,
///     ..Info::default()
/// };
/// let shortfall = CacheState::of(&info).shortfall().expect("the modes differ");
/// println!("{shortfall}: {}", shortfall.cure());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheState {
    asked: u64,
    granted: u64,
    address: u64,
}

impl CacheState {
    /// Takes the state from the driver's answer to a process of its own guest.
    pub fn of(info: &Info) -> Self {
        CacheState {
            asked: info.asked.into(),
            granted: info.granted.into(),
            address: info.region_address,
        }
    }

    /// Reads the state from a driver's page, at this offset of the region.
    pub fn read<M: Deref<Target = [AtomicU64]>>(region: &Region<M>, page: u64) -> Self {
        let word = region.load(page + presence::CACHE);
        CacheState {
            asked: word >> 8,
            granted: word & 0xff,
            address: region.load(page + presence::ADDRESS),
        }
    }

    /// Returns the name of the mode that was asked for; `None` if nothing is mapped.
    pub fn asked(&self) -> Option<&'static str> {
        name(
            self.asked,
            mode(self.asked).filter(|mode| mode.can_be_asked_for()),
        )
    }

    /// Returns the name of the mode that was granted; `None` if no page is mapped.
    pub fn granted(&self) -> Option<&'static str> {
        name(self.granted, mode(self.granted))
    }

    /// Returns the reason for a difference, if both numbers are modes and differ.
    pub fn shortfall(&self) -> Option<Shortfall> {
        Shortfall::find(mode(self.asked)?, mode(self.granted)?, self.address)
    }
}

fn mode(number: u64) -> Option<CacheMode> {
    CacheMode::from_number(u32::try_from(number).ok()?)
}

fn name(number: u64, mode: Option<CacheMode>) -> Option<&'static str> {
    (number != 0).then(|| mode.map_or("unknown", CacheMode::name))
}

/// Reason why the kernel granted another mode than was asked for. Its `Display` text is the cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortfall {
    /// The region lies in the 32-bit window.
    BelowFourGib {
        /// Guest-physical address of the region.
        address: u64,
    },
    /// Another cause, which files of the guest's kernel show ([`Shortfall::cure`]).
    Elsewhere {
        /// Guest-physical address of the region.
        address: u64,
    },
}

impl Shortfall {
    /// Finds the reason why a region at this guest-physical address has another mode than was asked
    /// for. `None` if the modes are the same.
    pub fn find(asked: CacheMode, granted: CacheMode, address: u64) -> Option<Self> {
        // An uncachable MTRR does not prevent write-combining.
        let is_mtrr = asked == CacheMode::WriteBack && address < FOUR_GIB;
        (asked != granted).then_some(match is_mtrr {
            true => Shortfall::BelowFourGib { address },
            false => Shortfall::Elsewhere { address },
        })
    }

    /// Returns the remedy, as a text for the user.
    pub const fn cure(self) -> &'static str {
        match self {
            Shortfall::BelowFourGib { .. } => {
                "start QEMU with `-device pcie-root-port,id=barlink-port,chassis=64,pref64-reserve=8G` and \
                 `bus=barlink-port` on the device, as `barlink qemu-args` prints it; or with 3 GiB of RAM or more"
            }
            Shortfall::Elsewhere { .. } => {
                "look in the guest's /sys/kernel/debug/x86/pat_memtype_list and /proc/mtrr for other mappings of these addresses, and their modes"
            }
        }
    }
}

impl Display for Shortfall {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Shortfall::BelowFourGib { address } => write!(
                f,
                "BAR at {address:#x} lies below 4 GiB, under an uncachable MTRR"
            ),
            Shortfall::Elsewhere { address } => write!(
                f,
                "BAR at {address:#x}: another mapping, MTRR or PAT decides"
            ),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    extern crate std;
    use std::string::ToString;
    use std::vec::Vec;

    use super::*;

    #[test]
    fn shortfall_explains_denied_write_back() {
        use CacheMode::{UncachedMinus, WriteBack, WriteCombining};
        let find = Shortfall::find;
        let low = find(WriteBack, UncachedMinus, 0xfd00_0000).unwrap();
        assert_eq!(
            low.to_string(),
            "BAR at 0xfd000000 lies below 4 GiB, under an uncachable MTRR"
        );
        assert!(low.cure().contains("pref64-reserve=8G"));
        for (asked, address) in [(WriteBack, FOUR_GIB), (WriteCombining, 0xfd00_0000)] {
            let other = find(asked, UncachedMinus, address);
            assert_eq!(other, Some(Shortfall::Elsewhere { address }));
        }
        for mode in [UncachedMinus, WriteCombining, WriteBack] {
            assert_eq!(find(mode, mode, 0), None);
        }
    }

    #[test]
    fn invalid_mode_numbers_read_as_unknown() {
        for number in (0..64).map(|bit| 1 << bit).chain([0, 3, 5, 6, 7, u64::MAX]) {
            let memory: Vec<_> = [0, number, number].map(AtomicU64::new).into();
            let state = CacheState::read(&Region::new(memory), 0);
            let (asked, granted) = (number >> 8, number & 0xff);
            let modes = [
                "uncached-minus",
                "uncached",
                "write-combining",
                "write-through",
                "write-protected",
                "write-back",
            ];
            let expected = match granted {
                0 => None,
                known @ 1..=6 => Some(modes[known as usize - 1]),
                _ => Some("unknown"),
            };
            assert_eq!(state.granted(), expected, "{number:#x}");
            let expected = match asked {
                0 => None,
                known @ (1 | 3 | 6) => Some(modes[known as usize - 1]),
                _ => Some("unknown"),
            };
            assert_eq!(state.asked(), expected, "{number:#x}");
            if let Some(shortfall) = state.shortfall() {
                assert!(shortfall.to_string().contains("BAR at 0x"));
            }
        }
    }
}
