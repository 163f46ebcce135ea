// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The successor's end of a hand-over: it asks the running broker for all descriptors, and asks it
//! to retire once the successor is ready to serve.

use std::path::Path;
use std::time::Duration;

use crate::persistence::Inheritance;
use barlink::control::client::{Control, ControlError};
use barlink::control::message::{Answer, Ask};

/// Questions to the broker at a socket, and the pause between them, after one there has closed the
/// connection. Its successor can be replaced as well before it answers.
const QUESTIONS: usize = 20;
const PAUSE: Duration = Duration::from_millis(50);

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
            let asked = control.ask(Ask::HandOver);
            let (answer, descriptors) = asked.map_err(explain)?;
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

/// Returns the cause of an error of the request to hand over. A broker that was replaced closes the
/// connections that it has not served, as if it rejected them. But a broker that rejects this
/// process answers it no question.
fn explain(error: ControlError) -> ControlError {
    let ControlError::Rejected { path } = error else {
        return error;
    };
    for question in 0..QUESTIONS {
        if question > 0 {
            std::thread::sleep(PAUSE);
        }
        let asked = Control::connect(&path).and_then(|control| control.ask(Ask::Status));
        match asked {
            Ok((Answer::Status(status), _)) => {
                let process = status.broker;
                return ControlError::Replaced { path, process };
            }
            // The successor is replaced in its turn, or does not listen yet.
            Err(
                ControlError::Rejected { .. }
                | ControlError::Ended { .. }
                | ControlError::NoBroker { .. },
            ) => (),
            Ok(_) | Err(_) => break,
        }
    }
    ControlError::Rejected { path }
}
