// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The error of a broker that cannot listen at a socket, and the way to it from system calls.

use std::io;
use std::path::{Path, PathBuf};

use barlink::control::packet::{FOLDER, kind_of_file};

use super::unreachable::listener_at;

/// Longest path of a Unix socket, in bytes (`unix(7)`).
pub(super) const MAX_PATH: usize = 107;

/// Reason why the broker cannot listen at a socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit into a socket address.
    #[error(
        "socket path {path} has {length} bytes, and a Unix socket takes {MAX_PATH}: choose a shorter one"
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Length of the path in bytes.
        length: usize,
    },
    /// The folder of the socket does not exist.
    #[error("no folder for socket {path}: create {folder}")]
    NoFolder {
        /// The path.
        path: PathBuf,
        /// The folder.
        folder: PathBuf,
    },
    /// The path is relative, and the folder in which this process runs was removed.
    #[error(
        "no folder for socket {path}: the folder in which this program runs was removed; run it in another one, or name the whole path"
    )]
    NoWorkingFolder {
        /// The path.
        path: PathBuf,
    },
    /// The broker may not write to its folder.
    #[error("no permission to make socket {path}: choose a folder that you can write to")]
    Permission {
        /// The path.
        path: PathBuf,
    },
    /// Other processes cannot see its folder.
    #[error(
        "socket {path} would be hidden from VMs by {setting} of this service: choose a path below /run/barlink"
    )]
    Hidden {
        /// The path.
        path: PathBuf,
        /// The setting of the service.
        setting: &'static str,
    },
    /// A parent of its folder is a file of another kind.
    #[error("no folder for socket {path}: {file} is {what}; choose another path")]
    NoParent {
        /// The path.
        path: PathBuf,
        /// The file.
        file: PathBuf,
        /// The kind of file.
        what: &'static str,
    },
    /// A process listens there, and the file of its socket was removed.
    #[error(
        "process {pid} listens at socket {path}, whose file was removed{}: its VMs still use its region, so end them and \
         it before you start another broker there",
        perhaps_replaced(*by)
    )]
    Unreachable {
        /// The path.
        path: PathBuf,
        /// The process.
        pid: i32,
        /// The kind of file that has the path now.
        by: Option<&'static str>,
    },
    /// A broker holds the lock, and the file of its socket was removed. The broker has another user
    /// or another mount namespace, so its process is not known.
    #[error(
        "a broker has locked {lock}, and the file of its socket {path} was removed{}: its VMs still use its region, so \
         end them and it before you start another broker there (`fuser {lock}` shows its process); a service is \
         restarted instead",
        replaced(*by)
    )]
    Locked {
        /// The path.
        path: PathBuf,
        /// The lock.
        lock: PathBuf,
        /// The kind of file that has the path now.
        by: Option<&'static str>,
    },
    /// The service's broker runs, and its socket has no file.
    #[error(
        "the file of socket {path} of the running service was removed{}: {}restart the service (`systemctl restart`), \
         which makes it again and keeps the region",
        replaced(*by),
        if by.is_some() { "remove that one, and " } else { "" }
    )]
    Removed {
        /// The path.
        path: PathBuf,
        /// The kind of file that has the path now.
        by: Option<&'static str>,
    },
    /// A file that is not a socket has that name.
    #[error(
        "{path} is {what}, which is not a socket: choose {}",
        if *what == FOLDER { "a path in it" } else { "another path, or remove it" }
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
        /// The kind of file.
        what: &'static str,
    },
    /// A broker with the same control socket listens there.
    #[error(
        "socket {path} is in use by another broker: take its place with --replace, or give this one a --name and sockets \
         of its own"
    )]
    Served {
        /// The path.
        path: PathBuf,
    },
    /// A broker with another control socket listens there.
    #[error(
        "socket {path} is in use by the broker at {control}: choose another path, or take that broker's place with \
         --replace --control {control} (and no --name) and its other arguments"
    )]
    ServedByAnother {
        /// The path.
        path: PathBuf,
        /// The control socket of that broker.
        control: PathBuf,
    },
    /// The lock belongs to a broker of another user, which may have ended.
    #[error(
        "{lock} belongs to another user's broker: choose another path, or have that user stop it and remove the file"
    )]
    OfAnotherUser {
        /// The lock.
        lock: PathBuf,
    },
    /// The lock's name is taken by a file that no broker of this user made.
    #[error(
        "{lock} is {what}, not the lock file of a broker: choose a socket in a folder that only you can write to, or remove it"
    )]
    NotALock {
        /// The lock.
        lock: PathBuf,
        /// The kind of file.
        what: &'static str,
    },
    /// Another program listens there.
    #[error(
        "socket {path} is in use by {}: stop it, or choose another path",
        pid.map_or("a process that listens there".to_owned(), |pid| format!("process {pid}, which listens there"))
    )]
    InUse {
        /// The path.
        path: PathBuf,
        /// The process, if it is known.
        pid: Option<i32>,
    },
    /// Two sockets have one path.
    #[error(
        "socket {path} is named twice: each VM, and the control socket, needs a path of its own"
    )]
    Twice {
        /// The path.
        path: PathBuf,
    },
    /// The predecessor's socket has another path.
    #[error("the running broker's socket is {theirs} and not {path}: give it the same sockets")]
    Elsewhere {
        /// The path.
        path: PathBuf,
        /// The path of the predecessor's socket.
        theirs: PathBuf,
    },
    /// A system call failed.
    #[error("cannot listen at socket {path}")]
    Other {
        /// The path.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
}

/// Says which file has the name of a socket whose own file was removed.
fn replaced(by: Option<&str>) -> String {
    by.map_or(String::new(), |what| {
        format!(" and {what} has its name now")
    })
}

/// Says as [`replaced`] does which file has the name, and otherwise what may have removed the file.
fn perhaps_replaced(by: Option<&str>) -> String {
    match by {
        None => ", perhaps with a run folder at logout".to_owned(),
        by => replaced(by),
    }
}

/// Names the process that listens at a path, and is no broker or a broker without its lock.
pub(super) fn in_use(path: PathBuf) -> SocketError {
    let pid = listener_at(&path);
    SocketError::InUse { path, pid }
}

pub(super) fn failed(path: &Path, source: io::Error) -> SocketError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound if path.is_relative() && std::env::current_dir().is_err() => {
            SocketError::NoWorkingFolder { path }
        }
        io::ErrorKind::NotFound => match path.parent().unwrap_or(Path::new("/")) {
            folder if folder.exists() => SocketError::Other { path, source },
            folder => {
                let folder = folder.to_owned();
                SocketError::NoFolder { path, folder }
            }
        },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            SocketError::Permission { path }
        }
        io::ErrorKind::NotADirectory => {
            let parents = path.ancestors().skip(1);
            let files = parents.filter_map(|file| Some((file, file.metadata().ok()?)));
            let found = files.map(|(file, found)| (file.to_owned(), found.file_type()));
            match found.into_iter().next() {
                Some((file, kind)) if !kind.is_dir() => {
                    let what = kind_of_file(kind);
                    SocketError::NoParent { path, file, what }
                }
                _ => SocketError::Other { path, source },
            }
        }
        io::ErrorKind::AddrInUse => in_use(path),
        _ => SocketError::Other { path, source },
    }
}
