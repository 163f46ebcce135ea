// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What others can make us log is logged a few times a second, and the rest counted.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines in an [`INTERVAL`].
const LINES: u32 = 5;
const INTERVAL: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub struct Limit(Mutex<Window>);

#[derive(Debug)]
struct Window {
    start: Option<Instant>,
    lines: u32,
}

impl Limit {
    /// None so far.
    pub const fn new() -> Self {
        Limit(Mutex::new(Window {
            start: None,
            lines: 0,
        }))
    }

    /// Whether one more line may be logged now, and how many were left out before it.
    pub fn allows(&self, now: Instant) -> Option<u32> {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut left_out = 0;
        if window
            .start
            .is_none_or(|start| now.duration_since(start) >= INTERVAL)
        {
            left_out = window.lines.saturating_sub(LINES);
            *window = Window {
                start: Some(now),
                lines: 0,
            };
        }
        window.lines = window.lines.saturating_add(1);
        (window.lines <= LINES).then_some(left_out)
    }
}

/// Logs as `log::log!` does, within the [`Limit`] given first.
macro_rules! limited {
    ($limit:expr, $level:expr, $($message:tt)+) => {
        if let Some(left_out) = $limit.allows(std::time::Instant::now()) {
            if left_out > 0 {
                log::log!($level, "{left_out} more like the following were not logged");
            }
            log::log!($level, $($message)+);
        }
    };
}
pub(crate) use limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_few_lines_and_a_count() {
        let limit = Limit::new();
        let start = Instant::now();
        let logged = |times: usize, now| (0..times).filter_map(|_| limit.allows(now)).collect();
        let first: Vec<u32> = logged(1000, start);
        assert_eq!(first, [0; LINES as usize]);
        let next: Vec<u32> = logged(2, start + INTERVAL);
        assert_eq!(next, [1000 - LINES, 0]);
    }
}
