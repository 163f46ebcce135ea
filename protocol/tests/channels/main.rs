// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Channels on the heap: the ring itself, ends that sleep and wake each other, and ends that are
//! killed.

mod counts;
mod crash;
mod example;
mod heap;
mod region;
mod reset;
mod ring;
mod sleep;
mod stream;
mod tap;
mod wait;
