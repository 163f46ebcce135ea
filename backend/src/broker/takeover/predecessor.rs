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
        let process = process_at(path).ok().flatten();
        let control = Control::connect(path).map_err(|error| match error {
            ControlError::NoBroker { path } => ControlError::NoBrokerToReplace { path },
            error => error,
        })?;
        let mut inheritance = Inheritance::new();
        loop {
            let asked = control.ask(Ask::HandOver);
            let (answer, descriptors) = asked.map_err(|error| explain(error, process))?;
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
/// process answers it no question, and `asked`, the process that was asked to hand over, rejected
/// it for another reason if it serves still.
fn explain(error: ControlError, asked: Option<u32>) -> ControlError {
    let ControlError::Rejected { path } = error else {
        return error;
    };
    for question in 0..QUESTIONS {
        if question > 0 {
            std::thread::sleep(PAUSE);
        }
        match process_at(&path) {
            Ok(Some(process)) if asked == Some(process) => break,
            Ok(Some(process)) => return ControlError::Replaced { path, process },
            // The successor is replaced in its turn, or does not listen yet.
            Err(
                ControlError::Rejected { .. }
                | ControlError::Ended { .. }
                | ControlError::NoBroker { .. },
            ) => (),
            Ok(None) | Err(_) => break,
        }
    }
    ControlError::Rejected { path }
}

/// Asks the broker at a control socket for its process, over a connection of its own: a broker
/// hands over the connections that have asked it for anything else.
fn process_at(path: &Path) -> Result<Option<u32>, ControlError> {
    let (answer, _) = Control::connect(path)?.ask(Ask::Status)?;
    Ok(match answer {
        Answer::Status(status) => Some(status.broker),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

    use super::*;

    /// Listens as a broker that hands over to no process, such as one without a free descriptor.
    /// Each answer about its status names the next process.
    fn refusing_broker(path: &Path, mut processes: impl Iterator<Item = u32> + Send + 'static) {
        let (unix, packets) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let socket = rustix::net::socket_with(unix, packets, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        rustix::net::listen(&socket, 8).unwrap();
        std::thread::spawn(move || {
            while let Ok(client) = rustix::net::accept(&socket) {
                let mut request = [0; 256];
                let length = rustix::io::read(&client, &mut request).unwrap_or(0);
                if !request[..length].windows(6).any(|part| part == b"status") {
                    continue;
                }
                let process = processes.next().unwrap();
                let status = format!(
                    r#"{{"version":1,"answer":{{"status":{{"broker":{process},"epoch":1,"uptime":1.0,"slots":[],"claims":[]}}}}}}"#
                );
                rustix::io::write(&client, status.as_bytes()).unwrap();
            }
        });
    }

    #[test]
    fn only_another_process_is_a_successor() {
        let folder = tempfile::tempdir().unwrap();
        let ask = |name: &str, processes: [u32; 2]| {
            let path = folder.path().join(name);
            refusing_broker(&path, processes.into_iter().cycle());
            Predecessor::ask(&path).map(drop).unwrap_err()
        };
        let error = ask("same", [7, 7]);
        assert!(matches!(error, ControlError::Rejected { .. }), "{error}");
        let error = ask("other", [7, 8]);
        let is_named = matches!(error, ControlError::Replaced { process: 8, .. });
        assert!(is_named, "{error}");
    }
}
