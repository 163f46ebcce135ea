// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Channels on the heap: the ring itself, ends that sleep and wake each other, ends that are
//! killed, and channels without a consumer.

mod counts;
mod crash;
mod device;
mod example;
mod heap;
mod large;
mod numbers;
mod overwrite;
mod recorded;
mod region;
mod reset;
mod ring;
mod sleep;
mod stream;
mod tap;
mod wait;
