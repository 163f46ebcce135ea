// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One stream of records, whichever way it goes.

use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlink_bench_load::Measured;

use super::case::{Case, Direction, Way};
use super::scene::{PORT, Scene, Side};
use crate::broker::Transport;

/// The host, as the guest sees it through QEMU's user network.
const GATEWAY: &str = "10.0.2.2";

/// What came of a stream.
#[derive(Clone, Copy, Debug)]
pub struct Streamed {
    /// What the sender did.
    pub sent: Measured,
    /// What the receiver did.
    pub received: Measured,
    /// How often the producer rang, where that is counted.
    pub rung: Option<u64>,
}

/// A process, and what it is told.
type Order = (Side, Vec<String>);

/// Streams for some time, and checks that every byte came.
pub fn stream(scene: &Scene, case: &Case, time: Duration) -> Result<Streamed> {
    let size = format!("--record-size={}", case.record_size);
    let time = format!("--time={}", time.as_millis());
    let sides = case.direction.sides();
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    match case.way {
        Way::Channel(transport) => {
            let slot = transport.index();
            let up = case.direction == Direction::Up;
            let (channel, index) = match up {
                true => (format!("up{slot}"), 2 * slot),
                false => (format!("down{slot}"), 2 * slot + 1),
            };
            let control = format!("--control={}", scene.control().display());
            let device = format!("--device=/dev/barlink{slot}");
            let [from, to] = sides.map(|side| match side {
                Side::Host => &control,
                Side::Guest => &device,
            });
            let before = scene.rung(index)?;
            let streamed = run(
                scene,
                &(sides[0], words(&["send", &channel, from, &size, &time])),
                &(sides[1], words(&["receive", &channel, to])),
            )?;
            Ok(Streamed {
                rung: Some(scene.rung(index)? - before),
                ..streamed
            })
        }
        Way::Copy | Way::Ring => {
            let what = if case.way == Way::Copy {
                "copy"
            } else {
                "ring"
            };
            let load = scene.start(sides[0], &words(&[what, &size, &time]))?;
            let measured = load.wait()?;
            Ok(Streamed {
                sent: measured,
                received: measured,
                rung: None,
            })
        }
        Way::VirtioSerial | Way::Tcp | Way::Unix => {
            // The first is the end that must be there before the other one connects.
            let [listens, connects] = endpoints(scene, case.way)?;
            let [from, to] = match (sides, case.way) {
                ([Side::Host, Side::Guest], _) => [&listens, &connects],
                _ => [&connects, &listens],
            };
            run(
                scene,
                &(sides[0], words(&["pipe-send", from, &size, &time])),
                &(sides[1], words(&["pipe-receive", to, &size])),
            )
        }
    }
}

/// The two ends of a pipe, the host's first.
fn endpoints(scene: &Scene, way: Way) -> Result<[String; 2]> {
    Ok(match way {
        Way::VirtioSerial => [
            format!("unix:{}", scene.port().display()),
            format!("port:{PORT}"),
        ],
        Way::Tcp => {
            // Free at this moment.
            let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
            [
                format!("tcp-listen:127.0.0.1:{port}"),
                format!("tcp:{GATEWAY}:{port}"),
            ]
        }
        _ => {
            let path = scene.fresh_file("unix.sock")?;
            [
                format!("unix-listen:{}", path.display()),
                format!("unix:{}", path.display()),
            ]
        }
    })
}

/// Runs a sender and a receiver to their ends.
fn run(scene: &Scene, sender: &Order, receiver: &Order) -> Result<Streamed> {
    let receiver = scene.start(receiver.0, &receiver.1)?;
    let sender = scene.start(sender.0, &sender.1)?;
    let sent = sender.wait().context("the sender failed")?;
    let received = receiver.wait().context("the receiver failed")?;
    ensure!(
        (sent.records, sent.sum) == (received.records, received.sum),
        "what came is not what was sent"
    );
    Ok(Streamed {
        sent,
        received,
        rung: None,
    })
}

impl Transport {
    /// The slot over it, which is also the number of the guest's device.
    fn index(self) -> usize {
        let mut all = Transport::ALL.into_iter();
        all.position(|other| other == self).unwrap_or_default()
    }
}
