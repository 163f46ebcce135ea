// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink-iceoryx2-load`: the measurements of iceoryx2 in `cargo xtask bench`.
//! iceoryx2 is a peer of barlink between two processes of the host. It is not part of
//! `barlink-bench-load`, because that also runs in the guest, where iceoryx2 has no other end.
//!
//! A record is a sample: the sender borrows it, builds it in place and sends it; the receiver reads
//! every byte in place. A sender waits for a full queue, so no sample is lost. The newest value of
//! a sender is that of a blackboard.

mod blackboard;
mod port;

use std::time::Duration;

use anyhow::{Context, Result};
use barlink_bench_load::{
    Ask, Flow, LAST, Measured, Pace, STRIDE, Sleeps, Tapped, Think, Trips, Wait, word,
};
use clap::{Args, Parser, Subcommand};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::Serialize;

use self::port::{Readers, ReceivePort, SendPort, node};

/// Time until one of several readers that has found nothing looks again, as a tap does at first.
const LOOK: Duration = Duration::from_micros(50);

/// Runs one end of a measurement of iceoryx2 for `cargo xtask bench`
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    work: Work,
}

#[derive(Subcommand)]
enum Work {
    /// Send records of one size
    Send {
        #[command(flatten)]
        shape: Shape,
        /// Length of the timed part of the stream, in milliseconds
        #[arg(long)]
        time: u64,
    },
    /// Receive, and read every byte in place
    Receive {
        #[command(flatten)]
        shape: Shape,
    },
    /// Send records of one size to several readers, without waiting for them
    Publish {
        #[command(flatten)]
        shape: Shape,
        /// Number of readers
        #[arg(long)]
        readers: usize,
        /// Number of readers that are stopped, and do not leave
        #[arg(long)]
        stopped: usize,
        /// Length of the timed part of the stream, in milliseconds
        #[arg(long)]
        time: u64,
        /// Records a second, instead of as many as possible
        #[arg(long)]
        pace: Option<u32>,
    },
    /// Be one of several readers, and read every byte in place
    Subscribe {
        #[command(flatten)]
        shape: Shape,
        /// Number of readers
        #[arg(long)]
        readers: usize,
    },
    /// Write values of one size to a blackboard until the input ends
    Renew {
        #[command(flatten)]
        shape: Shape,
    },
    /// Read the newest value of a blackboard
    Newest {
        #[command(flatten)]
        shape: Shape,
        /// Length of the timed part, in milliseconds
        #[arg(long)]
        time: u64,
    },
    /// Ask, and wait for answers
    Ask {
        /// The name of the service, the same for both ends
        service: String,
        /// How to wait
        #[arg(long, value_enum)]
        wait: Wait,
        #[command(flatten)]
        ask: Ask,
    },
    /// Answer until the last question
    Answer {
        #[command(flatten)]
        shape: Shape,
        /// How to wait
        #[arg(long, value_enum)]
        wait: Wait,
        #[command(flatten)]
        think: Think,
    },
}

/// The options of both ends.
#[derive(Args)]
struct Shape {
    /// The name of the service, the same for both ends
    service: String,
    /// Bytes of a record, a multiple of 8
    #[arg(long)]
    record_size: usize,
}

fn main() -> Result<()> {
    // The kernel kills this process when the bench ends.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    match Cli::parse().work {
        Work::Send { shape, time } => tell(&send(&shape, time)?),
        Work::Receive { shape } => tell(&receive(&shape)?),
        Work::Publish {
            shape,
            readers,
            stopped,
            time,
            pace,
        } => tell(&publish(&shape, readers, stopped, time, pace)?),
        Work::Subscribe { shape, readers } => tell(&subscribe(&shape, readers)?),
        Work::Renew { shape } => tell(&blackboard::renew(
            &node()?,
            &shape.service,
            shape.record_size,
        )?),
        Work::Newest { shape, time } => {
            let (service, size) = (&shape.service, shape.record_size);
            tell(&blackboard::newest(&node()?, service, size, time)?)
        }
        Work::Ask { service, wait, ask } => tell(&self::ask(&service, wait, &ask)?),
        Work::Answer { shape, wait, think } => tell(&answer(&shape, wait, think)?),
    }
}

/// Prints the measurements as a line of JSON.
fn tell(measured: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(measured)?);
    Ok(())
}

/// Sends the same record by `send` again and again until the time is over.
fn flow(
    size: usize,
    time: u64,
    pace: Option<u32>,
    mut send: impl FnMut() -> Result<()>,
) -> Result<Flow> {
    let sum = (0..size / 8).fold(0, |sum: u64, place| sum.wrapping_add(word(place)));
    let batch = match pace {
        Some(_) => 1,
        None => STRIDE.div_ceil(size as u64),
    };
    let mut pace = pace.map(Pace::new);
    let mut flow = Flow::begin();
    while flow.lasts(time) {
        for _ in 0..batch {
            send()?;
            flow.add(1, size as u64, sum);
        }
        if let Some(pace) = &mut pace {
            pace.wait();
        }
    }
    Ok(flow)
}

/// Sends the same record again and again, and last a record that carries a mark.
fn send(shape: &Shape, time: u64) -> Result<Measured> {
    let node = node()?;
    let mut send_port = SendPort::open(
        &node,
        &shape.service,
        shape.record_size,
        Readers::One,
        Wait::Spin,
    )?;
    let mut flow = flow(shape.record_size, time, None, || send_port.send(word))?;
    send_port.send(|_| LAST)?;
    let words = shape.record_size as u64 / 8;
    flow.add(1, shape.record_size as u64, LAST.wrapping_mul(words));
    let measured = flow.end();
    send_port.wait_until_left(0)?;
    Ok(measured)
}

/// Receives until the marked record, and adds up all words. Timing starts with the first record.
fn receive(shape: &Shape) -> Result<Measured> {
    let node = node()?;
    let mut receive_port = ReceivePort::open(
        &node,
        &shape.service,
        shape.record_size,
        Readers::One,
        Wait::Spin,
    )?;
    let mut flow = None;
    loop {
        let sample = receive_port.receive()?;
        let words = sample.payload();
        let flow = flow.get_or_insert_with(Flow::begin);
        let sum = words.iter().copied().fold(0, u64::wrapping_add);
        flow.add(1, size_of_val(words) as u64, sum);
        if words.first() == Some(&LAST) {
            return Ok(flow.end());
        }
    }
}

/// Sends records as [`send`] does, but never waits. The second word of the last record is the
/// number of the records before it, so that readers can count what they missed.
fn publish(
    shape: &Shape,
    readers: usize,
    stopped: usize,
    time: u64,
    pace: Option<u32>,
) -> Result<Measured> {
    let node = node()?;
    let (service, size) = (&shape.service, shape.record_size);
    let many = Readers::Many(readers);
    let mut send_port = SendPort::open(&node, service, size, many, Wait::Spin)?;
    let measured = flow(size, time, pace, || send_port.publish(word))?.end();
    let count = measured.records;
    send_port.publish(|place| if place == 0 { LAST } else { count })?;
    send_port.wait_until_left(stopped)?;
    Ok(measured)
}

/// Prints this process's ID once the reader is there, receives until the marked record, which has
/// the number of all records, and adds up all words. Timing starts with the first record.
fn subscribe(shape: &Shape, readers: usize) -> Result<Tapped> {
    let node = node()?;
    let (service, size) = (&shape.service, shape.record_size);
    let many = Readers::Many(readers);
    let mut receive_port = ReceivePort::open(&node, service, size, many, Wait::Spin)?;
    println!("{}", std::process::id());
    let mut flow = None;
    loop {
        let Some(sample) = receive_port.look()? else {
            std::thread::sleep(LOOK);
            continue;
        };
        let words = sample.payload();
        if words.first() == Some(&LAST) {
            let measured = flow.unwrap_or_else(Flow::begin).end();
            let count = words.get(1).copied().unwrap_or_default();
            let missed = count.saturating_sub(measured.records);
            return Ok(Tapped { measured, missed });
        }
        let flow = flow.get_or_insert_with(Flow::begin);
        let sum = words.iter().copied().fold(0, u64::wrapping_add);
        flow.add(1, size_of_val(words) as u64, sum);
    }
}

/// Returns the names of the services for questions and for answers.
fn there_and_back(service: &str) -> [String; 2] {
    ["question", "answer"].map(|part| format!("{service}/{part}"))
}

/// Makes round trips for the time that `ask` names.
fn ask(service: &str, wait: Wait, ask: &Ask) -> Result<Trips> {
    let node = node()?;
    let [there, back] = there_and_back(service);
    let size = ask.record_size();
    let mut receive_port = ReceivePort::open(&node, &back, size, Readers::One, wait)?;
    let mut send_port = SendPort::open(&node, &there, size, Readers::One, wait)?;
    let others = (1..size / 8).fold(0, |sum: u64, place| sum.wrapping_add(word(place)));
    let trips = ask.trips(|bytes| {
        let (number, _) = bytes
            .split_first_chunk_mut()
            .context("a record has at least a word")?;
        let asked = u64::from_le_bytes(*number);
        send_port.send(|place| if place == 0 { asked } else { word(place) })?;
        let answer = receive_port.receive()?;
        let sum = answer.payload().iter().copied().fold(0, u64::wrapping_add);
        // The remainder is the number, if every other word is unchanged.
        *number = sum.wrapping_sub(others).to_le_bytes();
        Ok(())
    })?;
    send_port.send(|_| LAST)?;
    receive_port.receive()?;
    Ok(trips)
}

/// Answers all questions, including the last, which carries a mark.
fn answer(shape: &Shape, wait: Wait, think: Think) -> Result<Sleeps> {
    let node = node()?;
    let [there, back] = there_and_back(&shape.service);
    let mut receive_port = ReceivePort::open(&node, &there, shape.record_size, Readers::One, wait)?;
    let mut send_port = SendPort::open(&node, &back, shape.record_size, Readers::One, wait)?;
    let mut questions = think.questions();
    loop {
        let question = questions.wait(|| receive_port.receive())?;
        let words = question.payload();
        send_port.send(|place| words.get(place).copied().unwrap_or_default())?;
        if words.first() == Some(&LAST) {
            send_port.wait_until_left(0)?;
            return Ok(questions.sleeps());
        }
    }
}
