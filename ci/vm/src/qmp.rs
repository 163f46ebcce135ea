// SPDX-License-Identifier: Apache-2.0 OR MIT

//! QEMU's control protocol QMP: JSON lines, with commands and answers in turn and events in
//! between.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// A connection to QEMU whose handshake is done.
#[derive(Debug)]
pub(crate) struct Qmp {
    connection: Mutex<Connection>,
    timeout: Duration,
}

#[derive(Debug)]
struct Connection {
    reader: BufReader<UnixStream>,
    /// Events that have arrived and were not yet taken by a wait.
    events: VecDeque<Value>,
}

impl Qmp {
    /// Does the handshake with QEMU at the other end of `stream`. `timeout` limits each later wait.
    pub(crate) fn new(stream: UnixStream, timeout: Duration) -> Result<Self> {
        stream.set_read_timeout(Some(timeout))?;
        let mut connection = Connection {
            reader: BufReader::new(stream),
            events: VecDeque::new(),
        };
        connection.receive().context("QEMU sends no greeting")?;
        let qmp = Self {
            connection: Mutex::new(connection),
            timeout,
        };
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Executes a command and returns its result.
    pub(crate) fn execute(&self, command: &str, arguments: &Value) -> Result<Value> {
        let mut connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut line = serde_json::to_vec(&json!({ "execute": command, "arguments": arguments }))?;
        line.push(b'\n');
        connection.reader.get_mut().write_all(&line)?;
        loop {
            let mut answer = connection
                .receive()
                .with_context(|| format!("QEMU does not answer {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!(
                    "QEMU refuses {command}: {}",
                    error["desc"].as_str().unwrap_or("no reason given")
                );
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
            connection.events.push_back(answer);
        }
    }

    /// Waits for an event of this name whose data `matches`. The event may have arrived since the
    /// last wait. Earlier events are dropped.
    pub(crate) fn wait_event(&self, name: &str, matches: impl Fn(&Value) -> bool) -> Result<()> {
        let mut connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now() + self.timeout;
        while Instant::now() < deadline {
            let event = match connection.events.pop_front() {
                Some(event) => event,
                None => connection
                    .receive()
                    .with_context(|| format!("no event {name} came"))?,
            };
            if event["event"] == name && matches(&event["data"]) {
                return Ok(());
            }
        }
        bail!("no event {name} came within {:?}", self.timeout)
    }
}

impl Connection {
    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        let length = self.reader.read_line(&mut line)?;
        ensure!(length > 0, "QEMU has ended");
        Ok(serde_json::from_str(&line)?)
    }
}
