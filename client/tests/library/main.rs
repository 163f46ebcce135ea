// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The library and its examples, with a broker that runs in the test's process.

mod broker;
mod errors;
mod examples;
mod fork;
mod overwrite;
mod records;
mod streams;
mod taps;
mod waits;
