// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The work that `cargo xtask bench` measures, on the host and in the guest. The program
//! `barlink-bench-load` does one piece of it and prints a [`Measured`] as JSON.
//!
//! | file | its one job |
//! |---|---|
//! | `stream.rs` | a stream of records through a channel |
//! | `pipe.rs` | a stream of records through a peer of barlink, such as a socket |
//! | `files.rs` | a pipe of two files in a shared folder |
//! | `raw.rs` | a stream of records through a peer: plain ivshmem |
//! | `trip.rs` | round trips through channels and peers: the asking end, which times them |
//! | `answer.rs` | the answering end |
//! | `rest.rs` | pauses that let both ends sleep, and counts of their sleeps |
//! | `tap.rs` | a tap of a stream whose sender never waits |
//! | `newest.rs` | the newest value of a sender that never pauses |
//! | `place.rs` | streams and round trips of records that are built in the channel itself |
//! | `idle.rs` | an end that sleeps, and its cost |
//! | `copy.rs`, `ring.rs` | limits: copying within a process, a channel within a process |
//! | `cost.rs` | the cost of one record in instructions |
//! | `steps.rs` | the time of each step of a small record |
//! | `flow.rs` | the counts and times of one end of a stream |
//! | `clock.rs` | times |

mod answer;
mod clock;
mod copy;
mod cost;
mod files;
mod flow;
mod idle;
mod newest;
mod pipe;
mod place;
mod raw;
mod rest;
mod ring;
mod steps;
mod stream;
mod tap;
mod trip;

pub use answer::Answer;
pub use copy::Copy;
pub use cost::Cost;
pub use files::FILES;
pub use flow::{Flow, Pace, STRIDE, WARM_UP};
pub use idle::{Used, Watch, idle};
pub use newest::{Newest, newest, newest_of_tap, renew, renew_channel};
pub use pipe::{Endpoint, LAST, PipeReceive, PipeSend};
pub use place::{Build, word};
pub use raw::{RawMode, RawReceive, RawSend, SIZE as RAW_SIZE};
pub use rest::{Questions, Sleeps, Think};
pub use ring::Ring;
pub use steps::{Step, Steps};
pub use stream::{Receive, Send};
pub use tap::{Tapped, tap};
pub use trip::{Ask, Trips, Wait};

use serde::{Deserialize, Serialize};

/// Bytes that can be under way in a channel and in a peer. A channel of this size holds a record of
/// 4 MiB, which is at most half of the channel less a header, and two more.
pub const CAPACITY: u64 = 16 << 20;

/// The result of one end of a stream.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Measured {
    /// Number of all records.
    pub records: u64,
    /// Bytes of payload in the timed part.
    pub bytes: u64,
    /// Length of the timed part, in nanoseconds.
    pub nanoseconds: u64,
    /// Processor time of the whole process in the timed part, in nanoseconds.
    pub cpu: u64,
    /// Wrapping sum of all 64-bit words of payload of all records, the same for sender and
    /// receiver.
    pub sum: u64,
}

impl Measured {
    /// Returns the rate in bytes of payload a second.
    pub fn rate(&self) -> f64 {
        self.bytes as f64 * 1e9 / self.nanoseconds as f64
    }
}
