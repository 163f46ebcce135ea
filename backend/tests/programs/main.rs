//! The program `barlink` as its users and its peers meet it: real processes, real sockets, and every bad input.

mod control;
mod hostile;
mod ivshmem;
mod limits;
mod live;
mod replace;
mod serve;
mod sessions;
mod streams;
mod support;
mod vfio_user;
mod vfio_user_client;
mod vfio_user_guest;
mod vfio_user_hostile;
mod vfio_user_replace;
mod vmm;
