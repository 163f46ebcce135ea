//! Every interleaving of two ends, as far as loom's bound on preemptions goes: run by
//! `RUSTFLAGS="--cfg loom" cargo test --release -p barlink-protocol --test loom`.
//!
//! Timeouts never end here, so a wake-up that is lost is a deadlock, which loom reports. Loom does not model
//! write-combined memory, nor stores that bypass the cache.
#![cfg(loom)]

mod model;
mod presence;
mod ring;
