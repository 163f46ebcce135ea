// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Questions and answers over a pair of channels.
//!
//! ```text
//! barlink serve --ivshmem /tmp/vm.sock --channel ask=host-host,64K --channel answer=host-host,64K &
//! cargo run --example echo -- answer ask answer &
//! cargo run --example echo -- ask ask answer hello world
//! ```

use barlink::{ErrorKind, Kind, host};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args[..] {
        [role, ask, answer] if role == "answer" => answers(ask, answer),
        [role, ask, answer, words @ ..] if role == "ask" => asks(ask, answer, words),
        _ => anyhow::bail!("usage: echo answer ASK ANSWER | echo ask ASK ANSWER WORD..."),
    }
}

/// Sends every record back, until one is empty.
fn answers(ask: &str, answer: &str) -> anyhow::Result<()> {
    let broker = host::connect("default")?;
    let (mut receiver, mut sender) = (broker.receiver(ask)?, broker.sender(answer)?);
    loop {
        let question = receiver.recv()?;
        // Numbers that no question has are missing among the answers as well.
        sender.skip(question.missed())?;
        sender.send(question.kind(), &question.to_vec())?;
        if question.is_empty() {
            return Ok(());
        }
    }
}

/// Asks each word, and prints the answers.
fn asks(ask: &str, answer: &str, words: &[String]) -> anyhow::Result<()> {
    let broker = host::connect("default")?;
    let (mut sender, mut receiver) = (broker.sender(ask)?, broker.receiver(answer)?);
    for word in words {
        match sender.try_send(Kind::USER, word.as_bytes()) {
            Ok(_) => println!("{}", String::from_utf8_lossy(&receiver.recv()?.to_vec())),
            Err(error) if error.kind() == ErrorKind::TooLarge => println!("{error}"),
            Err(error) => return Err(error.into()),
        }
    }
    sender.send(Kind::USER, &[])?;
    receiver.recv()?.release()?;
    Ok(())
}
