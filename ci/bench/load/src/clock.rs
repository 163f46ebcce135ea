// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Times as they are told.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A time in nanoseconds.
pub fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Processor time of this process so far, in nanoseconds.
pub fn cpu() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    nanoseconds(time.try_into().unwrap_or_default())
}
