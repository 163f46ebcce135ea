// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Protocol between the host and the agent in the guest.
//!
//! Each end writes one JSON object per line to the virtio-serial port [`PORT`]. The host sends
//! [`Request`]s, the agent sends [`Report`]s. The host chooses the ID of each process. An ID is
//! used once in the life of a VM, even across a reset. Bytes travel as base64, because the output
//! of a program need not be text.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Name of the virtio-serial port.
pub const PORT: &str = "barlink.agent";

/// Maximum size of the input or output in one line, in bytes before base64.
pub const CHUNK: usize = 32 << 10;

/// A request of the host to the agent.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Start a process, in a process group of its own.
    Run {
        /// The ID that the process gets.
        id: u64,
        /// The program and its arguments. Never empty.
        argv: Vec<String>,
    },
    /// Write to a process's standard input.
    Stdin {
        /// ID of the process.
        id: u64,
        /// The bytes to write. An empty value closes the standard input.
        bytes: Bytes,
    },
    /// Send a signal to a process and its children. Has no effect once the process has ended.
    Kill {
        /// ID of the process.
        id: u64,
        /// Number of the signal.
        signal: i32,
    },
}

/// A report of the agent to the host.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Report {
    /// The agent has started, and has no processes.
    Ready,
    /// A process has written output.
    Output {
        /// ID of the process.
        id: u64,
        /// The stream that the process wrote to.
        stream: Stream,
        /// The bytes, in the order in which they were written.
        bytes: Bytes,
    },
    /// A process has ended, and all its output was reported before.
    Ended {
        /// ID of the process.
        id: u64,
        /// How it ended.
        status: Status,
    },
    /// A process could not be started, or its end could not be determined.
    Refused {
        /// ID of the process.
        id: u64,
        /// Message that says why.
        error: String,
    },
}

/// An output stream of a process.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// The way in which a process ended.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// The process exited with this code.
    Code(i32),
    /// A signal with this number ended the process.
    Signal(i32),
}

impl Status {
    /// Returns whether the exit code is 0.
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// Bytes that are serialized as base64.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Self).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_every_value_survive_the_wire() {
        let sent = Report::Output {
            id: 7,
            stream: Stream::Stderr,
            bytes: Bytes((0..=255).collect()),
        };
        let line = serde_json::to_string(&sent).unwrap();
        assert!(!line.contains('\n'));
        let Report::Output {
            id: 7,
            stream,
            bytes,
        } = serde_json::from_str(&line).unwrap()
        else {
            panic!("{line} came back as something else");
        };
        assert_eq!(stream, Stream::Stderr);
        assert_eq!(bytes.0, (0..=255).collect::<Vec<u8>>());
    }
}
