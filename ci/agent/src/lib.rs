// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the host and the agent in the guest say to each other.
//!
//! Both ends write one JSON object a line over the virtio-serial port [`PORT`]. The host sends [`Request`]s, the agent
//! sends [`Report`]s. The host numbers the processes; a number is used once in the life of a VM, also across a reset.
//! Bytes travel as base64, since what a program prints need not be text.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The name of the virtio-serial port.
pub const PORT: &str = "barlink.agent";

/// The largest piece of a process's input or output in one line, in bytes.
pub const CHUNK: usize = 32 << 10;

/// What the host asks of the agent.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Start a process, in a process group of its own.
    Run {
        /// The host's number for it.
        id: u64,
        /// The program and its arguments; never empty.
        argv: Vec<String>,
    },
    /// Write to a process's standard input.
    Stdin {
        /// Which process.
        id: u64,
        /// What to write; empty closes its standard input.
        bytes: Bytes,
    },
    /// Send a signal to a process and all that it started. Does nothing once it has ended.
    Kill {
        /// Which process.
        id: u64,
        /// The signal's number.
        signal: i32,
    },
}

/// What the agent reports to the host.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Report {
    /// The agent has started, and knows of no process.
    Ready,
    /// A process wrote something.
    Output {
        /// Which process.
        id: u64,
        /// Where it wrote.
        stream: Stream,
        /// What it wrote, in order.
        bytes: Bytes,
    },
    /// A process has ended, and all its output has been reported.
    Ended {
        /// Which process.
        id: u64,
        /// How it ended.
        status: Status,
    },
    /// A process could not be started.
    Refused {
        /// Which process.
        id: u64,
        /// The error.
        error: String,
    },
}

/// One of a process's two outputs.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// By itself, with this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Status {
    /// Whether the exit code is 0.
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

/// Bytes, base64 on the wire.
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
