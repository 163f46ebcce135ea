// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The conformance suite: guests and host apps see the same of each other over every transport.
//! Each test runs over each transport, in a module of the transport's name. `ci/tests/driver/` is
//! the driver's part of the suite.

mod debugger;
mod foreign_device;
mod ivshmem;
mod resets;
mod stock_kernel;
mod support;
mod vfio_user;
mod vhost_user;
