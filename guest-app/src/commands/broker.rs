// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The warning that the broker does not answer. A stream goes on without a broker, so the warning
//! ends nothing.

use std::io::{Write, stderr};

use barlink::guest::Device;

/// Text of the warning.
const SILENT: &str = "barlink-guest: warning: the broker has not answered for 10 s: it is stopped, busy or gone, and \
                      what is sent may reach nobody. A broker that was started anew has another region: shut this \
                      VM down and start it again";

/// Asks for the broker, and warns after ten seconds without an answer. A user who may only read the
/// device cannot ask.
pub fn check(device: &Device) {
    let watch = device.watch_broker();
    if let Ok(false) = watch.and_then(|watch| watch.is_answered()) {
        warn();
    }
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
                warn();
            }
        });
}

fn warn() {
    // `eprintln` would panic where standard error is closed.
    let _ = writeln!(stderr(), "{SILENT}");
}
