// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Streams and round trips between two processes on the host: the arguments for channels, iceoryx2
//! and Unix sockets.

use std::time::Duration;

use anyhow::Result;
use barlink_bench_load::{Sleeps, Trips, Wait};

use super::case::Way;
use super::scene::{Load, Scene, Side};
use super::stream::{Streamed, endpoints, finish};
use super::trip;
use barlink_vm::broker::Transport;

/// The channel for streams, and its index in the broker's list, after the channels of the slots.
pub const STREAM: &str = "stream";
const STREAM_INDEX: usize = 2 * Transport::ALL.len();
/// The channels for questions and answers, and the bytes of each. Both fit into a processor's own
/// cache, because the ends pass through all bytes of a channel. iceoryx2 reuses the sample that was
/// returned last, at any address.
pub const TRIP: [&str; 2] = ["there", "back"];
pub const TRIP_CAPACITY: u64 = 256 << 10;
/// The channel without a receiver, for several readers.
pub const READERS: &str = "readers";

/// Streams for some time. Records of a channel and of iceoryx2 are built in place, one by one,
/// unless they go in batches.
pub fn stream(scene: &Scene, way: Way, record_size: u64, time: Duration) -> Result<Streamed> {
    let size = format!("--record-size={record_size}");
    let time = format!("--time={}", time.as_millis());
    if way == Way::Iceoryx2 {
        let service = service(scene, &size);
        let receiver = scene.start_iceoryx2(&["receive", &service, &size])?;
        let sender = scene.start_iceoryx2(&["send", &service, &size, &time])?;
        return finish(way, sender, receiver);
    }
    let control = format!("--control={}", scene.control().display());
    let before = scene.rung(STREAM_INDEX)?;
    let receiver = start(scene, &["receive", STREAM, &control])?;
    let how = if way == Way::Batches { "send" } else { "build" };
    let sender = start(scene, &[how, STREAM, &control, &size, &time])?;
    let streamed = finish(way, sender, receiver)?;
    Ok(Streamed {
        rung: Some(scene.rung(STREAM_INDEX)? - before),
        ..streamed
    })
}

/// Returns the option for this way of waiting.
pub fn option(wait: Wait) -> &'static str {
    match wait {
        Wait::Spin => "--wait=spin",
        Wait::Prompt => "--wait=prompt",
        Wait::Sleep => "--wait=sleep",
    }
}

/// Makes round trips for some time. The two lists are further arguments of the asking end and of
/// the answering end.
pub fn trips(
    scene: &Scene,
    way: Way,
    wait: Wait,
    (ask_more, answer_more): (&[&str], &[&str]),
    record_size: u64,
    time: Duration,
) -> Result<(Trips, Sleeps)> {
    let size = format!("--record-size={record_size}");
    let time = format!("--time={}", time.as_millis());
    let wait = option(wait);
    let control = format!("--control={}", scene.control().display());
    let service = service(scene, &format!("{wait}{size}"));
    let [listens, connects] = match way {
        Way::Unix => endpoints(scene, way)?,
        _ => Default::default(),
    };
    let [there, back] = TRIP;
    let (ask, answer) = match way {
        Way::Iceoryx2 => (
            vec!["ask", &service, wait],
            vec!["answer", &service, wait, &size],
        ),
        Way::Unix => (
            vec!["pipe-ask", &connects],
            vec!["pipe-answer", &listens, &size],
        ),
        _ => (
            vec!["ask-in-place", there, back, &control, wait],
            vec!["answer-in-place", back, there, &control, wait],
        ),
    };
    let start = |arguments: &[&str]| match way {
        Way::Iceoryx2 => scene.start_iceoryx2(arguments),
        _ => start(scene, arguments),
    };
    let answers = start(&[&answer, answer_more].concat())?;
    let asks = start(&[&ask[..], &[&size, &time], ask_more].concat())?;
    trip::finish(asks, answers)
}

/// Starts `barlink-bench-load` on the host.
pub fn start(scene: &Scene, arguments: &[&str]) -> Result<Load> {
    let arguments: Vec<_> = arguments.iter().map(|&word| word.to_owned()).collect();
    scene.start(Side::Host, &arguments)
}

/// Returns the name of a service that no other process uses: it contains the name of the broker's
/// folder.
pub fn service(scene: &Scene, what: &str) -> String {
    let folder = scene.control();
    let folder = folder.parent().and_then(|folder| folder.file_name());
    let folder = folder.unwrap_or_default().to_string_lossy();
    format!("{folder}{what}")
}
