// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink-iceoryx2-load`: what `cargo xtask bench` measures of iceoryx2, a peer of barlink's between two processes
//! of the host. It is apart from `barlink-bench-load`, since that also runs in the guest, where iceoryx2 has nobody to talk to.
//!
//! A record is a sample: loaned, built in place, sent; and read in place, every byte. A sender waits for a queue that is full, so
//! no sample is lost.

mod port;

use anyhow::{Context, Result};
use barlink_bench_load::{Ask, Flow, LAST, Measured, STRIDE, Sleeps, Think, Trips, Wait, word};
use clap::{Args, Parser, Subcommand};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::Serialize;

use self::port::{Inlet, Outlet, node};

/// What `cargo xtask bench` measures of iceoryx2
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
        /// For how long it is timed, once it flows, in milliseconds
        #[arg(long)]
        time: u64,
    },
    /// Receive, and read every byte in place
    Receive {
        #[command(flatten)]
        shape: Shape,
    },
    /// Ask, and wait for answers
    Ask {
        /// What both ends call their services
        service: String,
        /// How to wait
        #[arg(long, value_enum)]
        wait: Wait,
        #[command(flatten)]
        ask: Ask,
    },
    /// Answer
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

/// What both ends are told.
#[derive(Args)]
struct Shape {
    /// What both ends call their services
    service: String,
    /// Bytes of a record, a multiple of 8
    #[arg(long)]
    record_size: usize,
}

fn main() -> Result<()> {
    // Not to outlive the bench.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    match Cli::parse().work {
        Work::Send { shape, time } => tell(&send(&shape, time)?),
        Work::Receive { shape } => tell(&receive(&shape)?),
        Work::Ask { service, wait, ask } => tell(&self::ask(&service, wait, &ask)?),
        Work::Answer { shape, wait, think } => tell(&answer(&shape, wait, think)?),
    }
}

/// Prints what was measured.
fn tell(measured: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(measured)?);
    Ok(())
}

/// Builds the same record again and again, and last one that bears a mark.
fn send(shape: &Shape, time: u64) -> Result<Measured> {
    let node = node()?;
    let mut outlet = Outlet::open(&node, &shape.service, shape.record_size, Wait::Spin)?;
    let sum = (0..shape.record_size / 8).fold(0, |sum: u64, place| sum.wrapping_add(word(place)));
    let mut flow = Flow::begin();
    while flow.lasts(time) {
        for _ in 0..STRIDE.div_ceil(shape.record_size as u64) {
            outlet.send(word)?;
            flow.add(1, shape.record_size as u64, sum);
        }
    }
    outlet.send(|_| LAST)?;
    let words = shape.record_size as u64 / 8;
    flow.add(1, shape.record_size as u64, LAST.wrapping_mul(words));
    let measured = flow.end();
    outlet.wait_until_left()?;
    Ok(measured)
}

/// Adds up all words, from the first record on.
fn receive(shape: &Shape) -> Result<Measured> {
    let node = node()?;
    let mut inlet = Inlet::open(&node, &shape.service, shape.record_size, Wait::Spin)?;
    let mut flow = None;
    loop {
        let sample = inlet.receive()?;
        let words = sample.payload();
        let flow = flow.get_or_insert_with(Flow::begin);
        let sum = words.iter().copied().fold(0, u64::wrapping_add);
        flow.add(1, size_of_val(words) as u64, sum);
        if words.first() == Some(&LAST) {
            return Ok(flow.end());
        }
    }
}

/// The services of a question and of its answer.
fn there_and_back(service: &str) -> [String; 2] {
    ["question", "answer"].map(|part| format!("{service}/{part}"))
}

/// Asks for some time.
fn ask(service: &str, wait: Wait, ask: &Ask) -> Result<Trips> {
    let node = node()?;
    let [there, back] = there_and_back(service);
    let size = ask.record_size();
    let mut inlet = Inlet::open(&node, &back, size, wait)?;
    let mut outlet = Outlet::open(&node, &there, size, wait)?;
    let others = (1..size / 8).fold(0, |sum: u64, place| sum.wrapping_add(word(place)));
    let trips = ask.trips(|bytes| {
        let (number, _) = bytes
            .split_first_chunk_mut()
            .context("a record has at least a word")?;
        let asked = u64::from_le_bytes(*number);
        outlet.send(|place| if place == 0 { asked } else { word(place) })?;
        let answer = inlet.receive()?;
        let sum = answer.payload().iter().copied().fold(0, u64::wrapping_add);
        // What is left is the number, if every other word is as it was.
        *number = sum.wrapping_sub(others).to_le_bytes();
        Ok(())
    })?;
    outlet.send(|_| LAST)?;
    inlet.receive()?;
    Ok(trips)
}

/// Answers until the last question, that included.
fn answer(shape: &Shape, wait: Wait, think: Think) -> Result<Sleeps> {
    let node = node()?;
    let [there, back] = there_and_back(&shape.service);
    let mut inlet = Inlet::open(&node, &there, shape.record_size, wait)?;
    let mut outlet = Outlet::open(&node, &back, shape.record_size, wait)?;
    let mut questions = think.questions();
    loop {
        let question = questions.wait(|| inlet.receive())?;
        let words = question.payload();
        outlet.send(|place| words.get(place).copied().unwrap_or_default())?;
        if words.first() == Some(&LAST) {
            outlet.wait_until_left()?;
            return Ok(questions.sleeps());
        }
    }
}
