// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The sandbox that VMs run in, with QEMU, a kernel and the driver's toolchain, and the builds that
//! use it.
//!
//! | file | content |
//! |---|---|
//! | `setup/` | makes a sandbox, a small Debian system in the user's cache folder |
//! | `recipe.rs` | the data that a sandbox is made from: `images/sandbox.toml` |
//! | `sandbox.rs` | a finished sandbox, and commands that run in it |
//! | `tools.rs` | the tools of a sandbox, or the user's own in their place |
//! | `builds.rs` | builds the programs, the driver and the initramfs |
//! | `bare_guest.rs` | the build of the bare guest, `ci/bare-guest/` |
//! | `module.rs` | the build of one kernel module |
//! | `initramfs.rs` | the archive that a guest boots |
//! | `nextest.rs` | cargo-nextest, which runs tests, and the build of the tests |
//! | `debian.rs` | an ordinary Debian, to try the packages on |
//! | `host.rs` | installs Debian packages on the host |
//! | `steps.rs` | progress and log of long work |

mod bare_guest;
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
