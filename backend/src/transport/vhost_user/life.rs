// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Notices when a thread ends that somebody else has started, be it by a panic.

use std::cell::RefCell;
use std::sync::Arc;

use log::debug;

use barlink::bell::Bell;

thread_local! {
    static LIFE: RefCell<Option<Life>> = const { RefCell::new(None) };
}

/// Dropped with the thread.
struct Life(Arc<Bell>);

impl Drop for Life {
    fn drop(&mut self) {
        if let Err(error) = self.0.ring() {
            debug!("nobody learns that a thread ends: {error}");
        }
    }
}

/// Has `over` rung when the calling thread ends.
pub fn watch_this_thread(over: &Arc<Bell>) {
    LIFE.with_borrow_mut(|life| {
        life.get_or_insert_with(|| Life(Arc::clone(over)));
    });
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::event::{PollFd, PollFlags};

    use super::*;

    fn is_rung(bell: &Bell) -> bool {
        let now = rustix::time::Timespec::default();
        rustix::event::poll(&mut [PollFd::new(bell, PollFlags::IN)], Some(&now)) == Ok(1)
    }

    #[test]
    fn thread_that_panics_is_noticed() {
        for panics in [false, true] {
            let over = Arc::new(Bell::new().unwrap());
            let bell = Arc::clone(&over);
            let thread = thread::spawn(move || {
                watch_this_thread(&bell);
                watch_this_thread(&bell);
                assert!(!is_rung(&bell));
                assert!(!panics, "as the test wants it");
            });
            assert_eq!(thread.join().is_err(), panics);
            assert!(is_rung(&over));
        }
    }
}
