// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The question whether the broker is alive, and the warning that it does not answer. A stream goes
//! on without a broker, so the warning ends nothing. A program that has sent something asks before
//! it ends, because a short one would end before its watch could warn.

use anyhow::Result;
use barlink::guest::Device;
use barlink_cli::notice::tell;
use barlink_cli::unread::wait_until_received;

/// Text of the warning about a broker that does not answer.
const SILENT: &str = "the broker has not answered for 10 s: it is stopped, busy or gone, or QEMU has lost its connection to it, and no program may receive what this one sends. \
                      A broker that was started anew has another region: shut this VM down and start it again";
/// Text of the warning about a broker that has ended in good order.
const ENDED: &str = "the broker has ended, and only host apps that are still attached receive what this program sends. A broker \
                     that was started anew has another region: shut this VM down and start it again";

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
/// The device has lost its region. Or the broker is gone, and no program received the records or
/// bytes (`wait_until_received`).
pub fn confirm(device: &Device, channel: Option<&str>) -> Result<()> {
    let fault = fault(device);
    device.check()?;
    let Some(fault) = fault else {
        return Ok(());
    };
    wait_until_received(device.region().ring(), device.layout(), channel, fault)?;
    // A region that is lost looks as if all was received.
    device.check()?;
    warn(fault);
    Ok(())
}

/// Returns the text about a broker that is gone, as far as that can be found out. Takes ten seconds
/// if the broker does not answer.
pub fn fault(device: &Device) -> Option<&'static str> {
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
    tell(&format!("barlink-guest: warning: {text}"));
}
