// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The watch over a device's broker, for programs.

use std::path::PathBuf;

use rustix::io::Errno;

use crate::error::Error;
use crate::guest::broker::Asker;
use crate::guest::direct::stalled;
use crate::guest::error::DeviceError;

/// A watch over the broker of a device. [`Device::watch_broker`] returns it.
///
/// ```no_run
/// use barlink::guest::{self, BrokerWatch};
///
/// let device = guest::open("/dev/barlink0")?;
/// let watch: BrokerWatch = device.watch_broker()?;
/// std::thread::spawn(move || {
///     if watch.wait_until_unanswered().is_ok() {
///         eprintln!("the broker does not answer");
///     }
/// });
/// # Ok::<(), barlink::Error>(())
/// ```
///
/// [`Device::watch_broker`]: crate::guest::Device::watch_broker
#[derive(Debug)]
pub struct BrokerWatch {
    asker: Asker,
    path: PathBuf,
}

impl BrokerWatch {
    pub(crate) fn new(asker: Asker, path: PathBuf) -> Self {
        BrokerWatch { asker, path }
    }

    /// Asks whether the broker is alive, and returns whether it answers within ten seconds. A
    /// broker that was killed does not, nor does one that was started anew with another region, or
    /// one that is stopped. Streams can go on without a broker, so this is no error.
    ///
    /// ```no_run
    /// let device = barlink::guest::open("/dev/barlink0")?;
    /// if !device.watch_broker()?.is_answered()? {
    ///     eprintln!("the broker does not answer");
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The device is gone or has lost its region, its driver is too old for the question, or, for a
    /// device without its driver, another process has locked the device for five seconds
    /// ([`ErrorKind::InUse`](crate::ErrorKind::InUse)).
    pub fn is_answered(&self) -> Result<bool, Error> {
        let path = || self.path.clone();
        let answered = self.asker.wait_for_answer();
        let answered = answered.map_err(|error| match error {
            Errno::BUSY => stalled(path()).into(),
            error => DeviceError::System {
                what: "ask for the broker of",
                path: path(),
                source: error.into(),
            },
        })?;
        if !answered && self.asker.has_lost_region() {
            return Err(DeviceError::Lost { path: path() }.into());
        }
        Ok(answered)
    }

    /// Returns whether the broker has ended in good order, and was no service. Needs no time, and
    /// tells nothing about a broker that was killed: [`BrokerWatch::is_answered`] does.
    ///
    /// ```no_run
    /// let device = barlink::guest::open("/dev/barlink0")?;
    /// if device.watch_broker()?.has_ended() {
    ///     eprintln!("only host apps that are still attached receive");
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn has_ended(&self) -> bool {
        self.asker.has_ended()
    }

    /// Returns once the broker has not answered a question for ten seconds: a question that this
    /// call asks at once, or one that an end of this device asked because it slept for longer than
    /// a second. Waits without a limit and without looking. Once the first question is answered,
    /// this no longer keeps the device open.
    ///
    /// ```no_run
    /// let device = barlink::guest::open("/dev/barlink0")?;
    /// let watch = device.watch_broker()?;
    /// let mut receiver = device.receiver("down")?;
    /// std::thread::spawn(move || watch.wait_until_unanswered().map(|()| std::process::exit(1)));
    /// println!("{:?}", receiver.recv()?.to_vec());
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`BrokerWatch::is_answered`].
    pub fn wait_until_unanswered(self) -> Result<(), Error> {
        if self.is_answered()? {
            self.asker.wait_until_unanswered();
        }
        Ok(())
    }
}
