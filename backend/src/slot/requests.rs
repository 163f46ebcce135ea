// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The request queue of a slot: host apps' requests for bytes of a guest's own memory. The thread
//! of the VM, which alone has that memory, takes them and answers them, so no host app's request
//! makes the broker's main thread wait.

use std::collections::VecDeque;
use std::io;

use log::debug;
use parking_lot::Mutex;

use barlink::notifier::Notifier;

/// Most requests that wait for one VM: more than there are host apps, each of which waits for its
/// answer.
const MAX_WAITING: usize = 128;

/// A place in a guest's own memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// An address as the device sees it: guest-physical, unless the guest has an IOMMU.
    Address(u64),
    /// An offset in the DMA buffer that the guest's driver has announced.
    Buffer(u64),
}

/// Reason why bytes of a guest's memory cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The slot has no VM.
    #[error("the slot has no VM")]
    NoVm,
    /// The transport does not read guest memory.
    #[error("guest memory is not read")]
    NoGuestMemory,
    /// The guest has no DMA buffer.
    #[error("the guest has no DMA buffer")]
    NoBuffer,
    /// The bytes are not all in the DMA buffer.
    #[error("{length} bytes at {offset:#x} are outside the DMA buffer of {size} bytes")]
    OutsideBuffer {
        /// Offset in the buffer.
        offset: u64,
        /// Bytes.
        length: usize,
        /// Bytes in the buffer.
        size: u64,
    },
    /// The bytes are not all in memory that the VMM shares.
    #[error("{length} bytes at {address:#x} are not in shared memory")]
    NotShared {
        /// Address as the device sees it.
        address: u64,
        /// Bytes.
        length: usize,
    },
    /// The queue is full, or the broker hands over.
    #[error("the broker is busy")]
    Busy,
}

/// The bytes that were read, or the reason why not.
pub type ReadResult = Result<Vec<u8>, ReadError>;

/// A host app's request for bytes.
pub struct ReadRequest {
    /// The first byte.
    pub source: Source,
    /// Bytes, no more than fit into an answer.
    pub length: usize,
    reply: Box<dyn FnOnce(ReadResult) + Send>,
}

impl ReadRequest {
    /// Creates a request. `reply` sends the answer, on the thread that has read the bytes, and does
    /// not wait.
    pub fn new(
        source: Source,
        length: usize,
        reply: impl FnOnce(ReadResult) + Send + 'static,
    ) -> Self {
        ReadRequest {
            source,
            length,
            reply: Box::new(reply),
        }
    }

    /// Answers the request.
    pub fn answer(self, result: ReadResult) {
        (self.reply)(result);
    }
}

/// The requests that wait for one VM.
pub struct RequestQueue {
    waiting: Mutex<VecDeque<ReadRequest>>,
    eventfd: Notifier,
}

impl RequestQueue {
    /// Creates an empty queue.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(RequestQueue {
            waiting: Mutex::default(),
            eventfd: Notifier::new()?,
        })
    }

    /// Returns the eventfd that rings when a request is added.
    pub fn eventfd(&self) -> &Notifier {
        &self.eventfd
    }

    /// Adds a request, unless the queue is full.
    pub(super) fn push(&self, request: ReadRequest) -> Result<(), ReadError> {
        let mut waiting = self.waiting.lock();
        if waiting.len() == MAX_WAITING {
            return Err(ReadError::Busy);
        }
        waiting.push_back(request);
        drop(waiting);
        if let Err(error) = self.eventfd.ring() {
            debug!("a request queue does not ring: {error}");
        }
        Ok(())
    }

    /// Takes the oldest request.
    pub fn take(&self) -> Option<ReadRequest> {
        self.waiting.lock().pop_front()
    }

    /// Rejects all requests that wait.
    pub(crate) fn reject_all(&self, why: ReadError) {
        while let Some(request) = self.take() {
            request.answer(Err(why));
        }
    }
}
