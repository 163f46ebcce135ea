// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The cache mode that the kernel granted to a mapping, from its list of modes
//! (`Documentation/arch/x86/pat.rst`), which only root may read.

use barlink_protocol::wire::uapi::CacheMode;

/// The kernel's list.
const LIST: &str = "/sys/kernel/debug/x86/pat_memtype_list";

/// Number of a mode that is not known. No [`CacheMode`] has it.
pub(super) const UNKNOWN: u32 = 0xff;

/// Returns the mode of the page at a guest-physical address, if this process may know it.
pub(super) fn granted(address: u64) -> Option<CacheMode> {
    find(&std::fs::read_to_string(LIST).ok()?, address)
}

/// Finds the mode of an address in the list. All entries that overlap have the same mode.
fn find(list: &str, address: u64) -> Option<CacheMode> {
    list.lines().find_map(|line| {
        let (range, mode) = line.strip_prefix("PAT: [mem ")?.split_once("] ")?;
        let (start, end) = range.split_once('-')?;
        let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
        let is_inside = (number(start)?..number(end)?).contains(&address);
        let mut modes = (1..=6).filter_map(CacheMode::from_number);
        modes.find(|known| is_inside && known.name() == mode.trim_end())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mode_is_found_by_address() {
        let list = "PAT memtype list:\n\
            PAT: [mem 0x00000000fed00000-0x00000000fed01000] uncached\n\
            PAT: [mem 0x0000000380000000-0x00000003803ff000] write-combining\n";
        assert_eq!(find(list, 0xfed0_0000), Some(CacheMode::Uncached));
        assert_eq!(find(list, 0x3_803f_e000), Some(CacheMode::WriteCombining));
        for address in [0, 0x3_803f_f000, 0x3_7fff_f000] {
            assert_eq!(find(list, address), None);
        }
    }
}
