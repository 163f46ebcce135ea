// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The connection by which a test gives orders to a machine without a kernel.
//!
//! Orders and answers are lines of text: `readl 0xfee00030`, and `OK 0x50014`. The bare guest gets
//! each order with a number before it and repeats the number before its answer, because a reset of
//! the machine can drop orders and answers. It also reports each boot.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// A line of the bare guest at the end of its boot.
const READY: &str = "READY";
/// The first word of a line by which the bare guest reports an exception, and stops.
const FAULT: &str = "FAULT";

/// A connection.
#[derive(Debug)]
pub(crate) struct Orders {
    stream: BufReader<UnixStream>,
    timeout: Duration,
    guest: Option<Guest>,
}

/// The state of the bare guest, as far as its lines were read.
#[derive(Debug, Default)]
struct Guest {
    /// Number of its boots.
    boots: usize,
    /// Number of the last order.
    order: u64,
}

impl Orders {
    /// Makes a connection to QEMU's qtest. `timeout` limits each wait.
    pub(crate) fn to_qemu(stream: UnixStream, timeout: Duration) -> Result<Self> {
        Self::new(stream, timeout, None)
    }

    /// Makes a connection to the bare guest. `timeout` limits each wait.
    pub(crate) fn to_guest(stream: UnixStream, timeout: Duration) -> Result<Self> {
        Self::new(stream, timeout, Some(Guest::default()))
    }

    fn new(stream: UnixStream, timeout: Duration, guest: Option<Guest>) -> Result<Self> {
        stream.set_read_timeout(Some(timeout))?;
        Ok(Self {
            stream: BufReader::new(stream),
            timeout,
            guest,
        })
    }

    /// Gives an order, and returns the number in its answer, 0 if there is none.
    pub(crate) fn give(&mut self, order: &str) -> Result<u64> {
        self.begin(order)?;
        self.finish().with_context(|| order.to_owned())
    }

    /// Gives orders without a wait in between. Errors of answers are ignored, because QEMU may have
    /// ended.
    pub(crate) fn at_once(&mut self, orders: &[String]) -> Result<()> {
        ensure!(self.guest.is_none(), "only qtest takes several orders");
        let lines: String = orders.iter().map(|order| format!("{order}\n")).collect();
        self.stream.get_mut().write_all(lines.as_bytes())?;
        for _ in orders {
            let _ = self.stream.read_line(&mut String::new());
        }
        Ok(())
    }

    /// Gives an order without waiting for its answer.
    pub(crate) fn begin(&mut self, order: &str) -> Result<()> {
        if self.guest.as_ref().is_some_and(|guest| guest.boots == 0) {
            self.wait_for_ready(1)?;
        }
        let line = match &mut self.guest {
            Some(guest) => {
                guest.order += 1;
                format!("{} {order}\n", guest.order)
            }
            None => format!("{order}\n"),
        };
        Ok(self.stream.get_mut().write_all(line.as_bytes())?)
    }

    /// Waits for the answer to the last order.
    pub(crate) fn finish(&mut self) -> Result<u64> {
        let deadline = Instant::now() + self.timeout;
        loop {
            let line = self.line(deadline)?;
            let answer = match &self.guest {
                Some(guest) => line.strip_prefix(&format!("{} ", guest.order)),
                None => Some(line.as_str()),
            };
            let Some(answer) = answer else {
                // An answer to an order before a reset.
                continue;
            };
            let Some(number) = answer.strip_prefix("OK") else {
                bail!("the order is refused: {line}");
            };
            let number = number.trim();
            return match number.strip_prefix("0x") {
                Some(digits) => Ok(u64::from_str_radix(digits, 16)?),
                None if number.is_empty() => Ok(0),
                None => bail!("the answer makes no sense: {line}"),
            };
        }
    }

    /// Waits until the bare guest has booted so often. Returns `None` for qtest.
    pub(crate) fn wait_for_boot(&mut self, boots: usize) -> Option<Result<()>> {
        self.guest.is_some().then(|| self.wait_for_ready(boots))
    }

    fn wait_for_ready(&mut self, boots: usize) -> Result<()> {
        let deadline = Instant::now() + self.timeout;
        while self.guest.as_ref().is_some_and(|guest| guest.boots < boots) {
            let line = self.line(deadline);
            line.with_context(|| format!("the bare guest does not end its boot {boots}"))?;
        }
        Ok(())
    }

    /// Reads a line without its end.
    fn line(&mut self, deadline: Instant) -> Result<String> {
        let mut line = String::new();
        loop {
            ensure!(Instant::now() < deadline, "no answer but {line:?}");
            match self.stream.read_line(&mut line) {
                Ok(0) => bail!("QEMU has ended"),
                Ok(_) => break,
                Err(error) if error.kind() == ErrorKind::WouldBlock => (),
                Err(error) => return Err(error.into()),
            }
        }
        let line = line.trim_end().to_owned();
        if let Some(guest) = &mut self.guest {
            // A reset can cut the line before these.
            guest.boots += usize::from(line.ends_with(READY));
            ensure!(!line.contains(FAULT), "the bare guest ended: {line}");
        }
        Ok(line)
    }
}
