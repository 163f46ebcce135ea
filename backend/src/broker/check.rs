// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks a configuration without serving it, so that a mistake is found while the broker with the
//! earlier configuration still serves.

use barlink::host::AttachOptions;
use barlink::{Access, Error};

use super::accept::{Listener, SocketError, is_control_process};
use super::config::Config;
use super::error::BrokerError;
use super::plan::{fits, plan};
use super::takeover;

/// The state in which a check found the control socket.
#[derive(Debug, PartialEq, Eq)]
pub enum Checked {
    /// A broker serves there that has the same region and sockets, so that its successor can take
    /// over its region. The value is its process ID.
    Fits(u32),
    /// No broker serves there.
    NotServed,
}

/// Checks whether a broker could serve with a configuration, or take over from the broker that
/// serves at the same control socket. Changes nothing. With `makes_run_folder` the program creates
/// the folder of the control socket before it serves.
///
/// # Errors
///
/// The same as those of [`Broker::new`](super::Broker::new), as far as they can be found without
/// making anything, and the error of a broker that does not answer or rejects this process.
pub fn check(config: &Config, makes_run_folder: bool) -> Result<Checked, CheckError> {
    let count = u32::try_from(config.slots.len()).unwrap_or(u32::MAX);
    let (vectors, channels) = (config.vectors, &config.channels);
    let layout = plan(config.size, count, vectors, channels, config.reserve);
    let layout = layout.map_err(BrokerError::from)?;
    let slots = || config.slots.iter().map(|(_, path)| path.as_path());
    takeover::check_paths(&config.control, slots()).map_err(BrokerError::from)?;
    let run_folder = config.control.parent().filter(|_| makes_run_folder);
    for path in slots().chain([config.control.as_path()]) {
        match Listener::check(path, run_folder) {
            // The service runs, and its successor can listen there.
            Err(
                SocketError::Unreachable { path, by, .. } | SocketError::Locked { path, by, .. },
            ) if is_control_process() => {
                return Err(BrokerError::from(SocketError::Removed { path, by }).into());
            }
            checked => checked.map_err(BrokerError::from)?,
        }
    }
    let running = match AttachOptions::new()
        .access(Access::ReadOnly)
        .connect_path(&config.control)
    {
        Err(Error::Control(barlink::host::ControlError::NoBroker { .. })) => {
            if is_control_process() {
                // The service runs, and only its successor can listen there.
                Listener::check_file(&config.control).map_err(BrokerError::from)?;
            }
            return Ok(Checked::NotServed);
        }
        running => running.map_err(Box::new)?,
    };
    if !fits(&layout, running.layout()) {
        return Err(BrokerError::OtherRegion.into());
    }
    if is_control_process() {
        for path in slots() {
            Listener::check_file(path).map_err(BrokerError::from)?;
        }
    }
    let status = running.status().map_err(Box::new)?;
    for ((id, theirs), (transport, path)) in (0..).zip(&status.slots).zip(&config.slots) {
        if theirs.transport != transport.name() {
            return Err(BrokerError::OtherTransport(id).into());
        }
        let path = takeover::absolute(path);
        if theirs.socket != path {
            let theirs = theirs.socket.clone();
            return Err(BrokerError::from(SocketError::Elsewhere { path, theirs }).into());
        }
    }
    Ok(Checked::Fits(status.broker))
}

/// Reason why a configuration is not valid.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// A broker could not serve with it.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// A request to the running broker failed.
    #[error(transparent)]
    Running(#[from] Box<Error>),
}
