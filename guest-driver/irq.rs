// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The interrupts of a PCI device: MSI-X vectors, each with a wait queue that its interrupt wakes.
//!
//! C headers: `include/linux/pci.h`, `include/linux/interrupt.h`.

use crate::{
    compat,
    pci::raw,
    wait::WaitQueue, //
};
use kernel::{
    bindings,
    device::Bound,
    error::to_result,
    pci,
    prelude::*,
    sync::Arc, //
};

/// A device's MSI-X vectors, enabled until dropped.
struct Msix<'bound> {
    pdev: &'bound pci::Device<Bound>,
    /// Number of vectors, which are numbered from 0.
    count: u32,
}

impl<'bound> Msix<'bound> {
    /// Enables the device's vectors, at most `most` of them. `None` if the device has no vectors or
    /// the kernel grants none.
    fn enable(pdev: &'bound pci::Device<Bound>, most: u32) -> Option<Self> {
        // SAFETY: The device is bound, and therefore valid.
        let has = unsafe { bindings::pci_msix_vec_count(raw(pdev)) };
        // A negative number means that the device has no MSI-X.
        let most = most.min(u32::try_from(has).ok()?);
        // SAFETY: The device is bound to this driver, which has not enabled vectors of it yet.
        let count =
            unsafe { bindings::pci_alloc_irq_vectors(raw(pdev), 1, most, bindings::PCI_IRQ_MSIX) };
        let Ok(count) = u32::try_from(count) else {
            dev_warn!(pdev, "no interrupt vectors: error {}\n", count);
            return None;
        };
        Some(Msix { pdev, count })
    }

    /// Returns the kernel's interrupt number of a vector.
    fn number(&self, vector: u32) -> Result<c_uint> {
        // SAFETY: The device is valid, and for a vector that was not enabled the function returns
        // an error.
        let number = unsafe { bindings::pci_irq_vector(raw(self.pdev), vector) };
        to_result(number)?;
        Ok(c_uint::try_from(number)?)
    }
}

impl Drop for Msix<'_> {
    fn drop(&mut self) {
        // SAFETY: The device is valid, and `enable` has enabled its vectors. No handler is
        // registered any more, because `Handlers` drops its handlers before this value.
        unsafe { bindings::pci_free_irq_vectors(raw(self.pdev)) }
    }
}

/// A registered interrupt handler.
///
/// # Invariants
///
/// [`wake`] is registered for interrupt `number`, and its cookie is the address that `queue` points
/// to.
struct Handler {
    number: c_uint,
    queue: Arc<WaitQueue>,
}

impl Handler {
    /// Makes each interrupt of this number wake a new queue. `ENOMEM`, or the error of
    /// `request_irq`.
    fn register(number: c_uint) -> Result<Self> {
        let queue = Arc::pin_init(WaitQueue::for_events(), GFP_KERNEL)?;
        // SAFETY: The name is static. The cookie points to a `WaitQueue`, as `wake` requires. It
        // outlives the registration, because the value created below keeps the queue until it has
        // freed the interrupt.
        to_result(unsafe {
            bindings::request_irq(
                number,
                Some(wake),
                0,
                c"barlink".as_char_ptr(),
                Arc::as_ptr(&queue).cast_mut().cast(),
            )
        })?;
        // INVARIANT: `request_irq` succeeded with this number, `wake` and the queue's address.
        Ok(Handler { number, queue })
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // SAFETY: By the invariant this is the number and the cookie of a registered handler. The
        // call waits for a running handler, and `queue` is dropped only after it.
        unsafe {
            bindings::free_irq(self.number, Arc::as_ptr(&self.queue).cast_mut().cast());
        }
    }
}

/// Handles an interrupt (`irq_handler_t`): wakes the vector's queue. An MSI-X interrupt is
/// edge-triggered and not shared, so each one comes from the device.
///
/// # Safety
///
/// Only for `request_irq`. The cookie must point to a [`WaitQueue`] that outlives the registration.
unsafe extern "C" fn wake(_number: c_int, cookie: *mut c_void) -> bindings::irqreturn_t {
    // SAFETY: By this function's contract the cookie points to a live `WaitQueue`.
    let queue = unsafe { &*cookie.cast::<WaitQueue>() };
    queue.wake_all();
    compat::IRQ_HANDLED
}

/// All interrupt handlers of a device. Dropping the value removes the handlers and then the
/// vectors.
pub(crate) struct Handlers<'bound> {
    handlers: KVec<Handler>,
    msix: Option<Msix<'bound>>,
}

impl<'bound> Handlers<'bound> {
    /// Handles the device's vectors from 0 on, at most `most` of them.
    ///
    /// A device without vectors (`ivshmem-plain`) is no error. If the kernel grants fewer vectors
    /// than the device has, that is no error either, because a guest with few CPUs has few
    /// interrupts. Programs poll the channels whose vectors are missing.
    pub(crate) fn enable(pdev: &'bound pci::Device<Bound>, most: u32) -> Result<Self> {
        let mut all = Handlers {
            handlers: KVec::new(),
            msix: Msix::enable(pdev, most),
        };
        if let Some(msix) = &all.msix {
            for vector in 0..msix.count {
                match msix.number(vector).and_then(Handler::register) {
                    Ok(handler) => all.handlers.push(handler, GFP_KERNEL)?,
                    Err(ENOMEM) => return Err(ENOMEM),
                    Err(error) => {
                        dev_warn!(
                            pdev,
                            "only {} of {} interrupt vectors: error {}\n",
                            vector,
                            msix.count,
                            error.to_errno()
                        );
                        break;
                    }
                }
            }
        }
        Ok(all)
    }

    /// Returns the wait queues of the vectors, in order. `ENOMEM`.
    pub(crate) fn queues(&self) -> Result<KVec<Arc<WaitQueue>>> {
        let mut queues = KVec::with_capacity(self.handlers.len(), GFP_KERNEL)?;
        for handler in &self.handlers {
            queues.push(handler.queue.clone(), GFP_KERNEL)?;
        }
        Ok(queues)
    }
}
