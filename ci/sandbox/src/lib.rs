// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The sandbox that VMs run in: QEMU, a kernel and the driver's toolchain, and what is built with
//! them.
//!
//! | file | its one job |
//! |---|---|
//! | `setup/` | makes a sandbox, a small Debian system in the user's cache folder |
//! | `recipe.rs` | what goes into a sandbox: `images/sandbox.toml` |
//! | `sandbox.rs` | a finished sandbox, and running programs in it |
//! | `tools.rs` | the tools of a sandbox, or the user's own in their place |
//! | `builds.rs` | builds the programs, the driver and the initramfs |
//! | `module.rs`, `initramfs.rs` | the build of one kernel module; the archive that a guest boots into |
//! | `nextest.rs` | the program that runs tests, and the tests that are built for it |
//! | `debian.rs` | an ordinary Debian, to try the packages on |
//! | `host.rs` | installs packages of the host's own Debian |
//! | `steps.rs` | progress and log of long work |

pub mod builds;
pub mod debian;
pub mod host;
mod initramfs;
pub mod module;
pub mod nextest;
pub mod recipe;
pub mod sandbox;
pub mod setup;
pub mod steps;
pub mod tools;
