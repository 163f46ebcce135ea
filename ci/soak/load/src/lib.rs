// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The ends of channels that `cargo xtask soak crash` kills, on the host and in the guest: they
//! send and receive numbered records, and write notes that outlive them. The program
//! `barlink-crash-load` is one such end. The harness (`ci/soak/src/crash/`) reads the notes to find
//! lost and repeated records.
//!
//! | file | its one job |
//! |---|---|
//! | `notes.rs` | the notes, in the region's raw window |
//! | `record.rs` | the content of a record, by its number |
//! | `journal.rs` | the verdict on a record's number, from the notes |
//! | `random.rs` | numbers from a seed |
//! | `pace.rs` | random pauses |
//! | `trap.rs` | death at a chosen point |
//! | `produce.rs`, `consume.rs` | the two ends |
//! | `drop.rs`, `overwrite.rs` | the producers of channels that drop and that overwrite |
//! | `tap.rs` | taps of a channel |

mod consume;
mod drop;
mod journal;
mod notes;
mod overwrite;
mod pace;
mod produce;
mod random;
mod record;
mod tap;
mod trap;

pub use consume::{Gaps, consume};
pub use drop::drop_records;
pub use notes::{Note, Notes, Set};
pub use overwrite::overwrite;
pub use produce::produce;
pub use random::Random;
pub use tap::tap;
pub use trap::{Point, Trap, Trapped};

use barlink_protocol::cursor::Kind;

use journal::Journal;
use pace::Pace;

/// The kind of all records but the last.
const KIND: Kind = Kind::USER;
