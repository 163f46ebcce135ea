//! The program `barlink` as its users and its peers meet it: real processes, real sockets, and every bad input.

mod confined;
mod control;
mod hostile;
mod ivshmem;
mod limits;
mod live;
mod replace;
mod serve;
#[path = "../../../ci/src/service.rs"]
mod service;
mod streams;
mod support;
mod terminal;
mod vmm;
