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

/// How a mapping is made: checked, and small enough for an area's private word.
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

    /// The same as a number, and back: for an area's private word, and a file's.
    pub(crate) fn word(self) -> u32 {
        self.cache.map_or(0, |mode| mode as u32) << 8 | u32::from(self.on_touch)
    }

    /// See [`Manner::word`]. What is none is the default.
    pub(crate) fn from_word(word: u32) -> Self {
        Manner::new(word >> 8, word & 0xff).unwrap_or(Manner::DEFAULT)
    }
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
    /// The process that has made the first of them.
    mapper: u32,
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

    /// Counts a new area of a process, and says whether it may be as it is: `EBUSY` as for [`Areas::mode`]. Whatever the result is, it has
    /// to be taken away again.
    pub(crate) fn add(&mut self, manner: Manner, process: u32) -> Result {
        let mode = self.mode(manner.cache);
        self.count(manner);
        if self.asked.is_none() {
            self.asked = manner.cache;
            self.mapper = process;
        }
        mode.map(drop)
    }

    /// Counts one more of a kind that there is: one was split, moved or forked.
    pub(crate) fn count(&mut self, manner: Manner) {
        *self.kind(manner) += 1;
    }

    /// Takes an area away. True if pages that were touched have to be mapped anew, since the kernel may have known their mode by this
    /// area alone.
    pub(crate) fn remove(&mut self, manner: Manner) -> bool {
        let kind = self.kind(manner);
        // Every area was counted.
        *kind = kind.saturating_sub(1);
        if self.whole + self.touched == 0 {
            *self = Areas::default();
        }
        !manner.on_touch && self.have_touched()
    }

    /// Whether pages may be mapped that the kernel has granted another mode than it will to a new area that is mapped at once.
    pub(crate) fn have_touched(&self) -> bool {
        self.touched > 0
    }

    /// Notes what was granted.
    pub(crate) fn note_granted(&mut self, granted: u32) {
        self.granted = granted;
    }

    /// What was asked for and what was granted, as [`crate::wire::uapi::Info`] has it, and who was first.
    pub(crate) fn told(&self) -> (u32, u32, u32) {
        let asked = self.asked.map_or(0, |mode| mode as u32);
        (asked, self.granted, self.mapper)
    }

    fn kind(&mut self, manner: Manner) -> &mut usize {
        if manner.on_touch {
            &mut self.touched
        } else {
            &mut self.whole
        }
    }
}
