//! What a guest and host apps see of each other, the same over every transport: each test runs over each.

mod ivshmem;
mod stranger;
mod support;
mod vfio_user;
mod vhost_user;
