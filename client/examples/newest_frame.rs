// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A camera with two readers that cannot slow it down: a recorder takes each frame, and a display
//! takes the newest one whenever it draws. The channel overwrites its oldest frames.
//!
//! ```text
//! barlink serve --ivshmem /tmp/vm.sock --channel camera=host-taps,2M,overwrite &
//! cargo run --example newest_frame -- record &
//! cargo run --example newest_frame -- display &
//! cargo run --example newest_frame -- send
//! ```
//!
//! In a guest, each opens the device with `barlink::guest::open("/dev/barlink0")` instead: all else
//! is the same.

use std::io::Write;
use std::time::Duration;

use barlink::host::{self, AttachOptions};
use barlink::{Access, Kind, Tap};

/// The channel, and the number and size of the frames.
const CHANNEL: &str = "camera";
const FRAMES: u32 = 60;
const WIDTH: usize = 640;
const HEIGHT: usize = 480;

fn main() -> anyhow::Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("send") => send(),
        Some("record") => record(tap()?),
        Some("display") => display(tap()?),
        _ => anyhow::bail!("usage: newest_frame send|record|display"),
    }
}

/// Returns a tap. It claims nothing, so the access is for reading only.
fn tap() -> Result<Tap, barlink::Error> {
    let options = AttachOptions::new().access(Access::ReadOnly);
    let tap = options.connect("default")?.tap(CHANNEL)?;
    println!("begins");
    Ok(tap)
}

fn send() -> anyhow::Result<()> {
    let mut camera = host::connect("default")?.sender(CHANNEL)?;
    for number in 0..FRAMES {
        // There is always room: the oldest frame makes it.
        let mut frame = camera.reserve(WIDTH * HEIGHT)?;
        for line in 0..HEIGHT {
            frame.write_all(&[(number as usize + line) as u8; WIDTH])?;
        }
        frame.commit(Kind::USER)?;
        std::thread::sleep(Duration::from_millis(16));
    }
    camera.reserve(0)?.commit(Kind::END)?;
    println!("sent {FRAMES} frames");
    Ok(())
}

fn record(mut camera: Tap) -> anyhow::Result<()> {
    let mut frames = 0;
    while camera.recv()?.kind != Kind::END {
        frames += 1;
    }
    println!("recorded {frames} frames, missed {}", camera.missed());
    Ok(())
}

fn display(mut camera: Tap) -> anyhow::Result<()> {
    let (mut drawn, mut last) = (0, None);
    loop {
        match camera.latest()? {
            Some(frame) if frame.kind == Kind::END => break,
            Some(frame) if last != Some(frame.sequence) => {
                // A whole frame: each line has one value, and follows the line above it.
                let first = frame.bytes[0];
                let lines = frame.bytes.chunks(WIDTH).enumerate();
                for (number, line) in lines {
                    assert!(
                        line.iter()
                            .all(|&pixel| pixel == first.wrapping_add(number as u8))
                    );
                }
                last = Some(frame.sequence);
                drawn += 1;
            }
            // No frame yet, or no new one.
            _ => (),
        }
        std::thread::sleep(Duration::from_millis(40));
    }
    println!("drew {drawn} frames");
    Ok(())
}
