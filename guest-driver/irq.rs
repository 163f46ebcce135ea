// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The device's interrupts: MSI-X vectors, each with a wait queue that its interrupt wakes.
//!
//! C headers: `include/linux/pci.h`, `include/linux/interrupt.h`.

use crate::{
    bar::raw,
    compat,
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
    /// Switches on as many vectors as the device has, `most` at the most; or says why there are none.
    fn enable(pdev: &'bound pci::Device<Bound>, most: u32) -> Result<Self> {
        // SAFETY: The device is valid, being bound.
        let has = unsafe { bindings::pci_msix_vec_count(raw(pdev)) };
        to_result(has)?;
        let most = most.min(u32::try_from(has)?);
        // SAFETY: The device is valid; it is this driver's, which has switched on no vectors of it yet.
        let count = unsafe {
            bindings::pci_alloc_irq_vectors(raw(pdev), 1, most, bindings::PCI_IRQ_MSIX)
        };
        to_result(count)?;
        let count = u32::try_from(count)?;
        Ok(Msix { pdev, count })
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
        // any more, since each is a field of an `Interrupts` that is dropped before this one.
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
        // SAFETY: The name is static. The cookie is what `wake` takes, and outlives the registration, since the
        // value made below keeps the queue until it has freed the interrupt.
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

/// The interrupt handler (`irq_handler_t`): wakes the vector's queue. Edge-triggered and not shared: it is always ours.
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

/// All interrupts of a device, until dropped: the handlers go first, then the vectors.
pub(crate) struct Interrupts<'bound> {
    handlers: KVec<Handler>,
    _msix: Option<Msix<'bound>>,
}

impl<'bound> Interrupts<'bound> {
    /// Takes as many of the device's vectors as there are, `most` at the most.
    ///
    /// A device that has none (`ivshmem-plain`), or gets none, has no interrupts, which is no error.
    pub(crate) fn enable(pdev: &'bound pci::Device<Bound>, most: u32) -> Result<Self> {
        let mut handlers = KVec::new();
        let msix = match Msix::enable(pdev, most) {
            Ok(msix) => msix,
            Err(why) => {
                dev_info!(pdev, "no interrupts: {:?}\n", why);
                return Ok(Interrupts {
                    handlers,
                    _msix: None,
                });
            }
        };
        for vector in 0..msix.count {
            handlers.push(Handler::register(msix.number(vector)?)?, GFP_KERNEL)?;
        }
        Ok(Interrupts {
            handlers,
            _msix: Some(msix),
        })
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
