// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A token bucket that limits how many messages one party can cause: a burst at once, and then a
//! number a second. It slows the party that exceeds the limit, and no other. A party is a VM, which
//! causes messages to the service manager, or a user who may only read, whose host apps send
//! requests.

use std::time::{Duration, Instant};

/// Messages at once: several times the interrupts that a device has, each set, changed and cleared.
const BURST: u32 = 2048;
/// Messages a second after that.
pub const RATE: u64 = 256;
/// Time that one message costs.
const EACH: Duration = Duration::from_nanos(1_000_000_000 / RATE);

/// The token bucket of one party: a token for each message that it causes.
#[derive(Clone, Copy, Debug)]
pub struct TokenBucket {
    /// The time at which all messages so far are paid for.
    paid_at: Instant,
}

impl TokenBucket {
    /// Creates a full bucket.
    pub fn new(now: Instant) -> Self {
        TokenBucket { paid_at: now }
    }

    /// Takes a token for one message.
    pub fn take(&mut self, now: Instant) {
        self.paid_at = self.paid_at.max(now) + EACH;
    }

    /// Returns whether no message is left to pay for, as in a new bucket.
    pub fn is_full(&self, now: Instant) -> bool {
        self.paid_at <= now
    }

    /// Returns how long to wait before the next message.
    pub fn delay(&self, now: Instant) -> Duration {
        let debt = self.paid_at.saturating_duration_since(now);
        debt.saturating_sub(EACH * BURST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flood_is_delayed_and_burst_is_not() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(start);
        (0..BURST).for_each(|_| bucket.take(start));
        assert_eq!(bucket.delay(start), Duration::ZERO);
        bucket.take(start);
        assert_eq!(bucket.delay(start), EACH);
        (0..255).for_each(|_| bucket.take(start));
        assert_eq!(bucket.delay(start), EACH * 256);
        let later = start + Duration::from_secs(1);
        assert!(bucket.delay(later) < EACH);
        // Unused time fills the bucket to a burst and no further.
        let late = start + Duration::from_secs(1000);
        (0..=BURST).for_each(|_| bucket.take(late));
        assert_eq!(bucket.delay(late), EACH);
    }
}
