// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The kernel's wait queues, made safe: sleeping on one, polling one, and hooking a function to one.
//!
//! The `kernel` crate's `CondVar` does not serve here: it sleeps under a lock that the waker must take too,
//! and the waker is an interrupt handler. So a sleeper registers first, then looks, then sleeps
//! ([`WaitQueue::wait`]), and a waker first changes what is looked at, then wakes: no wake-up is lost.
//!
//! C header: `include/linux/wait.h`.

use crate::shim;
use core::ptr;
use kernel::{
    bindings,
    container_of,
    error::to_result,
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// A wait queue (`struct wait_queue_head`). All its methods but [`WaitQueue::wait`] can be called from any
/// context.
///
/// # Invariants
///
/// `head` is initialised, and does not move.
#[pin_data]
pub(crate) struct WaitQueue {
    #[pin]
    head: Opaque<bindings::wait_queue_head>,
}

// SAFETY: A `wait_queue_head` belongs to no task or CPU, and all of it is guarded by its own lock.
unsafe impl Send for WaitQueue {}
// SAFETY: Everything that is done with a `&WaitQueue` is done under the queue's own lock.
unsafe impl Sync for WaitQueue {}

impl WaitQueue {
    /// A queue that events are announced on: [`Hook`]s hang on it.
    pub(crate) fn for_events() -> impl PinInit<Self> {
        pin_init!(Self {
            // INVARIANT: The C function initialises the head, and a pinned one does not move.
            head <- Opaque::ffi_init(|head| {
                // SAFETY: `head` is the slot of a pinned field: writable, and there to stay.
                unsafe { shim::barlink_init_event_queue(head) }
            }),
        })
    }

    /// A queue that tasks sleep on. A [`Hook`] can wake it.
    pub(crate) fn for_sleepers() -> impl PinInit<Self> {
        pin_init!(Self {
            // INVARIANT: The C function initialises the head, and a pinned one does not move.
            head <- Opaque::ffi_init(|head| {
                // SAFETY: As above: the slot of a pinned field that is being initialised.
                unsafe { shim::barlink_init_sleeper_queue(head) }
            }),
        })
    }

    /// Wakes every task that sleeps on the queue or polls it, and calls every hook.
    pub(crate) fn wake_all(&self) {
        // SAFETY: The head is initialised, by the type's invariant; a null key stands for every poll event.
        unsafe {
            bindings::__wake_up(self.head.get(), bindings::TASK_NORMAL, 0, ptr::null_mut());
        }
    }

    /// Sleeps until `ready` says true. `ERESTARTSYS` when a signal comes first.
    ///
    /// `ready` is called while the task is on the queue and on its way to sleep, so it must not sleep itself.
    /// This is `___wait_event()`.
    pub(crate) fn wait(&self, mut ready: impl FnMut() -> bool) -> Result {
        let entry = Opaque::<bindings::wait_queue_entry>::uninit();
        // SAFETY: `entry` is writable, and makes a valid entry of what it is given: one for the current task.
        unsafe { bindings::init_wait_entry(entry.get(), 0) };
        let result = loop {
            // SAFETY: The head is initialised. The entry is, too; it stays where it is, in this frame, which
            // `finish_wait` below takes it off the queue before leaving.
            let interrupted = unsafe {
                bindings::prepare_to_wait_event(
                    self.head.get(),
                    entry.get(),
                    bindings::TASK_INTERRUPTIBLE as c_int,
                )
            };
            if ready() {
                break Ok(());
            }
            // CAST: The only values are 0 and -ERESTARTSYS.
            if let Err(signal) = to_result(interrupted as c_int) {
                break Err(signal);
            }
            // SAFETY: This is a task in a system call, which may sleep: it holds no lock here.
            unsafe { bindings::schedule() };
        };
        // SAFETY: Head and entry are those that were given to `prepare_to_wait_event`.
        unsafe { bindings::finish_wait(self.head.get(), entry.get()) };
        result
    }

    /// Makes a poll wait for this queue, too. To be called before looking at what the queue announces.
    ///
    /// # Safety
    ///
    /// `file` and `table` must be the arguments of a `poll` file operation that is running, and the queue
    /// must stay until the file is released.
    pub(crate) unsafe fn poll(&self, file: *mut bindings::file, table: *mut bindings::poll_table) {
        // SAFETY: By this function's contract file and table are valid, and the queue outlives the file, and
        // so all that `poll_wait` makes of the two: epoll drops its entries before a file is released, and
        // poll and select hold the file while they wait. The head is initialised.
        unsafe { bindings::poll_wait(file, self.head.get(), table) }
    }
}

/// What a [`Hook`] calls.
pub(crate) trait Notify: Send + Sync {
    /// The queue was woken. Called in any context, hard interrupt included, under the queue's lock: it must
    /// not sleep, nor touch that queue.
    fn notify(&self);
}

/// A function on a wait queue: calls [`Notify::notify`] of its target whenever the queue is woken, until
/// dropped.
///
/// # Invariants
///
/// `entry` is on `queue`, its function is [`Hook::woken`], and it does not move.
#[pin_data(PinnedDrop)]
pub(crate) struct Hook<T: Notify> {
    #[pin]
    entry: Opaque<bindings::wait_queue_entry>,
    queue: Arc<WaitQueue>,
    target: T,
}

// SAFETY: The entry is only touched under the queue's lock, and may be taken off by another task than put it
// on.
unsafe impl<T: Notify> Send for Hook<T> {}
// SAFETY: A `&Hook` gives no access but to the target, which is `Sync`.
unsafe impl<T: Notify> Sync for Hook<T> {}

impl<T: Notify> Hook<T> {
    /// A hook that calls `target` from now on.
    pub(crate) fn new(queue: Arc<WaitQueue>, target: T) -> impl PinInit<Self> {
        let head = queue.head.get();
        pin_init!(&this in Self {
            entry <- Opaque::ffi_init(|entry: *mut bindings::wait_queue_entry| {
                let value = bindings::wait_queue_entry {
                    func: Some(Self::woken),
                    ..pin_init::zeroed()
                };
                // SAFETY: `entry` is the slot of a field that is being initialised.
                unsafe { entry.write(value) }
            }),
            queue,
            target,
            // INVARIANT: `add_wait_queue` puts the entry on the queue, and the pinned field stays in its
            // place.
            _: {
                // SAFETY: All fields are initialised, so that the function may be called at once. The head is
                // that of `queue`, which the hook keeps; the entry is on no list yet, and is taken off in
                // `drop`.
                unsafe {
                    let entry = Opaque::cast_into(&raw const (*this.as_ptr()).entry);
                    bindings::add_wait_queue(head, entry);
                }
            },
        })
    }

    /// What is called.
    pub(crate) fn target(&self) -> &T {
        &self.target
    }

    /// The entry's function (`wait_queue_func_t`). 0: no exclusive waiter was woken.
    ///
    /// # Safety
    ///
    /// Only for `__wake_up`, with an entry that [`Hook::new`] made.
    unsafe extern "C" fn woken(
        entry: *mut bindings::wait_queue_entry,
        _mode: c_uint,
        _flags: c_int,
        _key: *mut c_void,
    ) -> c_int {
        let entry = Opaque::cast_from(entry).cast_mut();
        // SAFETY: The entry is the field of a hook, which is there: its `drop` waits for the queue's lock,
        // which is held here, before anything of the hook ends. Nobody has it by `&mut`.
        let hook = unsafe { &*container_of!(entry, Self, entry) };
        hook.target.notify();
        0
    }
}

#[pinned_drop]
impl<T: Notify> PinnedDrop for Hook<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the invariant the entry is on this queue.
        unsafe { bindings::remove_wait_queue(self.queue.head.get(), self.entry.get()) }
    }
}
