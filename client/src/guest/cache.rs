// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The cache mode that a region is mapped in, and the choice of it by a measurement.

use std::fmt::{self, Display, Formatter};
use std::hint::black_box;
use std::str::FromStr;
use std::time::{Duration, Instant};

use barlink_protocol::wire::uapi::{CacheMode, Info};
use rustix::io::Errno;

use crate::guest::calls::region;
use crate::memory::Mapping;

/// The cache mode to request for a mapping. All live mappings of a region have the same mode. A
/// mapping for writing determines it; a mapping for reading gets the mode that it requested while
/// there is none for writing, and otherwise follows. Without the driver the kernel gives a mapping
/// for writing the mode of a mapping for reading that is there already.
///
/// ```no_run
/// use barlink::guest::{Cache, OpenOptions};
///
/// let mode: Cache = std::env::var("CACHE")
///     .unwrap_or("auto".to_owned())
///     .parse()?;
/// let device = OpenOptions::new().cache(mode).open("/dev/barlink0")?;
/// println!("asked for {mode}");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cache {
    /// The mode of the region's live mappings for writing, whichever process has them; noncached if
    /// there are none.
    Same,
    /// Noncached: each access goes over the bus. The driver reports it as uncached-minus, which is
    /// the kernel's `pgprot_noncached`.
    Noncached,
    /// Write-combining: the processor gathers stores, and loads as in a noncached mapping.
    WriteCombining,
    /// Write-back, as the guest's own memory. The kernel grants it for a region above 4 GiB, and
    /// uncached-minus for one below. An error for a device that is used without its driver, as
    /// write-combining is over VFIO.
    WriteBack,
    /// Noncached as long as a short measurement of reads finds no mode more than twice as fast,
    /// otherwise the fastest mode that the guest's kernel grants. Of fast modes whose speeds differ
    /// by less than 10 %, it is the most cached one. [`Cache::Same`] if the region is mapped.
    #[default]
    Auto,
}

impl Cache {
    /// All requests, in the order in which programs list them.
    ///
    /// ```
    /// use barlink::guest::Cache;
    ///
    /// for cache in Cache::ALL {
    ///     println!("--cache {cache}");
    /// }
    /// ```
    pub const ALL: &'static [Cache] = &[
        Cache::Same,
        Cache::Noncached,
        Cache::WriteCombining,
        Cache::WriteBack,
        Cache::Auto,
    ];

    /// The modes that a driver can be asked for, the preferred ones first.
    const MODES: [Cache; 3] = [Cache::WriteBack, Cache::WriteCombining, Cache::Noncached];

    /// Returns the mode to ask the driver for, if any.
    pub(crate) fn mode(self) -> Option<CacheMode> {
        match self {
            Cache::Same | Cache::Auto => None,
            Cache::Noncached => Some(CacheMode::UncachedMinus),
            Cache::WriteCombining => Some(CacheMode::WriteCombining),
            Cache::WriteBack => Some(CacheMode::WriteBack),
        }
    }

    /// Returns the name, as the option `--cache` of `barlink-guest` has it.
    ///
    /// ```
    /// use barlink::guest::Cache;
    ///
    /// let modes = [Cache::WriteBack, Cache::WriteCombining, Cache::Noncached];
    /// let names = modes.map(Cache::name).join(", ");
    /// assert_eq!(names, "write-back, write-combining, noncached");
    /// ```
    pub fn name(self) -> &'static str {
        match self {
            Cache::Same => "same",
            Cache::Noncached => "noncached",
            Cache::WriteCombining => "write-combining",
            Cache::WriteBack => "write-back",
            Cache::Auto => "auto",
        }
    }

    /// Returns the request for the mode with this number.
    pub(crate) fn from_number(number: u32) -> Option<Self> {
        let mode = CacheMode::from_number(number)?;
        let mut all = Cache::MODES.into_iter();
        all.find(|cache| cache.mode() == Some(mode))
    }
}

impl Display for Cache {
    /// Writes the [`name`](Cache::name).
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Cache {
    type Err = UnknownCache;

    /// Finds the mode with this [`name`](Cache::name).
    fn from_str(name: &str) -> Result<Self, UnknownCache> {
        let mut all = Cache::ALL.iter().copied();
        let found = all.find(|cache| cache.name() == name);
        found.ok_or_else(|| UnknownCache(name.to_owned()))
    }
}

/// Error of a text that names no cache mode.
///
/// ```
/// use barlink::guest::Cache;
///
/// let error = "fast".parse::<Cache>().unwrap_err();
/// assert!(error.to_string().starts_with("no cache mode `fast`"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("no cache mode `{0}`: same, noncached, write-combining, write-back or auto")]
pub struct UnknownCache(String);

/// Bytes that are mapped for the measurement, fewer than a second-level cache has, and bytes in one
/// copy. Noncached memory is read at some tens of MB/s, so that one round over it takes one to two
/// milliseconds.
pub(super) const WINDOW: u64 = 64 << 10;
const PART: usize = 4 << 10;
/// Rounds over all modes, so that costs of the first touch do not count against one mode, and the
/// time of each measurement.
const ROUNDS: usize = 3;
const TIME: Duration = Duration::from_micros(300);
/// The factor by which another mode must be faster than noncached to be chosen.
const ENOUGH: f64 = 2.0;
/// The factor by which a less cached mode must then be faster than a more cached one.
const MARGIN: f64 = 1.1;

/// The result of [`Cache::Auto`], which [`Device::choice`](super::Device::choice) returns. Its text
/// has the reason, such as "write-combining: reads by write-back not granted, write-combining 2384
/// MiB/s".
///
/// ```no_run
/// use barlink::guest::{self, Choice};
///
/// let device = guest::open("/dev/barlink0")?;
/// if let Some(Choice { speeds, .. }) = device.choice() {
///     for (cache, speed) in speeds {
///         println!("{cache}: {:?} bytes a second", speed);
///     }
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Choice {
    /// The mode to ask for; [`Cache::Same`] if the region was mapped already.
    pub cache: Cache,
    /// Bytes a second that were read in each mode, or `None` where the kernel granted another mode.
    /// Empty if the region was mapped already.
    pub speeds: Vec<(Cache, Option<f64>)>,
}

impl Choice {
    /// The choice for a region that is mapped already.
    pub(crate) const SAME: Choice = Choice {
        cache: Cache::Same,
        speeds: Vec::new(),
    };

    /// Measures the only mode of an interface, in a mapping of the first bytes of the region.
    pub(super) fn noncached(mapping: &Mapping) -> Self {
        let speed = read_speed(mapping, CacheMode::UncachedMinus as u32);
        let speeds =
            Cache::MODES.map(|cache| (cache, (cache == Cache::Noncached).then_some(speed)));
        Choice {
            cache: Cache::Noncached,
            speeds: speeds.into(),
        }
    }

    /// Measures all modes, unless one is determined already. `open` returns a file of the device
    /// and the driver's information, `map` maps the first bytes of a file, and `info` returns the
    /// information again.
    pub(crate) fn find<F, E>(
        is_determined: impl Fn(&Info) -> bool,
        open: impl Fn() -> Result<(F, Info), E>,
        map: impl Fn(&F, usize, Option<CacheMode>) -> Result<Mapping, Errno>,
        info: impl Fn(&F) -> Result<Info, E>,
    ) -> Result<Self, E> {
        let mut speeds = Cache::MODES.map(|cache| (cache, None));
        for turn in 0..ROUNDS * speeds.len() {
            let (cache, best) = &mut speeds[turn % Cache::MODES.len()];
            // Each try has a file of its own, because a file keeps its mode.
            let (file, before) = open()?;
            if is_determined(&before) {
                return Ok(Choice::SAME);
            }
            let size = before.mappable_size.min(WINDOW) as usize;
            let mapping = match map(&file, size, cache.mode()) {
                Err(Errno::BUSY) => return Ok(Choice::SAME),
                // The kernel grants no such mapping. If it grants none at all, the program's own
                // mapping fails with the cause.
                Err(_) => continue,
                Ok(mapping) => mapping,
            };
            let granted = info(&file)?.granted;
            if cache.mode().map(|mode| mode as u32) == Some(granted) {
                let speed = read_speed(&mapping, granted);
                *best = Some(best.map_or(speed, |best: f64| best.max(speed)));
            }
        }
        Ok(Choice {
            cache: choose(&speeds),
            speeds: speeds.into(),
        })
    }
}

/// Measures bytes a second of the fastest of many copies, because other processes delay the rest.
/// Nothing is written, because all of the region can be in use.
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
        // The whole window is read at least once, even if this process did not run for a while.
        if count >= parts && start.elapsed() >= TIME {
            break;
        }
    }
    length as f64 / best.as_secs_f64().max(1e-9)
}

/// Returns noncached if it is fast enough or no mode was granted, otherwise the first mode that no
/// other mode exceeds by more than the margin.
fn choose(speeds: &[(Cache, Option<f64>)]) -> Cache {
    let granted = || {
        speeds
            .iter()
            .filter_map(|&(cache, speed)| Some((cache, speed?)))
    };
    let best = granted().map(|(_, speed)| speed).fold(0.0, f64::max);
    if granted().any(|(cache, speed)| cache == Cache::Noncached && speed * ENOUGH >= best) {
        return Cache::Noncached;
    }
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
                Some(speed) => write!(f, "{:.0} MiB/s", speed / f64::from(1 << 20))?,
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
    fn chooses_noncached_unless_it_is_slow() {
        for (speeds, chosen) in [
            ([Some(100.0), Some(100.0), Some(100.0)], Cache::Noncached),
            ([Some(100.0), Some(100.0), Some(50.0)], Cache::Noncached),
            ([Some(100.0), Some(50.0), Some(49.0)], Cache::WriteBack),
            ([Some(95.0), Some(100.0), Some(1.0)], Cache::WriteBack),
            ([Some(90.0), Some(100.0), Some(1.0)], Cache::WriteCombining),
            ([None, Some(100.0), Some(50.0)], Cache::Noncached),
            ([None, Some(100.0), Some(49.0)], Cache::WriteCombining),
            ([Some(100.0), Some(50.0), None], Cache::WriteBack),
            ([None; 3], Cache::Noncached),
        ] {
            let measured: Vec<_> = Cache::MODES.into_iter().zip(speeds).collect();
            assert_eq!(choose(&measured), chosen, "{speeds:?}");
        }
    }

    #[test]
    fn names_are_parsed() {
        let names = Cache::ALL.iter().map(|cache| cache.to_string());
        let error = UnknownCache("WB".to_owned());
        assert_eq!("WB".parse::<Cache>(), Err(error.clone()));
        for (cache, name) in Cache::ALL.iter().zip(names) {
            assert_eq!(name.parse(), Ok(*cache));
            assert!(error.to_string().contains(&name), "{name}");
        }
    }

    #[test]
    fn modes_are_found_by_their_numbers() {
        for cache in Cache::MODES {
            let number = cache.mode().map(|mode| mode as u32).unwrap();
            assert_eq!(Cache::from_number(number), Some(cache));
        }
    }

    #[test]
    fn choice_has_its_reason_in_words() {
        let choice = Choice {
            cache: Cache::WriteCombining,
            speeds: vec![
                (Cache::WriteBack, None),
                (Cache::WriteCombining, Some(2.5e9)),
            ],
        };
        assert_eq!(
            choice.to_string(),
            "write-combining: reads by write-back not granted, write-combining 2384 MiB/s"
        );
    }
}
