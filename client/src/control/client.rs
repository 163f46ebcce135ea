// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A host app's side of a control socket.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::message::{Answer, Ask, MAX_PACKET, Refusal, Reply, Request, VERSION};
use super::packet::PacketSocket;
use crate::error_kind::ErrorKind;

/// The time that a broker may take to answer. A broker answers at once, so a later answer is not a
/// broker's.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A broker could not be asked, or refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// No process listens there.
    #[error(
        "no broker at {path}: start one with `barlink serve --ivshmem /tmp/vm.sock` (and the same --name or --control, if \
         any), or name another"
    )]
    NoBroker {
        /// The socket.
        path: PathBuf,
    },
    /// There is no broker that could be replaced.
    #[error(
        "no broker to replace at {path}: leave --replace out, or name the one that runs by --name or --control"
    )]
    NoBrokerToReplace {
        /// The socket.
        path: PathBuf,
    },
    /// This user may not connect.
    #[error(
        "no permission to attach at {path}: run as the broker's user, or start it with --allow-user and a --control socket whose folder you can enter"
    )]
    Permission {
        /// The socket.
        path: PathBuf,
    },
    /// The socket belongs to another program.
    #[error("{path} is not the control socket of a broker: {why}")]
    NotABroker {
        /// The socket.
        path: PathBuf,
        /// The observation that shows it.
        why: String,
    },
    /// The broker does not answer.
    #[error(
        "no broker answers at {path}: continue its process if it is stopped, or start the service whose manager keeps \
         the socket"
    )]
    NoAnswer {
        /// The socket.
        path: PathBuf,
    },
    /// The broker closed the connection without an answer, as it does for users who are not
    /// allowed.
    #[error("the broker at {path} rejected this process: see the broker's log")]
    Rejected {
        /// The socket.
        path: PathBuf,
    },
    /// The broker refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The connection failed.
    #[error("the broker at {path} cannot be reached")]
    Lost {
        /// The socket.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
}

impl ControlError {
    /// Returns the class of the error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            ControlError::NoBroker { .. } | ControlError::NoBrokerToReplace { .. } => {
                ErrorKind::NotFound
            }
            ControlError::Permission { .. } => ErrorKind::PermissionDenied,
            ControlError::NotABroker { .. } => ErrorKind::Incompatible,
            ControlError::NoAnswer { .. }
            | ControlError::Rejected { .. }
            | ControlError::Lost { .. } => ErrorKind::Disconnected,
            ControlError::Refused(refusal) => refusal.kind(),
        }
    }
}

/// A connection to a broker. It carries one request at a time, so threads wait for each other.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    connection: Mutex<Connection>,
}

#[derive(Debug)]
struct Connection {
    socket: PacketSocket,
    /// The broker has answered a request, so it has accepted the connection.
    answered: bool,
    /// A request has had no valid answer. A later packet would be taken for the answer to another
    /// request.
    out_of_step: bool,
    /// Ends of channels that were claimed over this connection and not released.
    held: usize,
}

impl Connection {
    fn new(socket: PacketSocket) -> Self {
        Connection {
            socket,
            answered: false,
            out_of_step: false,
            held: 0,
        }
    }

    /// Ends a connection that cannot be used any more, so that the broker releases claims whose
    /// answers were lost. The connection stays while an end is held here: its holder does not check
    /// the connection, and the broker would give the end to others.
    fn give_up(&self) {
        if self.out_of_step && self.held == 0 {
            self.socket.shut_down();
        }
    }
}

impl Control {
    /// Connects to a broker's control socket.
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        let socket = PacketSocket::connect(path, TIMEOUT).map_err(|source| {
            let path = path.to_owned();
            match source
                .raw_os_error()
                .map(rustix::io::Errno::from_raw_os_error)
            {
                Some(
                    rustix::io::Errno::NOENT
                    | rustix::io::Errno::CONNREFUSED
                    | rustix::io::Errno::NOTDIR,
                ) => ControlError::NoBroker { path },
                Some(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => {
                    ControlError::Permission { path }
                }
                Some(rustix::io::Errno::PROTOTYPE) => ControlError::NotABroker {
                    path,
                    why: "it is a socket of another kind".to_owned(),
                },
                Some(rustix::io::Errno::AGAIN) => ControlError::NoAnswer { path },
                Some(rustix::io::Errno::NAMETOOLONG) => ControlError::NotABroker {
                    path,
                    why: "its path is too long for a socket".to_owned(),
                },
                _ => ControlError::Lost { path, source },
            }
        })?;
        Ok(Control {
            path: path.to_owned(),
            connection: Mutex::new(Connection::new(socket)),
        })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sends a request, and waits for the answer and its descriptors. After a missing or invalid
    /// answer the connection takes no more requests.
    pub fn ask(&self, ask: Ask) -> Result<(Answer, Vec<OwnedFd>), ControlError> {
        let releases = matches!(ask, Ask::Release { .. });
        let request = Request {
            version: VERSION,
            ask,
        };
        let request = serde_json::to_vec(&request).map_err(|error| ControlError::Lost {
            path: self.path.clone(),
            source: error.into(),
        })?;
        let connection = self.connection.lock();
        let mut connection = connection.unwrap_or_else(PoisonError::into_inner);
        if connection.out_of_step {
            connection.held = connection.held.saturating_sub(usize::from(releases));
            connection.give_up();
            return Err(ControlError::Lost {
                path: self.path.clone(),
                source: io::Error::other("it did not answer before: attach again"),
            });
        }
        let mut outcome = self.exchange(&connection.socket, &request);
        if matches!(outcome, Err(ControlError::Rejected { .. })) && !connection.answered {
            // A broker that is replaced closes connections that it has not served. Its successor
            // listens by now.
            connection.socket = Self::connect(&self.path)?.into_socket();
            outcome = self.exchange(&connection.socket, &request);
        }
        connection.answered = true;
        // A refused release was of an end that was not held.
        if releases && !matches!(outcome, Err(ControlError::Refused(_))) {
            connection.held = connection.held.saturating_sub(1);
        }
        match &outcome {
            Ok((Answer::Claimed, _)) => connection.held += 1,
            // A connection that the broker closed needs no further care.
            Ok(_) | Err(ControlError::Refused(_) | ControlError::Rejected { .. }) => (),
            Err(_) => {
                connection.out_of_step = true;
                connection.give_up();
            }
        }
        outcome
    }

    fn into_socket(self) -> PacketSocket {
        let connection = self.connection.into_inner();
        connection.unwrap_or_else(PoisonError::into_inner).socket
    }

    fn exchange(
        &self,
        socket: &PacketSocket,
        request: &[u8],
    ) -> Result<(Answer, Vec<OwnedFd>), ControlError> {
        let lost = |source: io::Error| match source.kind() {
            io::ErrorKind::WouldBlock => ControlError::NoAnswer {
                path: self.path.clone(),
            },
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ControlError::Rejected {
                path: self.path.clone(),
            },
            _ => ControlError::Lost {
                path: self.path.clone(),
                source,
            },
        };
        socket.send(request, &[]).map_err(lost)?;
        let mut buffer = Box::new([0; MAX_PACKET]);
        let received = socket.receive_with_descriptors(&mut buffer).map_err(lost)?;
        let (bytes, descriptors) = received.ok_or(ControlError::Rejected {
            path: self.path.clone(),
        })?;
        let answer = Reply::parse(bytes)
            .map_err(|error| self.not_a_broker(&format!("its answer is {error}")))?;
        match answer {
            Answer::Refused(refusal) => Err(refusal.into()),
            answer => Ok((answer, descriptors)),
        }
    }

    /// Returns the error for an answer that no broker gives.
    pub fn not_a_broker(&self, why: &str) -> ControlError {
        ControlError::NotABroker {
            path: self.path.clone(),
            why: why.to_owned(),
        }
    }
}
