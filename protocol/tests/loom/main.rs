// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Every interleaving of two ends, up to loom's bound on preemptions. The command is
//! `RUSTFLAGS="--cfg loom" cargo test --release -p barlink-protocol --test loom`.
//!
//! Timeouts never end here, so a lost wake-up is a deadlock, which loom reports. Loom models
//! neither write-combining memory nor stores that bypass the cache.
#![cfg(loom)]

mod model;
mod presence;
mod reset;
mod ring;
mod table;
