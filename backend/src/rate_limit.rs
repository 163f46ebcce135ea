// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A limit on the log lines that other processes can cause: a few a second are written, the rest
//! are counted.

use std::collections::BTreeMap;
use std::fmt::Arguments;
use std::time::{Duration, Instant};

use log::Level;
use parking_lot::Mutex;

/// The origin of the lines in the log.
const TARGET: &str = "barlink::broker";
/// Lines that each account may write in an [`INTERVAL`].
const LINES: u32 = 5;
const INTERVAL: Duration = Duration::from_secs(1);
/// Most accounts that are counted at a time. Further users share one.
const ACCOUNTS: usize = 64;

/// Log limit for host apps that are not admitted, and for failures to accept.
pub static NOT_ADMITTED: RateLimit = RateLimit::new();
/// Log limit for rejected VMs and rejected requests.
pub static REJECTED: RateLimit = RateLimit::new();
/// Log limit for host apps whose requests wait.
pub static DELAYED: RateLimit = RateLimit::new();
/// Log limit for clients that connect and disconnect.
pub static CONNECTIONS: RateLimit = RateLimit::new();
/// Log limit for descriptors that the service manager does not store.
pub static NOT_STORED: RateLimit = RateLimit::new();
/// Log limit for host apps that leave without releasing their claims.
pub static UNRELEASED_CLAIMS: RateLimit = RateLimit::new();

/// The party that causes a log line. Each has a limit of its own, so that none hides the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Account {
    /// The VMs of a slot.
    Slot(u32),
    /// A user.
    User(u32),
    /// All other parties together.
    Others,
}

/// One kind of log line, with a count for each account.
#[derive(Debug)]
pub struct RateLimit(Mutex<BTreeMap<Account, Window>>);

#[derive(Debug)]
struct Window {
    start: Instant,
    lines: u32,
    /// Number of lines that were left out since a line last said so.
    left_out: u64,
}

impl Window {
    fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.start) >= INTERVAL
    }
}

impl RateLimit {
    const fn new() -> Self {
        RateLimit(Mutex::new(BTreeMap::new()))
    }

    /// Logs a message, unless the account has used up its lines.
    pub fn log(&self, account: Account, level: Level, message: Arguments<'_>) {
        // A line that the log's level leaves out does not count against the limit.
        if !log::log_enabled!(target: TARGET, level) {
            return;
        }
        if let Some(left_out) = self.count(account, Instant::now()) {
            if left_out > 0 {
                log::log!(target: TARGET, level, "{left_out} more like the following were not logged");
            }
            log::log!(target: TARGET, level, "{message}");
        }
    }

    /// Counts a line. Returns how many lines were left out before it, or `None` if this one is left
    /// out, too. The lines that were left out of an account that is removed are added to this one.
    fn count(&self, account: Account, now: Instant) -> Option<u64> {
        let mut windows = self.0.lock();
        let mut removed = 0;
        if windows.len() >= ACCOUNTS {
            windows.retain(|_, window| {
                let is_over = window.is_over(now);
                removed += if is_over { window.left_out } else { 0 };
                !is_over
            });
        }
        let is_full = windows.len() >= ACCOUNTS && !windows.contains_key(&account);
        let account = if is_full { Account::Others } else { account };
        let window = windows.entry(account).or_insert(Window {
            start: now,
            lines: 0,
            left_out: 0,
        });
        window.left_out += removed;
        if window.is_over(now) {
            (window.start, window.lines) = (now, 0);
        }
        window.lines = window.lines.saturating_add(1);
        if window.lines > LINES {
            window.left_out += 1;
            return None;
        }
        Some(std::mem::take(&mut window.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(limit: &RateLimit, account: Account, times: usize, now: Instant) -> Vec<u64> {
        (0..times)
            .filter_map(|_| limit.count(account, now))
            .collect()
    }

    #[test]
    fn limit_turns_flood_into_few_lines() {
        let limit = RateLimit::new();
        let start = Instant::now();
        let first = logged(&limit, Account::User(7), 1000, start);
        assert_eq!(first, [0; LINES as usize]);
        let next = logged(&limit, Account::User(7), 2, start + INTERVAL);
        assert_eq!(next, [1000 - u64::from(LINES), 0]);
    }

    #[test]
    fn flood_hides_no_other_account() {
        let limit = RateLimit::new();
        let now = Instant::now();
        logged(&limit, Account::Slot(0), 1000, now);
        assert_eq!(logged(&limit, Account::Slot(1), 1, now), [0]);
        assert_eq!(logged(&limit, Account::User(0), 1, now), [0]);
    }

    #[test]
    fn removed_accounts_lose_no_count() {
        let limit = RateLimit::new();
        let mut now = Instant::now();
        let (mut caused, mut told) = (0, 0);
        for round in 0..10 {
            // These are more accounts than are counted at a time. They log different numbers of
            // lines.
            for user in 0..100 {
                let times = (user * 7 + round) % 23;
                let lines = logged(&limit, Account::User(user as u32), times, now);
                caused += times as u64;
                told += lines.len() as u64 + lines.iter().sum::<u64>();
            }
            now += INTERVAL;
        }
        // The next line of each account reports the lines that were left out before it.
        let waiting: Vec<_> = limit.0.lock().keys().copied().collect();
        for account in waiting {
            let lines = logged(&limit, account, 1, now);
            caused += 1;
            told += lines.len() as u64 + lines.iter().sum::<u64>();
        }
        assert_eq!(told, caused);
    }

    #[test]
    fn many_accounts_take_bounded_memory() {
        let limit = RateLimit::new();
        let now = Instant::now();
        let lines = (0..1000).map(|user| logged(&limit, Account::User(user), 1, now).len());
        assert_eq!(lines.sum::<usize>(), ACCOUNTS + LINES as usize);
        assert_eq!(limit.0.lock().len(), ACCOUNTS + 1);
        let later = now + INTERVAL;
        let left_out = 1000 - ACCOUNTS as u64 - u64::from(LINES);
        assert_eq!(logged(&limit, Account::User(1000), 1, later), [left_out]);
        assert_eq!(limit.0.lock().len(), 1);
    }
}
