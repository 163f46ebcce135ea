// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands of a client: bytes that are read once and checked once, as types. The device gives
//! the numbers their meaning.

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK, VFIO_IRQ_SET_DATA_BOOL,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_DATA_TYPE_MASK,
};

use super::wire::{ACCESS, Header, MAX_DATA, command};
use crate::socket::descriptors::MAX_DESCRIPTORS;

/// Reason why the answer to a command is an error. The stream continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The command is not known, or this device has no use for it.
    #[error("command {0} is not known here")]
    Unknown(u16),
    /// The message is longer than any that this device needs.
    #[error("a message of {0} bytes is too long")]
    Long(u32),
    /// The message is shorter than its structure, by its bytes or by its own size field.
    #[error("a message of command {0} is too short")]
    Short(u16),
    /// The parts of the message contradict each other.
    #[error("a message of command {0} has a length that does not fit its content")]
    Length(u16),
    /// The message has more descriptors than the kernel passes at once, or some with the first part
    /// of its header.
    #[error(
        "a message comes with more than {MAX_DESCRIPTORS} descriptors, or with some before its header is here"
    )]
    ManyDescriptors,
    /// The message has a wrong number of descriptors.
    #[error("a message of command {command} comes with {count} descriptors")]
    Descriptors {
        /// The command.
        command: u16,
        /// The number of descriptors.
        count: usize,
    },
    /// A descriptor is of the wrong kind.
    #[error("the descriptor of an interrupt is not an eventfd")]
    NotAnEventfd,
    /// A predecessor stored a range of guest memory without its file.
    #[error("the file of the guest's memory was not stored")]
    NotStored,
    /// The version is not supported.
    #[error("version {major}.{minor} of vfio-user is not spoken here")]
    Version {
        /// Major number.
        major: u16,
        /// Minor number.
        minor: u16,
    },
    /// The capabilities are not JSON text that ends in a zero.
    #[error("the client's capabilities cannot be read")]
    Capabilities,
    /// The version was not negotiated first, or twice.
    #[error("command {0} comes out of turn")]
    OutOfTurn(u16),
    /// The access has more data than was negotiated.
    #[error("a region access has {0} bytes, and {MAX_DATA} are the most")]
    MuchData(u32),
    /// The device does not have such a region, interrupt or range of them.
    #[error("the device has nothing at index {index}, from {start}, for {count}")]
    OutOfRange {
        /// Region or kind of interrupt.
        index: u32,
        /// First byte or vector.
        start: u64,
        /// Bytes or vectors.
        count: u64,
    },
    /// The action on interrupts is not valid, or not one of MSI-X.
    #[error("interrupts cannot be set with flags {0:#x}")]
    Action(u32),
}

impl Fault {
    /// Returns the error number of the answer.
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

/// An action on interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal<'a> {
    /// Sets the descriptors of the message, or clears them.
    Descriptors,
    /// Fires all of them; with no vectors, clears all.
    All,
    /// Fires those whose byte is not zero.
    Some(&'a [u8]),
}

/// A command that is consistent in itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Negotiates the version.
    Version {
        /// Major number.
        major: u16,
        /// Minor number.
        minor: u16,
        /// JSON text and a zero, or nothing.
        capabilities: &'a [u8],
    },
    /// Announces a range of guest memory.
    DmaMap {
        /// `VFIO_DMA_MAP_FLAG_` bits, and unknown ones.
        flags: u32,
        /// Offset in the file of the descriptor, if there is one.
        offset: u64,
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// Removes a range of guest memory.
    DmaUnmap {
        /// `VFIO_DMA_UNMAP_FLAG_` bits.
        flags: u32,
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// Asks for the kind of the device.
    DeviceInfo,
    /// Asks for the kind of a region.
    RegionInfo {
        /// Bytes that the client has room for.
        room: u32,
        /// The region.
        index: u32,
    },
    /// Asks for the number of interrupts of a kind.
    IrqInfo {
        /// The kind.
        index: u32,
    },
    /// Sets or fires interrupts.
    SetIrqs {
        /// The kind.
        index: u32,
        /// The first vector.
        start: u32,
        /// Number of vectors.
        count: u32,
        /// The action.
        signal: Signal<'a>,
    },
    /// Reads a region.
    Read {
        /// The region.
        region: u32,
        /// The offset in bytes.
        offset: u64,
        /// Bytes, at most [`MAX_DATA`].
        count: usize,
    },
    /// Writes a region.
    Write {
        /// The region.
        region: u32,
        /// The offset in bytes.
        offset: u64,
        /// The bytes.
        data: &'a [u8],
    },
    /// Resets the device.
    Reset,
}

impl<'a> Request<'a> {
    /// Parses a command from its header and its payload.
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
    // Masking is for INTx, which the device does not have.
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

/// The unread rest of a payload.
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

    /// Reads the first field of most structures: its length, or the client's room for the answer.
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

    /// Returns a message of each command, as QEMU sends it.
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
    fn parses_commands_of_qemu() {
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
    fn rejects_commands_that_are_cut_short() {
        for (command, payload) in whole() {
            // The capabilities of a version are optional.
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
    fn rejects_commands_that_contradict_themselves() {
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
    fn rejects_invalid_actions_on_interrupts() {
        let set =
            |flags, count, data: &[u8]| [&words(&[20, flags, 2, 0, count])[..], data].concat();
        // No kind of data, or several; no action, all actions, masking; unknown bits.
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
    fn distinguishes_unknown_commands_from_invalid_ones() {
        for command in [0, 6, 11, 12, 14, 15, 16, 0xffff] {
            let fault = parse(command, &[0; 64]).unwrap_err();
            assert_eq!(fault, Fault::Unknown(command));
            assert_eq!(fault.errno(), libc::EOPNOTSUPP.unsigned_abs());
        }
    }
}
