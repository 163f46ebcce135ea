// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The limits of users who may only read: they take no place of a user who may write, and the
//! requests of one such user neither delay those of others nor keep the broker busy.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use log::Level;

use super::client::Client;
use crate::persistence::state::{MAX_CLIENTS, MAX_READERS, MAX_WRITERS};
use crate::rate_limit::DELAYED;
use crate::token_bucket::{RATE, TokenBucket};
use barlink::Access;
use barlink::control::message::Refusal;

/// Longest delay of a request. As many as there are readers can wait, and each takes its token
/// before it waits, so that they get their turns in the order in which they came.
const LONGEST_DELAY: Duration = Duration::from_millis(MAX_READERS as u64 * 1000 / RATE);

/// The time at which the broker handles a client's next request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// When it comes, if the user has a token.
    Now,
    /// Not before this time. The request may be there, and its token is taken.
    At(Instant),
    /// When it comes. Its token is taken.
    Paid,
}

/// The requests of users who may only read, by user.
#[derive(Default)]
pub struct Requests(HashMap<u32, TokenBucket>);

impl Requests {
    /// Returns whether a client must wait before its next request is handled, and sets its turn.
    pub fn must_wait(&mut self, client: &mut Client, now: Instant) -> bool {
        if !client.is_reader() || client.is_parted {
            return false;
        }
        match client.turn {
            Turn::At(_) => return true,
            Turn::Paid => {
                client.turn = Turn::Now;
                return false;
            }
            Turn::Now => (),
        }
        let delay = self.delay(client.peer.uid, now);
        if delay.is_zero() {
            return false;
        }
        client.turn = Turn::At(now + delay);
        let peer = client.peer;
        let message = format_args!(
            "{peer} waits for its answer: its user may only read, and sends more than {RATE} requests a second: end the program that does so"
        );
        peer.log(&DELAYED, Level::Warn, message);
        true
    }

    /// Takes a token of a user, and returns the time until it may be used.
    fn delay(&mut self, user: u32, now: Instant) -> Duration {
        if self.0.len() >= MAX_READERS {
            self.0.retain(|_, bucket| !bucket.is_full(now));
        }
        let bucket = self.0.entry(user);
        let bucket = bucket.or_insert_with(|| TokenBucket::new(now));
        let delay = bucket.delay(now);
        // Clients that left while they waited have taken tokens, too.
        if delay < LONGEST_DELAY {
            bucket.take(now);
        }
        delay.min(LONGEST_DELAY)
    }
}

/// Returns the refusal of a further client with this access, if there is no room for it.
pub fn refusal<'a>(clients: impl Iterator<Item = &'a Client>, most: Access) -> Option<Refusal> {
    let (mut all, mut same) = (0, 0);
    for client in clients {
        all += 1;
        same += usize::from(client.most == most);
    }
    let (limit, refusal) = match most {
        Access::ReadWrite => (MAX_WRITERS, Refusal::Full(MAX_WRITERS)),
        Access::ReadOnly => (MAX_READERS, Refusal::ManyReaders(MAX_READERS)),
    };
    // A successor can have more clients of one kind, because it has options of its own.
    (same >= limit || all >= MAX_CLIENTS).then_some(refusal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flood_of_user_delays_no_other() {
        let now = Instant::now();
        let mut requests = Requests::default();
        let count = (0..).find(|_| !requests.delay(7, now).is_zero()).unwrap();
        assert!(count > 1000, "a burst of {count}");
        assert!(requests.delay(8, now).is_zero());
        // Each waits longer than the one before, up to the limit.
        let mut last = requests.delay(7, now);
        while last < LONGEST_DELAY {
            let delay = requests.delay(7, now);
            assert!(delay > last);
            last = delay;
        }
        assert_eq!(requests.delay(7, now), LONGEST_DELAY);
        assert!(requests.delay(7, now + Duration::from_secs(1)).is_zero());
    }

    #[test]
    fn many_users_take_bounded_memory() {
        let mut now = Instant::now();
        let mut requests = Requests::default();
        for user in 0..1000 {
            assert!(requests.delay(user, now).is_zero());
            now += Duration::from_millis(10);
        }
        assert!(requests.0.len() <= MAX_READERS);
    }
}
