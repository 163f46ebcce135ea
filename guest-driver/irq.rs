// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The device's interrupts: MSI-X vectors, each with a wait queue that its interrupt wakes.
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

/// A device's MSI-X vectors, switched on until dropped.
struct Msix<'bound> {
    pdev: &'bound pci::Device<Bound>,
    /// How many, from 0.
    count: u32,
}

impl<'bound> Msix<'bound> {
    /// Switches on as many vectors as the device has, `most` at the most; `None` if it has none or gets none.
    fn enable(pdev: &'bound pci::Device<Bound>, most: u32) -> Option<Self> {
        // SAFETY: The device is valid, being bound.
        let has = unsafe { bindings::pci_msix_vec_count(raw(pdev)) };
        // A negative count says that the device has no MSI-X.
        let most = most.min(u32::try_from(has).ok()?);
        // SAFETY: The device is valid; it is this driver's, which has switched on no vectors of it yet.
        let count =
            unsafe { bindings::pci_alloc_irq_vectors(raw(pdev), 1, most, bindings::PCI_IRQ_MSIX) };
        let Ok(count) = u32::try_from(count) else {
            dev_warn!(pdev, "no interrupt vectors: error {}\n", count);
            return None;
        };
        Some(Msix { pdev, count })
    }

    /// The kernel's interrupt number of a vector.
    fn number(&self, vector: u32) -> Result<c_uint> {
        // SAFETY: The device is valid, and a vector that it does not have gives an error.
        let number = unsafe { bindings::pci_irq_vector(raw(self.pdev), vector) };
        to_result(number)?;
        Ok(c_uint::try_from(number)?)
    }
}

impl Drop for Msix<'_> {
    fn drop(&mut self) {
        // SAFETY: The device is valid, and its vectors were switched on in `enable`. No handler is registered
        // any more, since they are fields of a `Handlers` that are dropped before this one.
        unsafe { bindings::pci_free_irq_vectors(raw(self.pdev)) }
    }
}

/// A registered interrupt handler.
///
/// # Invariants
///
/// [`wake`] is registered for interrupt `number`, with the address of what `queue` points to as its cookie.
struct Handler {
    number: c_uint,
    queue: Arc<WaitQueue>,
}

impl Handler {
    /// Wakes a new queue at every interrupt of this number from now on. `ENOMEM`, or what `request_irq` says.
    fn register(number: c_uint) -> Result<Self> {
        let queue = Arc::pin_init(WaitQueue::for_events(), GFP_KERNEL)?;
        // SAFETY: The name is static. The cookie is what `wake` takes, and outlives the registration, since
        // the value made below keeps the queue until it has freed the interrupt.
        to_result(unsafe {
            bindings::request_irq(
                number,
                Some(wake),
                0,
                c"barlink".as_char_ptr(),
                Arc::as_ptr(&queue).cast_mut().cast(),
            )
        })?;
        // INVARIANT: `request_irq` succeeded with these.
        Ok(Handler { number, queue })
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // SAFETY: By the invariant this is the number and cookie of a registered handler. This waits for the
        // handler to end where it runs, before `queue` is dropped.
        unsafe {
            bindings::free_irq(self.number, Arc::as_ptr(&self.queue).cast_mut().cast());
        }
    }
}

/// The interrupt handler (`irq_handler_t`): wakes the vector's queue. Edge-triggered and not shared: it is
/// always ours.
///
/// # Safety
///
/// Only for `request_irq`, with a pointer to a [`WaitQueue`] that outlives the registration as the cookie.
unsafe extern "C" fn wake(_number: c_int, cookie: *mut c_void) -> bindings::irqreturn_t {
    // SAFETY: By this function's contract.
    let queue = unsafe { &*cookie.cast::<WaitQueue>() };
    queue.wake_all();
    compat::IRQ_HANDLED
}

/// All interrupt handlers of a device, until dropped: they go first, then the vectors.
pub(crate) struct Handlers<'bound> {
    handlers: KVec<Handler>,
    msix: Option<Msix<'bound>>,
}

impl<'bound> Handlers<'bound> {
    /// Handles as many vectors as the device has, `most` at the most, from vector 0 on.
    ///
    /// A device that has none (`ivshmem-plain`) has no interrupts, which is no error. Nor is it one if the kernel gives
    /// fewer: a guest with few CPUs has few interrupts to give away, and channels whose vectors are missing are polled.
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

    /// The queues that the vectors wake, in order. `ENOMEM`.
    pub(crate) fn queues(&self) -> Result<KVec<Arc<WaitQueue>>> {
        let mut queues = KVec::with_capacity(self.handlers.len(), GFP_KERNEL)?;
        for handler in &self.handlers {
            queues.push(handler.queue.clone(), GFP_KERNEL)?;
        }
        Ok(queues)
    }
}
