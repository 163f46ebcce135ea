// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The end of round trips that answers.

use std::ops::Deref;
use std::time::{Duration, Instant};

use anyhow::Result;
use barlink_protocol::cursor::Kind;
use barlink_protocol::{AtomicU64, Events, Receiver, Sender, Wakeup};
use clap::Args;

use crate::pipe::{Endpoint, LAST};
use crate::rest::{Sleeps, Think};
use crate::trip::{IDLE_TIMEOUT, Wait};

/// Answers questions.
#[derive(Args, Debug)]
pub struct Answer {
    #[command(flatten)]
    think: Think,
}

impl Answer {
    /// Answers through a pair of channels until the end of the stream.
    pub fn channels<M, E>(
        &self,
        sender: Sender<M, E>,
        receiver: Receiver<M, E>,
        wait: Wait,
    ) -> Result<Sleeps>
    where
        M: Deref<Target = [AtomicU64]> + Clone,
        E: Events<Error: std::error::Error + Send + Sync + 'static>,
    {
        let mut bytes = Vec::new();
        self.over(sender, receiver, wait, |sender, receiver| {
            if let Some(record) = receiver.record() {
                bytes.resize(record.length(), 0);
                record.copy_to(0, &mut bytes);
            }
            receiver.release()?;
            let _ = sender.send(Kind::USER, &bytes, None)?;
            Ok(())
        })
    }

    /// Calls `answer` for each question until the end of the stream. The receiver is then at the
    /// question.
    pub(crate) fn over<M, E>(
        &self,
        mut sender: Sender<M, E>,
        mut receiver: Receiver<M, E>,
        wait: Wait,
        mut answer: impl FnMut(&mut Sender<M, E>, &mut Receiver<M, E>) -> Result<()>,
    ) -> Result<Sleeps>
    where
        M: Deref<Target = [AtomicU64]> + Clone,
        E: Events<Error: std::error::Error + Send + Sync + 'static>,
    {
        sender.set_strategy(wait.strategy());
        receiver.set_strategy(wait.strategy());
        let mut questions = self.think.questions();
        loop {
            questions.wait(|| {
                while receiver.wait(None)? != Wakeup::Ready || receiver.record().is_none() {}
                Ok(())
            })?;
            let is_end =
                |record: barlink_protocol::Record<'_, M>| record.header().kind == Kind::END;
            if receiver.record().is_some_and(is_end) {
                receiver.release()?;
                return Ok(questions.sleeps());
            }
            answer(&mut sender, &mut receiver)?;
        }
    }

    /// Answers through a pipe, including the last question, which carries a mark.
    pub fn pipe(&self, endpoint: &Endpoint, record_size: usize) -> Result<Sleeps> {
        let mut pipe = endpoint.open()?;
        let mut bytes = vec![0; record_size];
        let mut questions = self.think.questions();
        loop {
            questions.wait(|| Ok(pipe.read_exact(&mut bytes)?))?;
            pipe.write_all(&bytes)?;
            if bytes[..8] == LAST.to_le_bytes() {
                return Ok(questions.sleeps());
            }
        }
    }

    /// Rings each time it is rung, until it has not been rung for a second.
    pub fn doorbells<E>(&self, mut events: E) -> Result<Sleeps>
    where
        E: Events<Error: std::error::Error + Send + Sync + 'static>,
    {
        let mut questions = self.think.questions();
        // The other end may take a while to come.
        let mut timeout = 10 * IDLE_TIMEOUT;
        while questions.wait(|| sleep(&mut events, timeout))? {
            events.ring()?;
            timeout = IDLE_TIMEOUT;
        }
        Ok(questions.sleeps())
    }
}

/// Sleeps until a ring or the timeout. Returns `true` if it was rung.
pub(crate) fn sleep<E>(events: &mut E, timeout: Duration) -> Result<bool>
where
    E: Events<Error: std::error::Error + Send + Sync + 'static>,
{
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        // Other rings end a sleep, too.
        if events.sleep(Some(left))? {
            return Ok(true);
        }
        if left.is_zero() {
            return Ok(false);
        }
    }
}
