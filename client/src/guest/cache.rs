// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which cache mode a region is mapped in, and which is the fastest.

use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::hint::black_box;
use std::time::{Duration, Instant};

use barlink_protocol::wire::uapi::{CacheMode, Info};
use rustix::io::Errno;

use crate::guest::device::{map_in, region};
use crate::memory::Mapping;

/// In which cache mode a region is to be mapped. While a mapping of it lives, all are in one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// The mode of the region's live mappings, whichever process has them; noncached if there are none.
    #[default]
    Same,
    /// Noncached: each access is one of the bus's. It is reported as uncached-minus.
    Noncached,
    /// Write-combining: stores are gathered, and loads are as noncached ones.
    WriteCombining,
    /// Write-back, as the guest's own memory. It needs a device above 4 GiB, or uncached-minus is granted.
    WriteBack,
    /// The fastest mode that the guest's kernel grants, by a short measurement; [`Cache::Same`] if the region is mapped.
    Auto,
}

impl Cache {
    /// Those that a driver is asked for, the preferred ones first.
    const MODES: [Cache; 3] = [Cache::WriteBack, Cache::WriteCombining, Cache::Noncached];

    /// Which mode the driver is to be asked for, if any.
    pub(crate) fn mode(self) -> Option<CacheMode> {
        match self {
            Cache::Same | Cache::Auto => None,
            Cache::Noncached => Some(CacheMode::UncachedMinus),
            Cache::WriteCombining => Some(CacheMode::WriteCombining),
            Cache::WriteBack => Some(CacheMode::WriteBack),
        }
    }

    /// Its name, as an option of the program has it.
    pub fn name(self) -> &'static str {
        match self {
            Cache::Same => "same",
            Cache::Noncached => "noncached",
            Cache::WriteCombining => "write-combining",
            Cache::WriteBack => "write-back",
            Cache::Auto => "auto",
        }
    }

    /// The one that asks for a mode by this number.
    pub(crate) fn from_number(number: u32) -> Option<Self> {
        let mode = CacheMode::from_number(number)?;
        let mut all = Cache::MODES.into_iter();
        all.find(|cache| cache.mode() == Some(mode))
    }
}

/// Bytes that are mapped to be read, less than a second-level cache has, and how many are read in one go.
const WINDOW: u64 = 256 << 10;
const PART: usize = 16 << 10;
/// How often each mode is tried, in turn, so that what the first one pays for is not held against it; and for how long.
const ROUNDS: usize = 3;
const TIME: Duration = Duration::from_millis(1);
/// A mode is preferred to others that are faster by less than this.
const MARGIN: f64 = 1.1;

/// What [`Cache::Auto`] has come to. Shown, it says why.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The mode to ask for; [`Cache::Same`] if the region was mapped already.
    pub cache: Cache,
    /// Bytes a second that were read in each mode, which is `None` where the kernel granted another.
    pub speeds: Vec<(Cache, Option<f64>)>,
}

impl Choice {
    /// That of a region that is mapped.
    pub(crate) const SAME: Choice = Choice {
        cache: Cache::Same,
        speeds: Vec::new(),
    };

    /// Tries what there is. `open` gives a file of the device and what the driver says, `info` the latter again.
    pub(crate) fn find<E>(
        open: impl Fn() -> Result<(File, Info), E>,
        info: impl Fn(&File) -> Result<Info, E>,
        failed: impl Fn(Errno) -> E,
    ) -> Result<Self, E> {
        let mut speeds = Cache::MODES.map(|cache| (cache, None));
        for turn in 0..ROUNDS * speeds.len() {
            let (cache, best) = &mut speeds[turn % Cache::MODES.len()];
            // A file of its own, since a file keeps its mode.
            let (file, before) = open()?;
            if before.asked != 0 {
                return Ok(Choice::SAME);
            }
            let size = before.mappable_size.min(WINDOW) as usize;
            let mapping = match map_in(&file, size, cache.mode()) {
                Err(Errno::BUSY) => return Ok(Choice::SAME),
                mapping => mapping.map_err(&failed)?,
            };
            let granted = info(&file)?.granted;
            if cache.mode().map(|mode| mode as u32) == Some(granted) {
                let speed = read_speed(&mapping, granted);
                *best = Some(best.map_or(speed, |best: f64| best.max(speed)));
            }
        }
        Ok(Choice {
            cache: fastest(&speeds),
            speeds: speeds.into(),
        })
    }
}

/// Bytes a second of the fastest of many copies, since what held up the others was somebody else. Nothing is written: all of
/// the region can be in use.
fn read_speed(mapping: &Mapping, granted: u32) -> f64 {
    let region = region(mapping, granted);
    let mut bytes = [0; PART];
    let parts = (region.size() as usize / PART).max(1);
    let length = PART.min(region.size() as usize);
    let (start, mut best) = (Instant::now(), Duration::MAX);
    for count in 0.. {
        let part = count % parts;
        let before = Instant::now();
        region.copy_out((part * PART) as u64, &mut bytes[..length]);
        black_box(&mut bytes);
        best = best.min(before.elapsed());
        // All of it once, however long this process was kept from running.
        if count >= parts && start.elapsed() >= TIME {
            break;
        }
    }
    length as f64 / best.as_secs_f64().max(1e-9)
}

/// The first of these that no other one surpasses by more than the margin; noncached if none was granted.
fn fastest(speeds: &[(Cache, Option<f64>)]) -> Cache {
    let granted = || {
        speeds
            .iter()
            .filter_map(|&(cache, speed)| Some((cache, speed?)))
    };
    let best = granted().map(|(_, speed)| speed).fold(0.0, f64::max);
    let mut near = granted().filter(|(_, speed)| speed * MARGIN >= best);
    near.next().map_or(Cache::Noncached, |(cache, _)| cache)
}

impl Display for Choice {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.cache == Cache::Same {
            return write!(f, "as in the mappings that are there already");
        }
        write!(f, "{}", self.cache.name())?;
        for (index, (cache, speed)) in self.speeds.iter().enumerate() {
            let before = if index == 0 { ": reads by" } else { "," };
            write!(f, "{before} {} ", cache.name())?;
            match speed {
                Some(speed) => write!(f, "{:.0} MB/s", speed / 1e6)?,
                None => write!(f, "not granted")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_modes_that_are_about_as_fast_the_most_cached_is_chosen() {
        let choose = |speeds: [Option<f64>; 3]| {
            let speeds: Vec<_> = Cache::MODES.into_iter().zip(speeds).collect();
            fastest(&speeds)
        };
        assert_eq!(
            choose([Some(95.0), Some(100.0), Some(99.0)]),
            Cache::WriteBack
        );
        assert_eq!(
            choose([Some(90.0), Some(95.0), Some(100.0)]),
            Cache::WriteCombining
        );
        assert_eq!(
            choose([Some(50.0), Some(50.0), Some(100.0)]),
            Cache::Noncached
        );
        assert_eq!(
            choose([None, Some(95.0), Some(100.0)]),
            Cache::WriteCombining
        );
        assert_eq!(choose([None; 3]), Cache::Noncached);
    }

    #[test]
    fn modes_are_found_by_their_numbers() {
        for cache in Cache::MODES {
            let number = cache.mode().map(|mode| mode as u32).unwrap();
            assert_eq!(Cache::from_number(number), Some(cache));
        }
    }

    #[test]
    fn a_choice_says_why() {
        let choice = Choice {
            cache: Cache::WriteCombining,
            speeds: vec![
                (Cache::WriteBack, None),
                (Cache::WriteCombining, Some(2.5e9)),
            ],
        };
        assert_eq!(
            choice.to_string(),
            "write-combining: reads by write-back not granted, write-combining 2500 MB/s"
        );
    }
}
