// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The bytes of a vfio-user message (QEMU's `docs/interop/vfio-user.rst`): a header, and for most
//! commands a structure of the kernel's `vfio.h`. All numbers have the byte order of the host.

use vfio_bindings::bindings::vfio::{
    vfio_device_info, vfio_irq_info, vfio_region_info, vfio_region_sparse_mmap_area,
};

/// Bytes in a header.
pub const HEADER: usize = 16;
/// Most bytes of data in one region access, as announced to the client: far more than in an access
/// of a guest, or in configuration space.
pub const MAX_DATA: usize = 4096;
/// Bytes before the data of a region access.
pub const ACCESS: usize = 16;
/// Bytes of the longest message that is parsed. A longer one is discarded.
pub const MAX_MESSAGE: usize = HEADER + ACCESS + MAX_DATA;
/// Most descriptors in one message, as announced to the client. QEMU fails at start if a server
/// announces more.
pub const ANNOUNCED_DESCRIPTORS: u32 = 16;
/// Bytes in the structures that follow a header.
pub const DEVICE_INFO: usize = 16;
/// `vfio_region_info`.
pub const REGION_INFO: usize = size_of::<vfio_region_info>();
/// `vfio_irq_info`.
pub const IRQ_INFO: usize = size_of::<vfio_irq_info>();
/// `vfio_irq_set`, before its data.
pub const IRQ_SET: usize = 20;
/// `vfio_region_info` with a list of one mappable area.
pub const REGION_INFO_MAPPABLE: usize =
    REGION_INFO + SPARSE_HEADER + size_of::<vfio_region_sparse_mmap_area>();
/// Capability header, number of areas, and padding.
const SPARSE_HEADER: usize = 16;

/// The numbers of the commands.
pub mod command {
    /// Negotiates version and limits; the first message.
    pub const VERSION: u16 = 1;
    /// Announces a range of guest memory.
    pub const DMA_MAP: u16 = 2;
    /// Removes a range of guest memory.
    pub const DMA_UNMAP: u16 = 3;
    /// Asks for the kind of the device.
    pub const DEVICE_GET_INFO: u16 = 4;
    /// Asks for the kind of a region.
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    /// Asks for the number of interrupts of a kind.
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    /// Sets or fires interrupts.
    pub const DEVICE_SET_IRQS: u16 = 8;
    /// Reads a region.
    pub const REGION_READ: u16 = 9;
    /// Writes a region.
    pub const REGION_WRITE: u16 = 10;
    /// Resets the device.
    pub const DEVICE_RESET: u16 = 13;
}

mod flag {
    /// The bits with the kind of a message.
    pub const KIND: u32 = 0xf;
    pub const COMMAND: u32 = 0;
    pub const REPLY: u32 = 1;
    /// The sender wants no reply.
    pub const NO_REPLY: u32 = 1 << 4;
    pub const ERROR: u32 = 1 << 5;
}

/// An error after which a stream cannot continue, because the start of the next message is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The size is smaller than a header.
    #[error("a message of {0} bytes is shorter than its header")]
    Short(u32),
    /// The message is not a command. The server sends none, so it is not a reply either.
    #[error("a message with flags {0:#x} is not a command")]
    NotACommand(u32),
}

/// The header of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Number that the reply repeats.
    pub id: u16,
    /// One of [`command`], or anything else.
    pub command: u16,
    /// Bytes of the message, header included: at least [`HEADER`].
    pub size: u32,
    /// Whether the client wants a reply.
    pub wants_reply: bool,
}

impl Header {
    /// Parses a client's header.
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Self, HeaderError> {
        let [i0, i1, c0, c1, s0, s1, s2, s3, f0, f1, f2, f3, ..] = *bytes;
        let size = u32::from_ne_bytes([s0, s1, s2, s3]);
        let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
        if (size as usize) < HEADER {
            return Err(HeaderError::Short(size));
        }
        if flags & flag::KIND != flag::COMMAND {
            return Err(HeaderError::NotACommand(flags));
        }
        Ok(Header {
            id: u16::from_ne_bytes([i0, i1]),
            command: u16::from_ne_bytes([c0, c1]),
            size,
            wants_reply: flags & flag::NO_REPLY == 0,
        })
    }

    /// Returns the bytes behind the header.
    pub fn payload(&self) -> usize {
        self.size as usize - HEADER
    }
}

/// A reply that is being written, in memory that is reused.
#[derive(Debug, Default)]
pub struct Reply(Vec<u8>);

impl Reply {
    /// Begins the reply to a command.
    pub fn begin(&mut self, header: &Header) {
        self.0.clear();
        self.put16(header.id);
        self.put16(header.command);
        self.put32(0);
        self.put32(flag::REPLY);
        self.put32(0);
    }

    /// Replaces the reply by an error: a header alone.
    pub fn fail(&mut self, header: &Header, errno: u32) {
        self.begin(header);
        self.0[8..12].copy_from_slice(&(flag::REPLY | flag::ERROR).to_ne_bytes());
        self.0[12..16].copy_from_slice(&errno.to_ne_bytes());
    }

    /// Returns the bytes of the complete reply.
    pub fn finish(&mut self) -> &[u8] {
        // CAST: a reply is at most as long as the longest message.
        let size = self.0.len() as u32;
        self.0[4..8].copy_from_slice(&size.to_ne_bytes());
        &self.0
    }

    /// Appends 16 bits.
    pub fn put16(&mut self, number: u16) {
        self.put(&number.to_ne_bytes());
    }

    /// Appends 32 bits.
    pub fn put32(&mut self, number: u32) {
        self.put(&number.to_ne_bytes());
    }

    /// Appends 64 bits.
    pub fn put64(&mut self, number: u64) {
        self.put(&number.to_ne_bytes());
    }

    /// Appends bytes.
    pub fn put(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Appends zeros, at most [`MAX_DATA`], and returns them to be overwritten.
    pub fn room(&mut self, bytes: usize) -> &mut [u8] {
        assert!(bytes <= MAX_DATA);
        let start = self.0.len();
        self.0.resize(start + bytes, 0);
        &mut self.0[start..]
    }

    /// Appends the payload of [`command::DEVICE_GET_INFO`].
    pub fn put_device_info(&mut self, info: &vfio_device_info) {
        for number in [info.argsz, info.flags, info.num_regions, info.num_irqs] {
            self.put32(number);
        }
    }

    /// Appends the payload of [`command::DEVICE_GET_REGION_INFO`], without capabilities.
    pub fn put_region_info(&mut self, info: &vfio_region_info) {
        for number in [info.argsz, info.flags, info.index, info.cap_offset] {
            self.put32(number);
        }
        self.put64(info.size);
        self.put64(info.offset);
    }

    /// Appends the capability that one area of the region can be mapped.
    pub fn put_mappable_area(&mut self, area: &vfio_region_sparse_mmap_area) {
        use vfio_bindings::bindings::vfio::VFIO_REGION_INFO_CAP_SPARSE_MMAP;
        // CAST: it is 1.
        self.put16(VFIO_REGION_INFO_CAP_SPARSE_MMAP as u16);
        self.put16(1);
        // No further capability; one area; padding.
        for number in [0, 1, 0] {
            self.put32(number);
        }
        self.put64(area.offset);
        self.put64(area.size);
    }

    /// Appends the payload of [`command::DEVICE_GET_IRQ_INFO`].
    pub fn put_irq_info(&mut self, info: &vfio_irq_info) {
        for number in [info.argsz, info.flags, info.index, info.count] {
            self.put32(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(id: u16, command: u16, size: u32, flags: u32) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..2].copy_from_slice(&id.to_ne_bytes());
        bytes[2..4].copy_from_slice(&command.to_ne_bytes());
        bytes[4..8].copy_from_slice(&size.to_ne_bytes());
        bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
        bytes
    }

    #[test]
    fn rejects_invalid_headers() {
        for size in [0, 1, 15] {
            let short = Header::decode(&header(1, 1, size, 0));
            assert_eq!(short, Err(HeaderError::Short(size)));
        }
        for flags in [1, 2, 15, 0x21] {
            let reply = Header::decode(&header(1, 1, 16, flags));
            assert_eq!(reply, Err(HeaderError::NotACommand(flags)));
        }
        let largest = Header::decode(&header(7, 0xffff, u32::MAX, 0x10)).unwrap();
        assert_eq!((largest.id, largest.command), (7, 0xffff));
        assert_eq!(largest.payload(), u32::MAX as usize - HEADER);
        assert!(!largest.wants_reply);
    }

    #[test]
    fn error_replaces_reply() {
        let asked = Header::decode(&header(9, 4, 32, 0)).unwrap();
        let mut reply = Reply::default();
        reply.begin(&asked);
        reply.room(100);
        reply.fail(&asked, 22);
        let bytes = reply.finish();
        assert_eq!(bytes.len(), HEADER);
        assert_eq!(bytes[..8], [9, 0, 4, 0, 16, 0, 0, 0]);
        assert_eq!(bytes[8..], [0x21, 0, 0, 0, 22, 0, 0, 0]);
    }

    #[test]
    fn structures_have_lengths_of_kernel() {
        let asked = Header::decode(&header(0, 5, 48, 0)).unwrap();
        let mut reply = Reply::default();
        let length = |reply: &mut Reply| reply.finish().len() - HEADER;
        reply.begin(&asked);
        reply.put_region_info(&vfio_region_info::default());
        assert_eq!(length(&mut reply), REGION_INFO);
        reply.put_mappable_area(&vfio_region_sparse_mmap_area::default());
        assert_eq!(length(&mut reply), REGION_INFO_MAPPABLE);
        reply.begin(&asked);
        reply.put_irq_info(&vfio_irq_info::default());
        assert_eq!(length(&mut reply), IRQ_INFO);
        reply.begin(&asked);
        reply.put_device_info(&vfio_device_info::default());
        assert_eq!(length(&mut reply), DEVICE_INFO);
    }
}
