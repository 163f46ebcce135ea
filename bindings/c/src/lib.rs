// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The library for C and C++: the functions of `barlink.h`, over the crate `barlink`.
//!
//! | file | its one job |
//! |---|---|
//! | `handles.rs` | handles: numbers that stand for values, so that a wrong one is an error |
//! | `failure.rs` | error codes, the text of the last error, and the border that no panic crosses |
//! | `arguments.rs` | checks of texts, pointers and times |
//! | `side.rs` | the host's connection and the guest's device |
//! | `sender.rs`, `receiver.rs`, `tap.rs` | the ends of channels, and further readers |
//!
//! Every function returns 0, or the number of an error. A caller's pointer is only used within the
//! call, but for the memory of a record, as each function says.
#![expect(
    unsafe_code,
    reason = "C passes raw pointers, and records in place outlive the call that finds them"
)]

mod arguments;
mod failure;
mod handles;
mod receiver;
mod sender;
mod side;
mod tap;

pub use failure::{Code, barlink_error_text, barlink_version};
pub use receiver::*;
pub use sender::*;
pub use side::*;
pub use tap::*;
