// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The control server: it answers the requests of host apps.

mod answers;
mod server;

pub use self::answers::{Answered, answer};
pub use self::server::{Exit, serve};
