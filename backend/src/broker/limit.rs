// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What others can make us log is logged a few times a second, and the rest counted.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines in an [`INTERVAL`], on account of each.
const LINES: u32 = 5;
const INTERVAL: Duration = Duration::from_secs(1);
/// Most who have an account of their own at a time; the others share one.
const ACCOUNTS: usize = 64;

/// For those who are not let in.
pub static TURNED_AWAY: Limit = Limit::new();
/// For those who are told no.
pub static REFUSED: Limit = Limit::new();
/// For those who come and go.
pub static COMING_AND_GOING: Limit = Limit::new();
/// For those whose descriptors nobody keeps.
pub static NOT_KEPT: Limit = Limit::new();
/// For those who go without giving back what they hold.
pub static LOST: Limit = Limit::new();

/// On whose account something is logged: so nobody hides what others do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Account {
    /// That of the VMs of a slot.
    Slot(u32),
    /// A user's.
    User(u32),
    /// That of all who have none.
    Others,
}

/// See the module.
#[derive(Debug)]
pub struct Limit(Mutex<BTreeMap<Account, Window>>);

#[derive(Debug)]
struct Window {
    start: Instant,
    lines: u32,
}

impl Window {
    fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.start) >= INTERVAL
    }
}

impl Limit {
    /// None so far.
    const fn new() -> Self {
        Limit(Mutex::new(BTreeMap::new()))
    }

    /// Whether one more line may be logged now, and how many were left out before it.
    pub fn allows(&self, account: Account, now: Instant) -> Option<u32> {
        let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if windows.len() >= ACCOUNTS {
            windows.retain(|_, window| !window.is_over(now));
        }
        let is_full = windows.len() >= ACCOUNTS && !windows.contains_key(&account);
        let account = if is_full { Account::Others } else { account };
        let fresh = || Window {
            start: now,
            lines: 0,
        };
        let window = windows.entry(account).or_insert_with(fresh);
        let mut left_out = 0;
        if window.is_over(now) {
            left_out = window.lines.saturating_sub(LINES);
            *window = fresh();
        }
        window.lines = window.lines.saturating_add(1);
        (window.lines <= LINES).then_some(left_out)
    }
}

/// Logs as `log::log!` does, within the [`Limit`] given first, on the [`Account`] given second.
macro_rules! limited {
    ($limit:expr, $account:expr, $level:expr, $($message:tt)+) => {
        if let Some(left_out) = $limit.allows($account, std::time::Instant::now()) {
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

    fn logged(limit: &Limit, account: Account, times: usize, now: Instant) -> Vec<u32> {
        (0..times)
            .filter_map(|_| limit.allows(account, now))
            .collect()
    }

    #[test]
    fn a_flood_is_a_few_lines_and_a_count() {
        let limit = Limit::new();
        let start = Instant::now();
        let first = logged(&limit, Account::User(7), 1000, start);
        assert_eq!(first, [0; LINES as usize]);
        let next = logged(&limit, Account::User(7), 2, start + INTERVAL);
        assert_eq!(next, [1000 - LINES, 0]);
    }

    #[test]
    fn a_flood_hides_nobody_else() {
        let limit = Limit::new();
        let now = Instant::now();
        logged(&limit, Account::Slot(0), 1000, now);
        assert_eq!(logged(&limit, Account::Slot(1), 1, now), [0]);
        assert_eq!(logged(&limit, Account::User(0), 1, now), [0]);
    }

    #[test]
    fn many_accounts_take_no_more_room_than_some() {
        let limit = Limit::new();
        let now = Instant::now();
        let lines = (0..1000).map(|user| logged(&limit, Account::User(user), 1, now).len());
        assert_eq!(lines.sum::<usize>(), ACCOUNTS + LINES as usize);
        assert_eq!(limit.0.lock().unwrap().len(), ACCOUNTS + 1);
        let later = now + INTERVAL;
        assert_eq!(logged(&limit, Account::User(1000), 1, later), [0]);
        assert_eq!(limit.0.lock().unwrap().len(), 1);
    }
}
