// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Times as numbers of nanoseconds.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Returns a time in nanoseconds.
pub fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Returns the processor time of this process so far, in nanoseconds.
pub fn cpu() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    nanoseconds(time.try_into().unwrap_or_default())
}
