// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The wait of a stream for a record or for room, which has a timeout and is reported.

use core::time::Duration;

use super::{Progress, StreamError};

/// The wait for one record, or for room for one.
#[derive(Default)]
pub(super) struct Wait {
    /// Time of this side's clock at which the wait began, if it has a timeout.
    since: Option<Duration>,
}

impl Wait {
    /// Returns the time to sleep: until the wait is reported or its timeout is over, whichever is
    /// first.
    pub(super) fn next(
        &mut self,
        report_after: Option<Duration>,
        timeout: Option<Duration>,
        now: impl FnOnce() -> Duration,
    ) -> Option<Duration> {
        let Some(timeout) = timeout else {
            return report_after;
        };
        let now = now();
        let waited = now.saturating_sub(*self.since.get_or_insert(now));
        let left = timeout.saturating_sub(waited);
        Some(report_after.map_or(left, |report| report.min(left)))
    }

    /// Returns an error if the timeout is over.
    pub(super) fn check<X>(
        &self,
        timeout: Option<Duration>,
        now: impl FnOnce() -> Duration,
        progress: &Progress,
    ) -> Result<(), StreamError<X>> {
        match (timeout, self.since) {
            (Some(after), Some(since)) if now().saturating_sub(since) >= after => {
                Err(StreamError::TimedOut {
                    after,
                    progress: *progress,
                })
            }
            _ => Ok(()),
        }
    }
}
