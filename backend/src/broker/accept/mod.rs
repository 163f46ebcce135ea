// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Accepting: the listening sockets, and for each slot a thread that admits one VM at a time.

mod acceptor;
mod hidden;
mod listener;
mod lock;
mod rejected;
mod socket_error;
mod unreachable;

pub(super) use self::acceptor::Acceptor;
pub(super) use self::hidden::is_control_process;
pub use self::listener::Listener;
pub(super) use self::listener::resolve;
pub use self::socket_error::SocketError;
