// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The control server: it answers the requests of host apps.

mod answers;
mod client;
mod readers;
mod server;

pub use self::client::Client;
pub use self::server::{Exit, Next, handle, serve};
