// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Safe wrappers of the kernel's wait queues: sleeping, polling, and calling a function on a
//! wake-up.
//!
//! The `kernel` crate's `CondVar` is not used: its sleeper and its waker must hold the same lock,
//! but here the waker is an interrupt handler that takes no lock. To lose no wake-up, a sleeper
//! first registers, then checks its condition, and then sleeps ([`WaitQueue::wait`]). A waker first
//! changes the condition and then wakes.
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

/// A wait queue (`struct wait_queue_head`). All methods except [`WaitQueue::wait`] are callable in
/// any context.
///
/// # Invariants
///
/// `head` is initialised, and does not move.
#[pin_data]
pub(crate) struct WaitQueue {
    #[pin]
    head: Opaque<bindings::wait_queue_head>,
}

// SAFETY: Any task may use a `wait_queue_head` on any CPU, because its own lock guards all of it.
unsafe impl Send for WaitQueue {}
// SAFETY: All methods that take `&WaitQueue` use the head under its own lock.
unsafe impl Sync for WaitQueue {}

impl WaitQueue {
    /// Creates a queue that announces events to [`Hook`]s.
    pub(crate) fn for_events() -> impl PinInit<Self> {
        pin_init!(Self {
            // INVARIANT: The C function initialises the head, and a pinned field does not move.
            head <- Opaque::ffi_init(|head| {
                // SAFETY: `head` is the memory of a pinned field: writable, and it does not move.
                unsafe { shim::barlink_init_event_queue(head) }
            }),
        })
    }

    /// Creates a queue on which tasks sleep. A [`Hook`] may wake it.
    pub(crate) fn for_sleepers() -> impl PinInit<Self> {
        pin_init!(Self {
            // INVARIANT: The C function initialises the head, and a pinned field does not move.
            head <- Opaque::ffi_init(|head| {
                // SAFETY: `head` is the memory of a pinned field: writable, and it does not move.
                unsafe { shim::barlink_init_sleeper_queue(head) }
            }),
        })
    }

    /// Wakes every task that sleeps on the queue or polls it, and calls every hook.
    pub(crate) fn wake_all(&self) {
        // SAFETY: By the invariant the head is initialised. A null key stands for every poll event.
        unsafe {
            bindings::__wake_up(self.head.get(), bindings::TASK_NORMAL, 0, ptr::null_mut());
        }
    }

    /// Sleeps until `ready` returns true. `ERESTARTSYS` if a signal comes first.
    ///
    /// `ready` must not sleep, because the task is already on the queue and about to sleep when it
    /// is called. The code follows the kernel's `___wait_event()`.
    pub(crate) fn wait(&self, mut ready: impl FnMut() -> bool) -> Result {
        let entry = Opaque::<bindings::wait_queue_entry>::uninit();
        // SAFETY: `entry` is writable. The function makes it a valid entry of the current task.
        unsafe { bindings::init_wait_entry(entry.get(), 0) };
        let result = loop {
            // SAFETY: Head and entry are initialised. The entry stays in this stack frame until
            // `finish_wait` below takes it off the queue.
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
            // CAST: The value is 0 or -ERESTARTSYS.
            if let Err(signal) = to_result(interrupted as c_int) {
                break Err(signal);
            }
            // SAFETY: This is a task in a system call that holds no spinlock, so it may sleep.
            unsafe { bindings::schedule() };
        };
        // SAFETY: Head and entry are those that `prepare_to_wait_event` got.
        unsafe { bindings::finish_wait(self.head.get(), entry.get()) };
        result
    }

    /// Makes a poll wait for this queue as well. To be called before the events are checked.
    ///
    /// # Safety
    ///
    /// `file` and `table` must be the arguments of a running `poll` file operation, and the queue
    /// must exist until the file is released.
    pub(crate) unsafe fn poll(&self, file: *mut bindings::file, table: *mut bindings::poll_table) {
        // SAFETY: By the invariant the head is initialised. By this function's contract file and
        // table are valid, and the queue outlives the file. Therefore it also outlives the entries
        // that `poll_wait` makes: epoll drops its entries before a file is released, and poll and
        // select hold the file while they wait.
        unsafe { bindings::poll_wait(file, self.head.get(), table) }
    }
}

/// The target of a [`Hook`].
pub(crate) trait Notify: Send + Sync {
    /// Handles a wake-up of the queue. Called in any context (including hard interrupts) under the
    /// queue's lock: it must not sleep, nor use that queue.
    fn notify(&self);
}

/// An entry on a wait queue that calls [`Notify::notify`] of its target at each wake-up, until
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

// SAFETY: The entry is only used under the queue's lock, and any task may take it off.
unsafe impl<T: Notify> Send for Hook<T> {}
// SAFETY: A `&Hook` gives access only to the target, which is `Sync`.
unsafe impl<T: Notify> Sync for Hook<T> {}

impl<T: Notify> Hook<T> {
    /// Creates a hook that calls `target` from now on.
    pub(crate) fn new(queue: Arc<WaitQueue>, target: T) -> impl PinInit<Self> {
        let head = queue.head.get();
        pin_init!(&this in Self {
            entry <- Opaque::ffi_init(|entry: *mut bindings::wait_queue_entry| {
                let value = bindings::wait_queue_entry {
                    func: Some(Self::woken),
                    ..pin_init::zeroed()
                };
                // SAFETY: `entry` is the memory of a field that is being initialised.
                unsafe { entry.write(value) }
            }),
            queue,
            target,
            // INVARIANT: `add_wait_queue` puts the entry on the queue, and the pinned field does
            // not move.
            _: {
                // SAFETY: All fields are initialised, so the function may be called from now on.
                // The head belongs to `queue`, which the hook keeps. The entry is on no list yet,
                // and `drop` takes it off.
                unsafe {
                    let entry = Opaque::cast_into(&raw const (*this.as_ptr()).entry);
                    bindings::add_wait_queue(head, entry);
                }
            },
        })
    }

    /// Returns the target.
    pub(crate) fn target(&self) -> &T {
        &self.target
    }

    /// Implements the entry's function (`wait_queue_func_t`): notifies the target. Returns 0,
    /// because it wakes no exclusive waiter.
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
        // SAFETY: The entry is the field of a live hook: `drop` waits for the queue's lock, which
        // is held here, before it ends the hook. No `&mut` to the hook exists.
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
