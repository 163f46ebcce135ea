// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The successor's end of a hand-over: it asks the running broker for all descriptors, and asks it
//! to retire once the successor is ready to serve.

use std::path::Path;

use crate::persistence::Inheritance;
use barlink::control::client::{Control, ControlError};
use barlink::control::message::{Answer, Ask};

/// A running broker that hands over.
pub struct Predecessor {
    control: Control,
    /// Descriptors of the broker.
    pub inheritance: Inheritance,
}

impl Predecessor {
    /// Asks the broker at a control socket for its descriptors.
    pub fn ask(path: &Path) -> Result<Self, ControlError> {
        let control = Control::connect(path).map_err(|error| match error {
            ControlError::NoBroker { path } => ControlError::NoBrokerToReplace { path },
            error => error,
        })?;
        let mut inheritance = Inheritance::new();
        loop {
            let (answer, descriptors) = control.ask(Ask::HandOver)?;
            match answer {
                Answer::Inheritance { names, last } if names.len() == descriptors.len() => {
                    inheritance.extend(names.into_iter().zip(descriptors));
                    if last {
                        return Ok(Predecessor {
                            control,
                            inheritance,
                        });
                    }
                }
                _ => return Err(control.not_a_broker("it hands over something else")),
            }
        }
    }

    /// Ends the predecessor. From here on its successor serves.
    pub fn retire(self) -> Result<(), ControlError> {
        match self.control.ask(Ask::Retire)? {
            (Answer::Done, _) => Ok(()),
            _ => Err(self.control.not_a_broker("it does not retire")),
        }
    }
}
