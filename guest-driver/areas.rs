// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The memory areas into which processes have mapped a region, and their common cache mode.
//!
//! x86 rejects or silently changes the mode of a mapping that overlaps a mapping of another mode.
//! Therefore all mappings of a region have the same mode. The areas of files that are open for
//! writing determine it: while one exists, a request for another mode fails. The areas of read-only
//! files follow it. They determine the mode of others never, and their own only while no other area
//! exists, so that a process that may only read cannot slow the writers down.

#![forbid(unsafe_code)]

use crate::wire::uapi::{
    CacheMode,
    ON_FAULT, //
};
use kernel::prelude::*;

/// Validated options of a mapping, which fit into one word of a file or an area.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct MapOptions {
    /// Requested cache mode. `None` means the mode of the existing mappings, or noncached if there
    /// are none.
    pub(crate) cache: Option<CacheMode>,
    /// Pages are mapped on fault instead of eagerly.
    pub(crate) on_fault: bool,
}

impl MapOptions {
    /// Options of a file that has not set any: the mode of the existing mappings, mapped eagerly.
    pub(crate) const DEFAULT: Self = MapOptions {
        cache: None,
        on_fault: false,
    };

    /// Validates the fields of a [`crate::wire::uapi::Map`]. `EINVAL` if a field has no valid
    /// value.
    pub(crate) fn new(cache: u32, flags: u32) -> Result<Self> {
        let mode = CacheMode::from_number(cache).filter(|mode| mode.can_be_asked_for());
        if (mode.is_none() && cache != 0) || flags & !ON_FAULT != 0 {
            return Err(EINVAL);
        }
        Ok(MapOptions {
            cache: mode,
            on_fault: flags & ON_FAULT != 0,
        })
    }

    /// Packs the options into a number: the cache mode from bit 8 on, `on_fault` in bit 0.
    pub(crate) fn word(self) -> u32 {
        self.cache.map_or(0, |mode| mode as u32) << 8 | u32::from(self.on_fault)
    }

    /// Unpacks a [`MapOptions::word`]. An invalid word gives the default.
    pub(crate) fn from_word(word: u32) -> Self {
        MapOptions::new(word >> 8, word & 0xff).unwrap_or(MapOptions::DEFAULT)
    }
}

/// The options and the process of one area. A split or moved area keeps them. After a fork, the
/// child's copy still names the parent, because the kernel does not tell a driver which process the
/// copy belongs to.
#[derive(Clone, Copy)]
pub(crate) struct Area {
    pub(crate) options: MapOptions,
    /// The file is read-only, so the area follows the mode of the others.
    pub(crate) follows: bool,
    /// Process that mapped the area: its PID in the initial PID namespace.
    pub(crate) process: u32,
}

/// The bit of an [`Area::word`] that says that the area follows. [`MapOptions::word`] has lower
/// bits.
const FOLLOWS: u32 = 1 << 31;

impl Area {
    /// Packs the area into a number for its private word: the process from bit 32 on, the options
    /// below.
    pub(crate) fn word(self) -> u64 {
        let follows = if self.follows { FOLLOWS } else { 0 };
        u64::from(self.process) << 32 | u64::from(self.options.word() | follows)
    }

    /// Unpacks an [`Area::word`].
    pub(crate) fn from_word(word: u64) -> Self {
        // CAST: The lower half of the word, then its upper half.
        let lower = word as u32;
        Area {
            options: MapOptions::from_word(lower & !FOLLOWS),
            follows: lower & FOLLOWS != 0,
            process: (word >> 32) as u32,
        }
    }
}

/// A process, and the number of areas that name it.
struct Mapper {
    process: u32,
    areas: usize,
}

/// The areas of one region.
#[derive(Default)]
pub(crate) struct Areas {
    /// Number of areas that determine the mode and are mapped eagerly, of those that determine it
    /// and are mapped on fault, and of those that follow.
    eager: usize,
    on_fault: usize,
    following: usize,
    /// Cache mode that the areas that determine it were requested with; `None` while there are
    /// none.
    asked: Option<CacheMode>,
    /// Cache mode that the first area that follows was requested with, if any. It is in force while
    /// all areas follow.
    preferred: Option<CacheMode>,
    /// Number of the [`CacheMode`] that the kernel granted to a page of an existing area, or 0
    /// while no page was mapped.
    granted: u32,
    /// Processes that have areas that determine the mode, in the order of their first ones.
    mappers: KVec<Mapper>,
}

impl Areas {
    /// Returns the mode that a new area gets if it determines the mode. `EBUSY` if the existing
    /// areas have another one.
    pub(crate) fn mode(&self, requested: Option<CacheMode>) -> Result<CacheMode> {
        match (self.asked, requested) {
            (Some(asked), Some(requested)) if asked != requested => Err(EBUSY),
            (Some(asked), _) => Ok(asked),
            (None, requested) => Ok(requested.unwrap_or(CacheMode::UncachedMinus)),
        }
    }

    /// Returns the mode of all areas, noncached if none was requested.
    pub(crate) fn common_mode(&self) -> CacheMode {
        let mode = self.asked.or(self.preferred);
        mode.unwrap_or(CacheMode::UncachedMinus)
    }

    /// Counts a new area. Returns whether the areas that follow must be mapped anew, because it is
    /// the first one that determines the mode, or the first one that prefers one while all follow.
    ///
    /// `EBUSY` if [`Areas::mode`] rejects its mode, `ENOMEM`. The caller must remove the area
    /// later, even after an error.
    pub(crate) fn add(&mut self, area: Area) -> Result<bool> {
        let is_known = area.follows || self.mapper(area).is_some();
        self.count(area);
        if area.follows {
            let had_preference = self.preferred.is_some();
            self.preferred = self.preferred.or(area.options.cache);
            let is_new = self.preferred.is_some() && !had_preference;
            return Ok(is_new && self.asked.is_none());
        }
        let mode = self.mode(area.options.cache);
        let is_first = self.asked.is_none();
        if is_first {
            self.asked = area.options.cache;
        }
        if !is_known {
            let mapper = Mapper {
                process: area.process,
                areas: 1,
            };
            self.mappers.push(mapper, GFP_KERNEL)?;
        }
        mode.map(|_| is_first && self.following > 0)
    }

    /// Counts one more area that is a copy of a counted one, made by a split, a move or a fork.
    pub(crate) fn count(&mut self, area: Area) {
        *self.kind(area) += 1;
        if area.follows {
            return;
        }
        if let Some(mapper) = self.mapper(area) {
            mapper.areas += 1;
        }
    }

    /// Removes an area. Returns whether the areas that follow must be mapped anew, because it was
    /// the last one that determined the mode.
    pub(crate) fn remove(&mut self, area: Area) -> bool {
        let kind = self.kind(area);
        // No underflow: `add` or `count` has counted every area.
        *kind = kind.saturating_sub(1);
        if area.follows {
            if self.following == 0 {
                self.preferred = None;
            }
        } else {
            // There is no mapper if `add` ran out of memory.
            if let Some(mapper) = self.mapper(area) {
                mapper.areas = mapper.areas.saturating_sub(1);
            }
            self.mappers.retain(|mapper| mapper.areas > 0);
        }
        let had_mode = self.asked.is_some();
        if self.eager + self.on_fault == 0 {
            self.asked = None;
        }
        if self.eager + self.on_fault + self.following == 0 {
            *self = Areas::default();
        }
        had_mode && self.asked.is_none() && self.following > 0
    }

    /// Returns whether areas exist whose pages are mapped on fault. Their mode must be registered.
    pub(crate) fn have_on_fault(&self) -> bool {
        self.on_fault + self.following > 0
    }

    /// Returns the mode in which the kernel may map a page beside the mappings of processes, as the
    /// number of a [`CacheMode`], or 0 for noncached.
    pub(crate) fn kernel_mode(&self) -> u32 {
        match self.granted {
            // No page was mapped on fault yet.
            0 => self.common_mode() as u32,
            granted => granted,
        }
    }

    /// Records the mode that the kernel granted to a page; 0 if no page is mapped any more.
    pub(crate) fn note_granted(&mut self, granted: u32) {
        self.granted = granted;
    }

    /// Returns the requested mode, the granted mode and one process that has areas, as numbers of
    /// [`crate::wire::uapi::Info`]. While all areas follow, the mode is the one that they prefer,
    /// and there is no process.
    pub(crate) fn reported(&self) -> (u32, u32, u32) {
        let asked = self.asked.or(self.preferred).map_or(0, |mode| mode as u32);
        let mapper = self.mappers.first().map_or(0, |mapper| mapper.process);
        (asked, self.granted, mapper)
    }

    fn mapper(&mut self, area: Area) -> Option<&mut Mapper> {
        let mut mappers = self.mappers.iter_mut();
        mappers.find(|mapper| mapper.process == area.process)
    }

    fn kind(&mut self, area: Area) -> &mut usize {
        match area {
            Area { follows: true, .. } => &mut self.following,
            area if area.options.on_fault => &mut self.on_fault,
            _ => &mut self.eager,
        }
    }
}
