// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The conformance suite over vfio-user.
#![expect(
    clippy::duplicate_mod,
    reason = "the same tests over another transport"
)]

use barlink_vm::broker::Transport;

const TRANSPORT: Transport = Transport::VfioUser;

#[path = "cache.rs"]
mod cache;
#[path = "channels.rs"]
mod channels;
#[path = "idle.rs"]
mod idle;
#[path = "mixed.rs"]
mod mixed;
#[path = "names.rs"]
mod names;
#[path = "outlived.rs"]
mod outlived;
#[path = "restart.rs"]
mod restart;
#[path = "silence.rs"]
mod silence;
#[path = "snapshots.rs"]
mod snapshots;
#[path = "table.rs"]
mod table;
