// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What both ends of a barlink BAR agree on.
#![no_std]

pub mod wire;
