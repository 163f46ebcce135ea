// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A claim that a broker has granted.

use std::sync::Arc;

use barlink_protocol::wire::layout::End;

use crate::control::client::{Control, ControlError};
use crate::control::message::{Ask, Refusal};

/// A claim of an end. Dropping it releases the end at the broker.
#[derive(Debug)]
pub struct Claim {
    control: Arc<Control>,
    channel: usize,
    end: End,
}

impl Claim {
    /// Takes over an end that the broker has given to this connection.
    pub(crate) fn new(control: Arc<Control>, channel: usize, end: End) -> Self {
        Claim {
            control,
            channel,
            end,
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // A broker that is gone, or that has closed the connection, has nothing to release.
        match self.control.ask(Ask::Release {
            channel: self.channel,
            end: self.end,
        }) {
            Ok(_)
            | Err(
                ControlError::Refused(Refusal::NotHeld)
                | ControlError::Rejected { .. }
                | ControlError::Ended { .. },
            ) => (),
            // A forked process has a copy of the claim, and the claim is the other process's.
            Err(ControlError::Inherited { .. }) => (),
            Err(error) => log::debug!("a claim is not given back: {error}"),
        }
    }
}
