// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Between two processes on the host: what they are told, for channels, iceoryx2 and Unix sockets.

use std::time::Duration;

use anyhow::{Context, Result};
use barlink_bench_load::{Trips, Wait};

use super::case::Way;
use super::scene::{Load, Scene, Side};
use super::stream::{Streamed, endpoints, finish};
use super::trip::PAUSE;
use crate::broker::Transport;

/// The channels there and back, and where they stand in the broker's list: behind those of the slots.
pub const CHANNELS: [&str; 2] = ["there", "back"];
const FIRST_CHANNEL: usize = 2 * Transport::ALL.len();

/// Streams for some time. Records of a channel and of iceoryx2 are built in place, one by one.
pub fn stream(scene: &Scene, way: Way, record_size: u64, time: Duration) -> Result<Streamed> {
    let size = format!("--record-size={record_size}");
    let time = format!("--time={}", time.as_millis());
    if way == Way::Iceoryx2 {
        let service = service(scene, &size);
        let receiver = scene.start_iceoryx2(&["receive", &service, &size])?;
        let sender = scene.start_iceoryx2(&["send", &service, &size, &time])?;
        return finish(sender, receiver);
    }
    let control = format!("--control={}", scene.control().display());
    let before = scene.rung(FIRST_CHANNEL)?;
    let receiver = start(scene, &["receive", CHANNELS[0], &control])?;
    let sender = start(scene, &["build", CHANNELS[0], &control, &size, &time])?;
    let streamed = finish(sender, receiver)?;
    Ok(Streamed {
        rung: Some(scene.rung(FIRST_CHANNEL)? - before),
        ..streamed
    })
}

/// Makes round trips for some time.
pub fn trips(
    scene: &Scene,
    way: Way,
    wait: Wait,
    record_size: u64,
    time: Duration,
) -> Result<Trips> {
    let size = format!("--record-size={record_size}");
    let time = format!("--time={}", time.as_millis());
    let (wait, pause) = match wait {
        Wait::Spin => ("--wait=spin", "--pause=0"),
        Wait::Prompt => ("--wait=prompt", "--pause=0"),
        Wait::Sleep => ("--wait=sleep", PAUSE),
    };
    let (answers, asks) = match way {
        Way::Iceoryx2 => {
            let service = service(scene, &format!("{wait}{size}"));
            (
                scene.start_iceoryx2(&["answer", &service, wait, &size])?,
                scene.start_iceoryx2(&["ask", &service, wait, &size, pause, &time])?,
            )
        }
        Way::Unix => {
            let [listens, connects] = endpoints(scene, way)?;
            (
                start(scene, &["pipe-answer", &listens, &size])?,
                start(scene, &["pipe-ask", &connects, &size, pause, &time])?,
            )
        }
        _ => {
            let control = format!("--control={}", scene.control().display());
            let [there, back] = CHANNELS;
            let answer = ["answer-in-place", back, there, &control, wait];
            let ask = ["ask-in-place", there, back, &control, wait, &size];
            (
                start(scene, &answer)?,
                start(scene, &[&ask[..], &[pause, &time]].concat())?,
            )
        }
    };
    let trips = asks.wait().context("the end that asks failed")?;
    answers
        .wait_silently()
        .context("the end that answers failed")?;
    Ok(trips)
}

/// Starts `barlink-bench-load` on the host.
pub fn start(scene: &Scene, arguments: &[&str]) -> Result<Load> {
    let arguments: Vec<_> = arguments.iter().map(|&word| word.to_owned()).collect();
    scene.start(Side::Host, &arguments)
}

/// A service that nobody else has.
fn service(scene: &Scene, what: &str) -> String {
    let folder = scene.control();
    let folder = folder.parent().and_then(|folder| folder.file_name());
    let folder = folder.unwrap_or_default().to_string_lossy();
    format!("{folder}{what}")
}
