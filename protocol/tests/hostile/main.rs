// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A channel whose other side is an attacker that writes any word at any moment, between any two
//! looks of an end. No call may panic, access memory outside of its channel, or take for ever.

mod faults;
mod looks;
mod region;
mod scribbler;
