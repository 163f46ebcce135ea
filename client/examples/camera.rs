// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Frames through shared memory: `send` fills each frame in place, and `receive` reads it there.
//!
//! ```text
//! barlink serve --ivshmem /tmp/vm.sock --channel camera=host-host,16M,drop &
//! cargo run --example camera -- receive camera &
//! cargo run --example camera -- send camera
//! ```
//!
//! In a guest, `send` opens the device with `barlink::guest::open("/dev/barlink0")` instead: all
//! else is the same.

use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::Duration;

use barlink::{Kind, host};

/// The name of the broker, and the number and size of the frames.
const BROKER: &str = "default";
const FRAMES: u32 = 100;
const WIDTH: usize = 320;
const HEIGHT: usize = 240;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (role, channel) = (args.next(), args.next());
    let channel = channel.as_deref().unwrap_or("camera");
    match role.as_deref() {
        Some("send") => send(channel),
        Some("receive") => receive(channel),
        _ => anyhow::bail!("usage: camera send|receive [CHANNEL]"),
    }
}

fn send(channel: &str) -> anyhow::Result<()> {
    let broker = host::connect(BROKER)?;
    let mut camera = broker.sender(channel)?;
    while !camera.is_peer_present() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut skipped = 0;
    for number in 0..FRAMES {
        // A frame that finds no room is skipped, so that the camera never waits.
        let Ok(mut frame) = camera.try_reserve(WIDTH * HEIGHT) else {
            skipped += 1;
            continue;
        };
        for line in 0..HEIGHT {
            frame.write_all(&[(number as usize + line) as u8; WIDTH])?;
        }
        frame.commit(Kind::USER)?;
    }
    // The receiver must get the end, also if the channel is full. A reservation waits for room even
    // if the sender drops.
    camera.reserve(0)?.commit(Kind::END)?;
    println!("sent {} frames, skipped {skipped}", FRAMES - skipped);
    Ok(())
}

fn receive(channel: &str) -> anyhow::Result<()> {
    let broker = host::connect(BROKER)?;
    let mut camera = broker.receiver(channel)?;
    let mut frames = 0;
    loop {
        let frame = camera.recv()?;
        if frame.kind() == Kind::END {
            break;
        }
        // The first pixels of the frame, without a copy of the rest.
        let first = frame
            .words()
            .first()
            .map(|word| word.load(Ordering::Relaxed));
        if frames == 0 {
            println!("first frame: {} bytes, {first:x?}", frame.len());
        }
        frames += 1;
    }
    println!("received {frames} frames");
    Ok(())
}
