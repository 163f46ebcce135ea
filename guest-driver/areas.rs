// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The memory areas that processes have mapped a region into, and the cache mode that all of them have.
//!
//! x86 refuses, or silently changes, the mode of a mapping that overlaps one of another mode. So while one
//! lives, the others are asked for with the same mode, or refused.

#![forbid(unsafe_code)]

use crate::wire::uapi::{
    CacheMode,
    ON_TOUCH, //
};
use kernel::prelude::*;

/// How a mapping is made: checked, and small enough for a file's word and an area's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Manner {
    /// `None` is the mode of the mappings that live, noncached if there are none.
    pub(crate) cache: Option<CacheMode>,
    /// Pages are mapped when they are touched.
    pub(crate) on_touch: bool,
}

impl Manner {
    /// What the driver does of itself.
    pub(crate) const DEFAULT: Self = Manner {
        cache: Some(CacheMode::UncachedMinus),
        on_touch: false,
    };

    /// That of a [`crate::wire::uapi::Map`]. `EINVAL` if it is none.
    pub(crate) fn new(cache: u32, flags: u32) -> Result<Self> {
        let mode = CacheMode::from_number(cache).filter(|mode| mode.can_be_asked_for());
        if (mode.is_none() && cache != 0) || flags & !ON_TOUCH != 0 {
            return Err(EINVAL);
        }
        Ok(Manner {
            cache: mode,
            on_touch: flags & ON_TOUCH != 0,
        })
    }

    /// The same as a number, and back.
    pub(crate) fn word(self) -> u32 {
        self.cache.map_or(0, |mode| mode as u32) << 8 | u32::from(self.on_touch)
    }

    /// See [`Manner::word`]. What is none is the default.
    pub(crate) fn from_word(word: u32) -> Self {
        Manner::new(word >> 8, word & 0xff).unwrap_or(Manner::DEFAULT)
    }
}

/// What is known of an area. Split, moved and forked it stays so, and a child's names the parent: which process the new one is of, the
/// kernel does not tell.
#[derive(Clone, Copy)]
pub(crate) struct Area {
    pub(crate) manner: Manner,
    /// Which has mapped it, by its number in the initial PID namespace.
    pub(crate) process: u32,
}

impl Area {
    /// The same as a number, and back: for the area's private word.
    pub(crate) fn word(self) -> u64 {
        u64::from(self.process) << 32 | u64::from(self.manner.word())
    }

    /// See [`Area::word`].
    pub(crate) fn from_word(word: u64) -> Self {
        Area {
            // CAST: The lower half, then the upper one.
            manner: Manner::from_word(word as u32),
            process: (word >> 32) as u32,
        }
    }
}

/// A process, and how many areas name it.
struct Mapper {
    process: u32,
    areas: usize,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Areas {
    /// Those that were mapped at once, and those whose pages are mapped when they are touched.
    whole: usize,
    touched: usize,
    /// What they were asked for with, while there are any.
    asked: Option<CacheMode>,
    /// What the kernel made of it when it last mapped something: a [`CacheMode`], or 0.
    granted: u32,
    /// The same, but of areas that are mapped at once: what is there when the other pages are taken away.
    granted_whole: u32,
    /// Who has made them, in the order of their first ones.
    mappers: KVec<Mapper>,
}

impl Areas {
    /// The mode of a mapping that is to be made. `EBUSY` if those that live have another.
    pub(crate) fn mode(&self, wish: Option<CacheMode>) -> Result<CacheMode> {
        match (self.asked, wish) {
            (Some(asked), Some(wish)) if asked != wish => Err(EBUSY),
            (Some(asked), _) => Ok(asked),
            (None, wish) => Ok(wish.unwrap_or(CacheMode::UncachedMinus)),
        }
    }

    /// Counts a new area, and says whether it may be as it is: `EBUSY` as for [`Areas::mode`], `ENOMEM`. Whatever the result is, it has
    /// to be taken away again.
    pub(crate) fn add(&mut self, area: Area) -> Result {
        let mode = self.mode(area.manner.cache);
        if self.asked.is_none() {
            self.asked = area.manner.cache;
        }
        let is_known = self.mapper(area).is_some();
        self.count(area);
        if !is_known {
            let mapper = Mapper {
                process: area.process,
                areas: 1,
            };
            self.mappers.push(mapper, GFP_KERNEL)?;
        }
        mode.map(drop)
    }

    /// Counts one more of which there is one already: it was split, moved or forked.
    pub(crate) fn count(&mut self, area: Area) {
        *self.kind(area.manner) += 1;
        if let Some(mapper) = self.mapper(area) {
            mapper.areas += 1;
        }
    }

    /// Takes an area away. True if pages that were touched have to be mapped anew, since the kernel may have known their mode by this
    /// area alone; none of them counts any more in [`Areas::told`].
    pub(crate) fn remove(&mut self, area: Area) -> bool {
        let kind = self.kind(area.manner);
        // Every area was counted.
        *kind = kind.saturating_sub(1);
        // Unless there was no memory to note who made it.
        if let Some(mapper) = self.mapper(area) {
            mapper.areas = mapper.areas.saturating_sub(1);
        }
        self.mappers.retain(|mapper| mapper.areas > 0);
        if self.whole + self.touched == 0 {
            *self = Areas::default();
        }
        if self.whole == 0 {
            self.granted_whole = 0;
        }
        let anew = !area.manner.on_touch && self.have_touched();
        if anew || !self.have_touched() {
            self.granted = self.granted_whole;
        }
        anew
    }

    /// Whether pages may be mapped that the kernel has granted another mode than it will to a new area that is mapped at once.
    pub(crate) fn have_touched(&self) -> bool {
        self.touched > 0
    }

    /// Whether there are areas that were mapped at once, and the kernel so knows a mode of some pages, and none of others.
    pub(crate) fn have_whole(&self) -> bool {
        self.whole > 0
    }

    /// Notes what was granted to a page that was touched.
    pub(crate) fn note_granted(&mut self, granted: u32) {
        self.granted = granted;
    }

    /// Notes what was granted to an area that was mapped at once.
    pub(crate) fn note_granted_whole(&mut self, granted: u32) {
        self.granted = granted;
        self.granted_whole = granted;
    }

    /// What was asked for and what was granted, and who made one, as [`crate::wire::uapi::Info`] has it.
    pub(crate) fn told(&self) -> (u32, u32, u32) {
        let asked = self.asked.map_or(0, |mode| mode as u32);
        let mapper = self.mappers.first().map_or(0, |mapper| mapper.process);
        (asked, self.granted, mapper)
    }

    fn mapper(&mut self, area: Area) -> Option<&mut Mapper> {
        let mut mappers = self.mappers.iter_mut();
        mappers.find(|mapper| mapper.process == area.process)
    }

    fn kind(&mut self, manner: Manner) -> &mut usize {
        if manner.on_touch {
            &mut self.touched
        } else {
            &mut self.whole
        }
    }
}
