// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The negotiation of a version: the first message, whose payload is JSON text.

use serde::{Deserialize, Serialize};

use super::request::Fault;
use super::wire::{ANNOUNCED_DESCRIPTORS, MAX_DATA, Reply};

/// The supported version of the protocol. Minor versions differ in nothing that is used here. QEMU
/// sends 0.0, and accepts no higher version.
const MAJOR: u16 = 0;
const MINOR: u16 = 1;

/// The capabilities of a client. They must be valid, and have no effect.
#[derive(Deserialize)]
struct Theirs {
    #[serde(default)]
    #[expect(dead_code, reason = "the parser checks it")]
    capabilities: Capabilities,
}

#[derive(Default, Deserialize)]
#[expect(dead_code, reason = "the parser checks it")]
struct Capabilities {
    max_msg_fds: Option<u64>,
    max_data_xfer_size: Option<u64>,
}

#[derive(Serialize)]
struct Ours {
    capabilities: Limits,
}

#[derive(Serialize)]
struct Limits {
    max_msg_fds: u32,
    max_data_xfer_size: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_dma_maps: Option<u32>,
}

/// Answers a client with this version and these capabilities, in a payload of `payload` bytes.
/// `ranges` is the number of ranges of guest memory that the server accepts; `None` means any
/// number.
pub fn negotiate(
    (major, minor): (u16, u16),
    capabilities: &[u8],
    payload: usize,
    ranges: Option<u32>,
    reply: &mut Reply,
) -> Result<(), Fault> {
    if major != MAJOR {
        return Err(Fault::Version { major, minor });
    }
    // Capabilities are optional.
    if let Some((last, text)) = capabilities.split_last() {
        if *last != 0 {
            return Err(Fault::Capabilities);
        }
        let _: Theirs = serde_json::from_slice(text).map_err(|_| Fault::Capabilities)?;
    }
    reply.put16(MAJOR);
    reply.put16(minor.min(MINOR));
    let ours = Ours {
        capabilities: Limits {
            max_msg_fds: ANNOUNCED_DESCRIPTORS,
            max_data_xfer_size: MAX_DATA,
            max_dma_maps: ranges,
        },
    };
    let text = serde_json::to_vec(&ours).map_err(|_| Fault::Capabilities)?;
    // QEMU has room for an answer of the size of its own message. A client that receives no text
    // uses the limits of the protocol, and receives an error when it exceeds the server's.
    if text.len() + 1 + 4 <= payload {
        reply.put(&text);
        reply.put(&[0]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::vfio_user::range::MAX_RANGES;
    use crate::transport::vfio_user::wire::{HEADER, Header};

    /// The capabilities of QEMU 11.1.
    const QEMU: &[u8] = b"{\"capabilities\": {\"pgsizes\": 4096, \"max_msg_fds\": 16, \"max_dma_maps\": 65535, \
        \"max_data_xfer_size\": 1048576, \"migration\": {\"pgsize\": 4096, \"max_bitmap_size\": 268435456}, \
        \"write_multiple\": true}}\0";

    fn answer(version: (u16, u16), text: &[u8]) -> Result<Vec<u8>, Fault> {
        let mut reply = Reply::default();
        let header = Header {
            id: 1,
            command: 1,
            size: 0,
            wants_reply: true,
        };
        reply.begin(&header);
        negotiate(version, text, 4 + text.len(), Some(MAX_RANGES), &mut reply)?;
        Ok(reply.finish()[HEADER..].to_vec())
    }

    #[test]
    fn answer_fits_and_ends_in_zero() {
        let whole = answer((0, 1), QEMU).unwrap();
        assert_eq!(whole[..4], [0, 0, 1, 0]);
        let (last, text) = whole[4..].split_last().unwrap();
        let text: serde_json::Value = serde_json::from_slice(text).unwrap();
        assert_eq!(*last, 0);
        assert_eq!(text["capabilities"]["max_msg_fds"], 16);
        assert_eq!(text["capabilities"]["max_data_xfer_size"], 4096);
        assert_eq!(text["capabilities"]["max_dma_maps"], MAX_RANGES);
        for length in 0..QEMU.len() {
            let text = format!("{{{}}}\0", " ".repeat(length));
            let answer = answer((0, 1), text.as_bytes()).unwrap();
            assert!(answer.len() <= 4 + text.len() && answer.len() >= 4);
            assert!(answer.len() == 4 || answer.last() == Some(&0));
        }
        for (theirs, agreed) in [(0, 0), (1, 1), (2, 1), (0xffff, 1)] {
            assert_eq!(answer((0, theirs), b"").unwrap(), [0, 0, agreed, 0]);
        }
    }

    #[test]
    fn rejects_other_versions_and_texts() {
        for (major, minor) in [(1, 0), (1, 1), (0xffff, 0xffff)] {
            let fault = answer((major, minor), QEMU).unwrap_err();
            assert_eq!(fault, Fault::Version { major, minor });
        }
        let nested = format!("{}\0", "[".repeat(4000));
        for text in [
            &QEMU[..QEMU.len() - 1],
            b"\0",
            b"{\0",
            b"[]]\0",
            b"{\"capabilities\": 7}\0",
            b"{\"capabilities\": {\"max_msg_fds\": -1}}\0",
            b"{} {}\0",
            b"\xff\xfe\0",
            nested.as_bytes(),
        ] {
            assert_eq!(answer((0, 1), text), Err(Fault::Capabilities));
        }
        assert!(answer((0, 1), b"{}\0").is_ok());
        assert!(answer((0, 1), b"{\"capabilities\": {\"new\": [1]}, \"more\": 1}\0").is_ok());
    }
}
