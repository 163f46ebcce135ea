// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A drop guard for a thread that a library has started, which rings at its end, also at a panic.

use std::cell::RefCell;
use std::sync::Arc;

use log::debug;

use barlink::notifier::Notifier;

thread_local! {
    static GUARD: RefCell<Option<DropGuard>> = const { RefCell::new(None) };
}

/// Dropped with the thread.
struct DropGuard(Arc<Notifier>);

impl Drop for DropGuard {
    fn drop(&mut self) {
        if let Err(error) = self.0.ring() {
            debug!("the end of a thread is not noticed: {error}");
        }
    }
}

/// Makes the end of the calling thread ring an eventfd.
pub fn guard_this_thread(over: &Arc<Notifier>) {
    GUARD.with_borrow_mut(|guard| {
        guard.get_or_insert_with(|| DropGuard(Arc::clone(over)));
    });
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::event::{PollFd, PollFlags};

    use super::*;

    fn is_rung(notifier: &Notifier) -> bool {
        let now = rustix::time::Timespec::default();
        rustix::event::poll(&mut [PollFd::new(notifier, PollFlags::IN)], Some(&now)) == Ok(1)
    }

    #[test]
    fn notices_end_of_thread() {
        for panics in [false, true] {
            let over = Arc::new(Notifier::new().unwrap());
            let notifier = Arc::clone(&over);
            let thread = thread::spawn(move || {
                guard_this_thread(&notifier);
                guard_this_thread(&notifier);
                assert!(!is_rung(&notifier));
                assert!(!panics, "as the test wants it");
            });
            assert_eq!(thread.join().is_err(), panics);
            assert!(is_rung(&over));
        }
    }
}
