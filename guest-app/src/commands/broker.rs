// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The question whether the broker is alive, and the warning that it does not answer. A stream goes
//! on without a broker, so the warning ends nothing. A program that has sent something asks before
//! it ends, because a short one would end before its watch could warn.

use std::io::{Write, stderr};
use std::time::{Duration, Instant};

use anyhow::Result;
use barlink::guest::Device;
use barlink_cli::failure::unread;
use barlink_protocol::state::ChannelState;

/// Text of the warning about a broker that does not answer.
const SILENT: &str = "the broker has not answered for 10 s: it is stopped, busy or gone, and what is sent may reach nobody. \
                      A broker that was started anew has another region: shut this VM down and start it again";
/// Text of the warning about a broker that has ended in good order.
const ENDED: &str = "the broker has ended, and what is sent reaches only host apps that are still attached. A broker \
                     that was started anew has another region: shut this VM down and start it again";

/// Longest time for which a program waits until a host app has received what it sent, if the broker
/// is gone.
const READ_TIME: Duration = Duration::from_secs(10);
/// Time between two looks for that.
const LOOK: Duration = Duration::from_millis(10);

/// Asks for the broker, and warns after ten seconds without an answer. A user who may only read the
/// device cannot ask.
pub fn check(device: &Device) {
    if let Some(fault) = fault(device) {
        warn(fault);
    }
}

/// Asks for the broker after something was sent through a channel, or was written into the raw
/// window. If the broker is gone, host apps that are attached can still receive, so this warns if
/// they have received all.
///
/// # Errors
///
/// The broker is gone, and records in the channel were not received. Nothing shows whether a
/// program has read the raw window, so without a channel the broker's end is enough.
pub fn confirm(device: &Device, channel: Option<&str>) -> Result<()> {
    let start = Instant::now();
    let Some(fault) = fault(device) else {
        return Ok(());
    };
    while channel.is_some_and(|channel| !is_received(device, channel)) {
        if start.elapsed() >= READ_TIME {
            return Err(unread(fault));
        }
        std::thread::sleep(LOOK);
    }
    match channel {
        Some(_) => {
            warn(fault);
            Ok(())
        }
        None => Err(unread(fault)),
    }
}

/// Returns whether a consumer has released all records of a channel.
fn is_received(device: &Device, name: &str) -> bool {
    let mut channels = device.layout().channels().iter();
    let Some(channel) = channels.find(|channel| channel.name.as_str() == name) else {
        return false;
    };
    let state = ChannelState::read(device.region().ring(), channel);
    state.fill(channel) == Some(0)
}

/// Returns the text about a broker that is gone, as far as that can be found out.
fn fault(device: &Device) -> Option<&'static str> {
    let watch = device.watch_broker().ok()?;
    if watch.has_ended() {
        return Some(ENDED);
    }
    (!watch.is_answered().ok()?).then_some(SILENT)
}

/// Starts a thread that warns once, when the broker does not answer a question of its own or of an
/// end of a channel.
pub fn watch(device: &Device) {
    let Ok(watch) = device.watch_broker() else {
        return;
    };
    // Without the thread there is no warning.
    let _ = std::thread::Builder::new()
        .name("broker".to_owned())
        .spawn(move || {
            if watch.wait_until_unanswered().is_ok() {
                warn(SILENT);
            }
        });
}

fn warn(text: &str) {
    // `eprintln` would panic where standard error is closed.
    let _ = writeln!(stderr(), "barlink-guest: warning: {text}");
}
