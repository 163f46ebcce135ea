// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a client asks: its bytes, read once and checked once, as types. What the numbers mean for the device is not known
//! here.

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK, VFIO_IRQ_SET_DATA_BOOL,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_DATA_TYPE_MASK,
};

use super::wire::{ACCESS, Header, MAX_DATA, MAX_DESCRIPTORS, command};

/// Why a command is answered by an error. The stream goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// No such command, or one that this device has no use for.
    #[error("command {0} is not known here")]
    Unknown(u16),
    /// Longer than any message that this device needs.
    #[error("a message of {0} bytes is too long")]
    Long(u32),
    /// It ends before its structure does, or says of itself that it does.
    #[error("a message of command {0} is too short")]
    Short(u16),
    /// Its parts contradict each other.
    #[error("a message of command {0} has a length that does not fit its content")]
    Length(u16),
    /// More descriptors than the kernel passes at once, or with the first part of a header.
    #[error(
        "a message comes with more than {MAX_DESCRIPTORS} descriptors, or with some before its header is here"
    )]
    ManyDescriptors,
    /// Descriptors where none belong, or another number of them than the message says.
    #[error("a message of command {command} comes with {count} descriptors")]
    Descriptors {
        /// Which command.
        command: u16,
        /// How many.
        count: usize,
    },
    /// A descriptor is not what it should be.
    #[error("an interrupt's descriptor is no eventfd")]
    NotAnEventfd,
    /// A predecessor noted guest memory of which it did not keep the file.
    #[error("the file of the guest's memory was not kept")]
    NotKept,
    /// The version is not ours.
    #[error("version {major}.{minor} of vfio-user is not spoken here")]
    Version {
        /// Major number.
        major: u16,
        /// Minor number.
        minor: u16,
    },
    /// The capabilities are no JSON text that ends in a zero.
    #[error("the client's capabilities cannot be read")]
    Capabilities,
    /// The version is agreed upon first, and once.
    #[error("command {0} comes out of turn")]
    OutOfTurn(u16),
    /// More data than was agreed.
    #[error("a region access has {0} bytes, and {MAX_DATA} are the most")]
    MuchData(u32),
    /// A region, interrupt or range of them that the device does not have.
    #[error("the device has nothing at index {index}, from {start}, for {count}")]
    OutOfRange {
        /// Region or kind of interrupt.
        index: u32,
        /// First byte or vector.
        start: u64,
        /// Bytes or vectors.
        count: u64,
    },
    /// An action on interrupts that makes no sense, or none that MSI-X has.
    #[error("interrupts cannot be set with flags {0:#x}")]
    Action(u32),
}

impl Fault {
    /// The error number that a client is told.
    pub fn errno(self) -> u32 {
        let errno = match self {
            Fault::Unknown(_) => libc::EOPNOTSUPP,
            Fault::Long(_) | Fault::MuchData(_) => libc::E2BIG,
            Fault::Version { .. } => libc::EPROTONOSUPPORT,
            _ => libc::EINVAL,
        };
        errno.unsigned_abs()
    }
}

/// What interrupts are to be set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal<'a> {
    /// The descriptors that come with the message, or none any more.
    Descriptors,
    /// Fire now, all of them; without any, switch all off.
    All,
    /// Fire now those whose byte is not zero.
    Some(&'a [u8]),
}

/// A command, as far as its own bytes say that it makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Agrees on a version.
    Version {
        /// Major number.
        major: u16,
        /// Minor number.
        minor: u16,
        /// JSON text and a zero, or nothing.
        capabilities: &'a [u8],
    },
    /// A range of guest memory is there.
    DmaMap {
        /// `VFIO_DMA_MAP_FLAG_` bits, and others that are not known here.
        flags: u32,
        /// Offset in the descriptor that may come along.
        offset: u64,
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// It is gone.
    DmaUnmap {
        /// `VFIO_DMA_UNMAP_FLAG_` bits.
        flags: u32,
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// What kind of device this is.
    DeviceInfo,
    /// What kind of region one is.
    RegionInfo {
        /// Bytes that the client has room for.
        room: u32,
        /// Which.
        index: u32,
    },
    /// What kind of interrupt one is.
    IrqInfo {
        /// Which.
        index: u32,
    },
    /// Which descriptors stand for interrupts.
    SetIrqs {
        /// Which kind.
        index: u32,
        /// First vector.
        start: u32,
        /// Vectors.
        count: u32,
        /// To what.
        signal: Signal<'a>,
    },
    /// Reads a region.
    Read {
        /// Which.
        region: u32,
        /// Where.
        offset: u64,
        /// Bytes, at most [`MAX_DATA`].
        count: usize,
    },
    /// Writes a region.
    Write {
        /// Which.
        region: u32,
        /// Where.
        offset: u64,
        /// What.
        data: &'a [u8],
    },
    /// Resets the device.
    Reset,
}

impl<'a> Request<'a> {
    /// Reads a command from its header and all that follows it.
    pub fn parse(header: &Header, payload: &'a [u8]) -> Result<Self, Fault> {
        let command = header.command;
        let mut fields = Fields {
            command,
            bytes: payload,
        };
        let request = match command {
            command::VERSION => Request::Version {
                major: fields.take16()?,
                minor: fields.take16()?,
                capabilities: fields.take_rest(),
            },
            command::DMA_MAP => {
                fields.argument_size(32)?;
                Request::DmaMap {
                    flags: fields.take32()?,
                    offset: fields.take64()?,
                    address: fields.take64()?,
                    size: fields.take64()?,
                }
            }
            command::DMA_UNMAP => {
                fields.argument_size(24)?;
                Request::DmaUnmap {
                    flags: fields.take32()?,
                    address: fields.take64()?,
                    size: fields.take64()?,
                }
            }
            command::DEVICE_GET_INFO => {
                fields.argument_size(super::wire::DEVICE_INFO)?;
                fields.skip(12)?;
                Request::DeviceInfo
            }
            command::DEVICE_GET_REGION_INFO => {
                let room = fields.argument_size(super::wire::REGION_INFO)?;
                fields.skip(4)?;
                let index = fields.take32()?;
                fields.skip(20)?;
                Request::RegionInfo { room, index }
            }
            command::DEVICE_GET_IRQ_INFO => {
                fields.argument_size(super::wire::IRQ_INFO)?;
                fields.skip(4)?;
                let index = fields.take32()?;
                fields.skip(4)?;
                Request::IrqInfo { index }
            }
            command::DEVICE_SET_IRQS => set_irqs(&mut fields)?,
            command::REGION_READ => {
                let (offset, region, count) = access(&mut fields)?;
                if !fields.bytes.is_empty() {
                    return Err(Fault::Length(command));
                }
                Request::Read {
                    region,
                    offset,
                    count,
                }
            }
            command::REGION_WRITE => {
                let (offset, region, count) = access(&mut fields)?;
                let data = fields.take_rest();
                if data.len() != count {
                    return Err(Fault::Length(command));
                }
                Request::Write {
                    region,
                    offset,
                    data,
                }
            }
            command::DEVICE_RESET => Request::Reset,
            _ => return Err(Fault::Unknown(command)),
        };
        Ok(request)
    }
}

fn access(fields: &mut Fields<'_>) -> Result<(u64, u32, usize), Fault> {
    let offset = fields.take64()?;
    let region = fields.take32()?;
    let count = fields.take32()?;
    if count as usize > MAX_DATA {
        return Err(Fault::MuchData(count));
    }
    Ok((offset, region, count as usize))
}

fn set_irqs<'a>(fields: &mut Fields<'a>) -> Result<Request<'a>, Fault> {
    fields.argument_size(super::wire::IRQ_SET)?;
    let flags = fields.take32()?;
    let index = fields.take32()?;
    let start = fields.take32()?;
    let count = fields.take32()?;
    // Masking is for INTx, which the device has not.
    let known = VFIO_IRQ_SET_ACTION_TYPE_MASK | VFIO_IRQ_SET_DATA_TYPE_MASK;
    if flags & VFIO_IRQ_SET_ACTION_TYPE_MASK != VFIO_IRQ_SET_ACTION_TRIGGER || flags & !known != 0 {
        return Err(Fault::Action(flags));
    }
    let signal = match flags & VFIO_IRQ_SET_DATA_TYPE_MASK {
        VFIO_IRQ_SET_DATA_NONE => Signal::All,
        VFIO_IRQ_SET_DATA_EVENTFD => Signal::Descriptors,
        VFIO_IRQ_SET_DATA_BOOL => {
            let wanted = fields.bytes.get(..count as usize);
            Signal::Some(wanted.ok_or(Fault::Length(fields.command))?)
        }
        _ => return Err(Fault::Action(flags)),
    };
    Ok(Request::SetIrqs {
        index,
        start,
        count,
        signal,
    })
}

/// What is not read yet of a payload.
struct Fields<'a> {
    command: u16,
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let (number, rest) = self
            .bytes
            .split_first_chunk()
            .ok_or(Fault::Short(self.command))?;
        self.bytes = rest;
        Ok(*number)
    }

    fn take16(&mut self) -> Result<u16, Fault> {
        self.take().map(u16::from_ne_bytes)
    }

    fn take32(&mut self) -> Result<u32, Fault> {
        self.take().map(u32::from_ne_bytes)
    }

    fn take64(&mut self) -> Result<u64, Fault> {
        self.take().map(u64::from_ne_bytes)
    }

    fn skip(&mut self, bytes: usize) -> Result<(), Fault> {
        self.bytes = self.bytes.get(bytes..).ok_or(Fault::Short(self.command))?;
        Ok(())
    }

    fn take_rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    /// The first field of most structures: how long the client says that it is, or how much room it has for the answer.
    fn argument_size(&mut self, least: usize) -> Result<u32, Fault> {
        let size = self.take32()?;
        if (size as usize) < least {
            return Err(Fault::Short(self.command));
        }
        Ok(size)
    }
}

const _: () = assert!(ACCESS == 8 + 4 + 4);

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(command: u16, payload: &[u8]) -> Result<Request<'_>, Fault> {
        let header = Header {
            id: 1,
            command,
            size: (16 + payload.len()) as u32,
            wants_reply: true,
        };
        Request::parse(&header, payload)
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    /// A message of each command, as QEMU sends it.
    fn whole() -> Vec<(u16, Vec<u8>)> {
        vec![
            (command::VERSION, b"\0\0\x01\0{}\0".to_vec()),
            (command::DMA_MAP, words(&[32, 3, 0, 0, 4096, 0, 4096, 0])),
            (command::DMA_UNMAP, words(&[24, 0, 4096, 0, 4096, 0])),
            (command::DEVICE_GET_INFO, words(&[16, 0, 0, 0])),
            (
                command::DEVICE_GET_REGION_INFO,
                words(&[32, 0, 2, 0, 0, 0, 0, 0]),
            ),
            (command::DEVICE_GET_IRQ_INFO, words(&[16, 0, 2, 0])),
            (command::DEVICE_SET_IRQS, words(&[20, 0x24, 2, 0, 1])),
            (command::REGION_READ, words(&[12, 0, 0, 4])),
            (command::REGION_WRITE, words(&[12, 0, 0, 4, 7])),
            (command::DEVICE_RESET, Vec::new()),
        ]
    }

    #[test]
    fn commands_are_read_as_qemu_sends_them() {
        let expected = [
            Request::Version {
                major: 0,
                minor: 1,
                capabilities: b"{}\0",
            },
            Request::DmaMap {
                flags: 3,
                offset: 0,
                address: 4096,
                size: 4096,
            },
            Request::DmaUnmap {
                flags: 0,
                address: 4096,
                size: 4096,
            },
            Request::DeviceInfo,
            Request::RegionInfo { room: 32, index: 2 },
            Request::IrqInfo { index: 2 },
            Request::SetIrqs {
                index: 2,
                start: 0,
                count: 1,
                signal: Signal::Descriptors,
            },
            Request::Read {
                region: 0,
                offset: 12,
                count: 4,
            },
            Request::Write {
                region: 0,
                offset: 12,
                data: &[7, 0, 0, 0],
            },
            Request::Reset,
        ];
        for ((command, payload), expected) in whole().into_iter().zip(expected) {
            assert_eq!(parse(command, &payload), Ok(expected));
        }
    }

    #[test]
    fn commands_that_are_cut_short_are_refused() {
        for (command, payload) in whole() {
            // The text of a version can be left out.
            let least = if command == command::VERSION {
                4
            } else {
                payload.len()
            };
            for length in 0..least {
                let fault = parse(command, &payload[..length]);
                let expected = match command {
                    command::REGION_WRITE if length >= ACCESS => Fault::Length(command),
                    _ => Fault::Short(command),
                };
                assert_eq!(fault, Err(expected), "{length} bytes of {command}");
            }
        }
    }

    #[test]
    fn commands_that_contradict_themselves_are_refused() {
        for (command, argument_size) in [(2, 31), (3, 23), (4, 15), (5, 31), (7, 15), (8, 19)] {
            let mut payload = whole()[usize::from(command) - 1 - usize::from(command > 6)]
                .1
                .clone();
            payload[0] = argument_size;
            assert_eq!(parse(command, &payload), Err(Fault::Short(command)));
        }
        let access = |count, data: &[u32]| words(&[&[0, 0, 0, count], data].concat());
        for (command, payload, fault) in [
            (9, access(4, &[0]), Fault::Length(9)),
            (9, access(4097, &[]), Fault::MuchData(4097)),
            (9, access(u32::MAX, &[]), Fault::MuchData(u32::MAX)),
            (10, access(8, &[0]), Fault::Length(10)),
            (10, access(0, &[0]), Fault::Length(10)),
            (10, access(u32::MAX, &[0]), Fault::MuchData(u32::MAX)),
        ] {
            assert_eq!(parse(command, &payload), Err(fault));
        }
    }

    #[test]
    fn interrupts_are_set_in_ways_that_make_sense() {
        let set =
            |flags, count, data: &[u8]| [&words(&[20, flags, 2, 0, count])[..], data].concat();
        // No data or all kinds of it; no action, all of them, masking; bits that mean nothing.
        for flags in [
            0x20,
            0x23,
            0x26,
            0x27,
            0x04,
            0x3c,
            0x0c,
            0x14,
            0x64,
            0x8000_0024,
        ] {
            let fault = parse(command::DEVICE_SET_IRQS, &set(flags, 1, &[])).unwrap_err();
            assert_eq!(fault, Fault::Action(flags));
        }
        let few = set(0x22, 3, &[1, 1]);
        assert_eq!(parse(8, &few), Err(Fault::Length(8)));
        let many = set(0x22, u32::MAX, &[1, 1]);
        assert_eq!(parse(8, &many), Err(Fault::Length(8)));
        let fits = set(0x22, 2, &[1, 0]);
        let signal = parse(8, &fits).map(|request| match request {
            Request::SetIrqs { signal, .. } => signal,
            other => panic!("{other:?}"),
        });
        assert_eq!(signal, Ok(Signal::Some(&[1, 0])));
    }

    #[test]
    fn commands_that_are_not_known_are_told_apart_from_wrong_ones() {
        for command in [0, 6, 11, 12, 14, 15, 16, 0xffff] {
            let fault = parse(command, &[0; 64]).unwrap_err();
            assert_eq!(fault, Fault::Unknown(command));
            assert_eq!(fault.errno(), libc::EOPNOTSUPP.unsigned_abs());
        }
    }
}
