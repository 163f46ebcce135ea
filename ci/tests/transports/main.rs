//! The conformance suite: what a guest and host apps see of each other, the same over every transport. Each test runs over
//! each, in a module of the transport's name. The driver's part of it is `ci/tests/driver/`.

mod ivshmem;
mod resets;
mod stranger;
mod support;
mod vfio_user;
mod vhost_user;
