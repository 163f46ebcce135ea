//! Channels on the heap: the ring itself, and ends that sleep and wake each other.

mod heap;
mod region;
mod ring;
mod sleep;
mod stream;
