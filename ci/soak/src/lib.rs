// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask soak`.

pub mod crash;
