// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A host app's side of a control socket.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use barlink_protocol::wire::layout::End;

use super::message::{Answer, Ask, MAX_PACKET, Refusal, Reply, Request, VERSION};
use super::packet::{PacketSocket, kind_of_file};
use crate::error_kind::ErrorKind;
use crate::process::Process;

/// The time that a broker may take to answer a request. A broker answers at once, unless its
/// process is stopped.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The time that a broker may take to show that it lives, after it has closed a connection.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// A broker could not be asked, or refused.
///
/// ```no_run
/// use barlink::Error;
/// use barlink::host::{self, ControlError};
///
/// let broker = match host::connect("default") {
///     Err(Error::Control(ControlError::NoBrokerOfName { folders, .. })) => {
///         println!("no broker has a socket in {folders}");
///         return Ok(());
///     }
///     broker => broker?,
/// };
/// # drop(broker);
/// # Ok::<(), Error>(())
/// ```
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
    /// No process listens at a socket of that name.
    #[error(
        "no broker `{name}` in {folders}: start one with `barlink serve --ivshmem /tmp/vm.sock` (and the same --name, if \
         any), or name another (`barlink list`)"
    )]
    NoBrokerOfName {
        /// The name.
        name: String,
        /// The folders in which its control socket can be.
        folders: String,
    },
    /// There is no broker that could be replaced.
    #[error(
        "no broker to replace at {path}: leave --replace out, or name the one that runs by --name or --control"
    )]
    NoBrokerToReplace {
        /// The socket.
        path: PathBuf,
    },
    /// Another process has replaced the broker that this one wanted to replace.
    #[error(
        "process {process} has just replaced the broker at {path}, before this one could: try again to replace that one"
    )]
    Replaced {
        /// The socket.
        path: PathBuf,
        /// ID of the process that serves there now.
        process: u32,
    },
    /// This user may not connect.
    #[error(
        "no permission to attach at {path}: run as the broker's user, or start it with --allow-user and a --control socket whose folder you can enter"
    )]
    Permission {
        /// The socket.
        path: PathBuf,
    },
    /// The path, or a parent of it, is a file of another kind.
    #[error(
        "no broker at {path}: {what}; name the broker's control socket, or start one with another path"
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
        /// The file that is there.
        what: String,
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
    /// The broker closed a connection over which it had answered, and nothing answers at its
    /// socket.
    #[error("the broker at {path} has ended: start it again, and attach anew")]
    Ended {
        /// The socket.
        path: PathBuf,
    },
    /// The broker closed a connection over which it had answered, and a broker answers at its
    /// socket.
    #[error(
        "the broker at {path} closed the connection: attach anew if it was restarted, else see the broker's log"
    )]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// The process that this one was forked from has connected to the broker.
    #[error(
        "the connection to the broker at {path} belongs to process {process}, which forked this one: attach in this \
         process"
    )]
    Inherited {
        /// The socket.
        path: PathBuf,
        /// ID of the process that connected.
        process: u32,
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
    ///
    /// ```no_run
    /// use barlink::host::{self, ControlError};
    /// use barlink::{Error, ErrorKind};
    ///
    /// /// Whether a broker that starts later can make the call succeed.
    /// fn can_pass(error: &ControlError) -> bool {
    ///     matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Disconnected)
    /// }
    ///
    /// match host::connect("default") {
    ///     Err(Error::Control(error)) if can_pass(&error) => println!("not yet: {error}"),
    ///     broker => println!("{} bytes", broker?.region().size()),
    /// }
    /// # Ok::<(), Error>(())
    /// ```
    pub fn kind(&self) -> ErrorKind {
        match self {
            ControlError::NoBroker { .. }
            | ControlError::NoBrokerOfName { .. }
            | ControlError::NoBrokerToReplace { .. }
            | ControlError::NotASocket { .. } => ErrorKind::NotFound,
            ControlError::Permission { .. } => ErrorKind::PermissionDenied,
            ControlError::NotABroker { .. } => ErrorKind::Incompatible,
            ControlError::NoAnswer { .. }
            | ControlError::Rejected { .. }
            | ControlError::Ended { .. }
            | ControlError::Closed { .. }
            | ControlError::Lost { .. } => ErrorKind::Disconnected,
            ControlError::Replaced { .. } => ErrorKind::InUse,
            ControlError::Inherited { .. } => ErrorKind::Inherited,
            ControlError::Refused(refusal) => refusal.kind(),
        }
    }
}

/// Says what a path names instead of a socket; `None` for a socket, also one that a link names, and
/// for no file. The kernel reports such a file as a socket without a process.
fn other_than_socket(path: &Path) -> Option<String> {
    for (number, file) in path.ancestors().enumerate() {
        let kind = match file.symlink_metadata() {
            // A parent is a file.
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => continue,
            found => found.ok()?.file_type(),
        };
        let target = file.metadata().ok()?.file_type();
        let what = match kind.is_symlink() {
            true => format!("a symbolic link to {}", kind_of_file(target)),
            false => kind_of_file(kind).to_owned(),
        };
        return match number {
            0 if target.is_socket() => None,
            0 => Some(format!("that is {what}")),
            _ => Some(format!("{} is {what}", file.display())),
        };
    }
    None
}

/// A connection to a broker. It carries one request at a time, so threads wait for each other.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    /// The process that connected.
    process: Process,
    connection: Mutex<Connection>,
}

#[derive(Debug)]
struct Connection {
    socket: Arc<PacketSocket>,
    /// The broker has answered a request, so it has accepted the connection.
    answered: bool,
    /// A request has had no valid answer. A later packet would be taken for the answer to another
    /// request.
    out_of_step: bool,
    /// Answers that came too late, or did not come yet. They come before that of the next request.
    late: usize,
    /// Ends of channels that were claimed over this connection and not released.
    held: Vec<(usize, End)>,
}

impl Connection {
    fn new(socket: PacketSocket) -> Self {
        Connection {
            socket: Arc::new(socket),
            answered: false,
            out_of_step: false,
            late: 0,
            held: Vec::new(),
        }
    }

    /// Shuts down a connection that takes no more requests, so that the broker releases claims
    /// whose answers were lost. Does nothing while this process holds an end over the connection:
    /// the broker would release that end too, and give it to another process while this one uses
    /// it.
    fn give_up(&self) {
        if self.out_of_step && self.held.is_empty() {
            self.socket.shut_down();
        }
    }

    /// Notes that the answer to a request will come late. If the request is a claim, releases it,
    /// because the caller will not learn that it was granted.
    fn expect_late(&mut self, request: &Packet) {
        self.late += 1;
        let Some((channel, end)) = request.claims else {
            return;
        };
        // The broker refuses to claim an end that this connection holds. A release would then end
        // the claim that is in use.
        if self.held.contains(&(channel, end)) {
            return;
        }
        let release = Packet::new(Ask::Release { channel, end });
        let now = Some(Instant::now());
        let sent = release.and_then(|release| self.socket.send_until(&release.bytes, &[], now));
        match sent {
            Ok(()) => self.late += 1,
            Err(error) => log::debug!("a claim is not given back: {error}"),
        }
    }
}

/// An encoded request.
struct Packet {
    bytes: Vec<u8>,
    /// The channel and end that it releases.
    releases: Option<(usize, End)>,
    /// The channel and end that it claims.
    claims: Option<(usize, End)>,
}

impl Packet {
    fn new(ask: Ask) -> io::Result<Self> {
        let (claims, releases) = match ask {
            Ask::Claim { channel, end } => (Some((channel, end)), None),
            Ask::Release { channel, end } => (None, Some((channel, end))),
            _ => (None, None),
        };
        let request = Request {
            version: VERSION,
            ask,
        };
        Ok(Packet {
            bytes: serde_json::to_vec(&request)?,
            releases,
            claims,
        })
    }
}

impl Control {
    /// Connects to a broker's control socket.
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        Self::connect_until(path, Instant::now() + TIMEOUT)
    }

    /// Connects to a broker's control socket, and asks the first request. Both together wait no
    /// longer than for another request.
    pub(crate) fn open(
        path: &Path,
        ask: Ask,
    ) -> Result<(Self, Answer, Vec<OwnedFd>), ControlError> {
        let deadline = Instant::now() + TIMEOUT;
        let control = Self::connect_until(path, deadline)?;
        let (answer, descriptors) = control.ask_until(ask, Some(deadline))?;
        Ok((control, answer, descriptors))
    }

    fn connect_until(path: &Path, deadline: Instant) -> Result<Self, ControlError> {
        let socket = PacketSocket::connect_until(path, deadline).map_err(|source| {
            let path = path.to_owned();
            match source
                .raw_os_error()
                .map(rustix::io::Errno::from_raw_os_error)
            {
                Some(
                    rustix::io::Errno::NOENT
                    | rustix::io::Errno::CONNREFUSED
                    | rustix::io::Errno::NOTDIR,
                ) => match other_than_socket(&path) {
                    Some(what) => ControlError::NotASocket { path, what },
                    None => ControlError::NoBroker { path },
                },
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
            process: Process::current(),
            connection: Mutex::new(Connection::new(socket)),
        })
    }

    /// Returns the socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sends a request, and waits for the answer and its descriptors. If the answer does not come
    /// in time, the next request waits for it first. A claim whose answer is late is released,
    /// because the caller does not know whether it was granted. After an invalid answer, or if no
    /// end is held, the connection takes no more requests.
    pub fn ask(&self, ask: Ask) -> Result<(Answer, Vec<OwnedFd>), ControlError> {
        self.ask_until(ask, None)
    }

    /// Asks as [`Control::ask`] does, until a deadline if there is one.
    fn ask_until(
        &self,
        ask: Ask,
        deadline: Option<Instant>,
    ) -> Result<(Answer, Vec<OwnedFd>), ControlError> {
        // The lock may be one that another thread of the forking process held.
        let inherited = |process| ControlError::Inherited {
            path: self.path.clone(),
            process,
        };
        self.process.check().map_err(inherited)?;
        let request = Packet::new(ask).map_err(|error| self.lost(error))?;
        let releases = request.releases;
        let connection = self.connection.lock();
        let mut connection = connection.unwrap_or_else(PoisonError::into_inner);
        let deadline = deadline.unwrap_or_else(|| Instant::now() + TIMEOUT);
        if connection.out_of_step {
            connection.held.retain(|end| Some(*end) != releases);
            connection.give_up();
            let text = "it did not answer before: attach again";
            return Err(self.lost(io::Error::other(text)));
        }
        let is_first = !connection.answered;
        let mut outcome = self.exchange(&mut connection, &request, deadline);
        if matches!(outcome, Err(ControlError::Rejected { .. })) {
            if is_first {
                // A broker that is replaced closes connections that it has not served. Its
                // successor listens by now.
                let control = Self::connect_until(&self.path, deadline)?;
                connection.socket = control.socket();
                outcome = self.exchange(&mut connection, &request, deadline);
            } else {
                outcome = Err(self.disconnected(releases.is_some()));
            }
        }
        connection.answered = true;
        // The broker refuses a release only of an end that is not held.
        if !matches!(outcome, Err(ControlError::Refused(_))) {
            connection.held.retain(|end| Some(*end) != releases);
        }
        match &outcome {
            Ok((Answer::Claimed, _)) => connection.held.extend(request.claims),
            // After these outcomes, the connection can be used further, or the broker has closed
            // it.
            Ok(_)
            | Err(
                ControlError::Refused(_)
                | ControlError::Rejected { .. }
                | ControlError::Ended { .. }
                | ControlError::Closed { .. },
            ) => (),
            Err(ControlError::NoAnswer { .. }) if !connection.held.is_empty() => (),
            Err(_) => {
                connection.out_of_step = true;
                connection.give_up();
            }
        }
        outcome
    }

    /// Returns the socket of the connection.
    pub(crate) fn socket(&self) -> Arc<PacketSocket> {
        let connection = self.connection.lock();
        let connection = connection.unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&connection.socket)
    }

    fn lost(&self, source: io::Error) -> ControlError {
        let path = self.path.clone();
        match source.kind() {
            io::ErrorKind::WouldBlock => ControlError::NoAnswer { path },
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                ControlError::Rejected { path }
            }
            _ => ControlError::Lost { path, source },
        }
    }

    /// Returns the error for a broker that has answered before, and then closed the connection. A
    /// process that releases an end does not wait to learn whether the broker lives.
    fn disconnected(&self, releases: bool) -> ControlError {
        let path = self.path.clone();
        let lives = || {
            let deadline = Instant::now() + SIGN_OF_LIFE;
            let control = Self::connect_until(&path, deadline)?;
            control.ask_until(Ask::Status, Some(deadline))
        };
        // A broker that refuses this process lives as well.
        let lives = || {
            matches!(
                lives(),
                Ok(_) | Err(ControlError::Refused(_) | ControlError::Rejected { .. })
            )
        };
        match !releases && lives() {
            true => ControlError::Closed { path },
            false => ControlError::Ended { path },
        }
    }

    /// Sends a request and receives its answer, after those that are late.
    fn exchange(
        &self,
        connection: &mut Connection,
        request: &Packet,
        deadline: Instant,
    ) -> Result<(Answer, Vec<OwnedFd>), ControlError> {
        // A process that releases an end does not wait for answers that it does not need.
        let is_late = request.releases.is_some() && connection.late > 0;
        let deadline = if is_late { Instant::now() } else { deadline };
        while connection.late > 0 {
            match self.receive(connection, deadline) {
                Err(ControlError::NoAnswer { .. }) if is_late => break,
                Ok(_) | Err(ControlError::Refused(_)) => connection.late -= 1,
                Err(error) => return Err(error),
            }
        }
        let sent = connection
            .socket
            .send_until(&request.bytes, &[], Some(deadline));
        match sent {
            // A broker that serves no more host apps says so before it is asked, and disconnects.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe && !connection.answered => {
                return self.receive(connection, deadline);
            }
            sent => sent.map_err(|error| self.lost(error))?,
        }
        let received = match connection.late {
            0 => self.receive(connection, deadline),
            _ => Err(ControlError::NoAnswer {
                path: self.path.clone(),
            }),
        };
        if matches!(received, Err(ControlError::NoAnswer { .. })) {
            connection.expect_late(request);
        }
        received
    }

    /// Receives an answer.
    fn receive(
        &self,
        connection: &Connection,
        deadline: Instant,
    ) -> Result<(Answer, Vec<OwnedFd>), ControlError> {
        let mut buffer = Box::new([0; MAX_PACKET]);
        let mut receive = || {
            let received = connection.socket.receive_until(&mut buffer, Some(deadline));
            received.map(|received| received.map(|(bytes, with)| (bytes.to_vec(), with)))
        };
        let received = match receive() {
            // The kernel reports first that the broker closed its end with a request unread, and
            // then gives what the broker sent before.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => receive(),
            received => received,
        };
        let received = received.map_err(|error| self.lost(error))?;
        let (bytes, descriptors) = received.ok_or(ControlError::Rejected {
            path: self.path.clone(),
        })?;
        let answer = Reply::parse(&bytes)
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
