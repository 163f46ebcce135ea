// SPDX-License-Identifier: Apache-2.0 OR MIT

//! barlink's own machinery: the sandbox, the builds, and the virtual machine that tests and the demo run in.
//!
//! `cargo xtask` is the program; the VM tests in `tests/` use the same library.

#[cfg(feature = "all-tasks")]
pub mod bench;
pub mod broker;
pub mod builds;
pub mod check;
#[cfg(feature = "all-tasks")]
pub mod crash;
pub mod debian;
pub mod demo;
pub mod fuzz;
mod host;
mod initramfs;
pub mod module;
#[cfg(not(feature = "all-tasks"))]
pub mod other;
#[cfg(feature = "all-tasks")]
pub mod package;
pub mod recipe;
pub mod sandbox;
pub mod service;
pub mod setup;
pub mod steps;
pub mod tally;
pub mod tap;
pub mod test;
pub mod tools;
pub mod vm;
