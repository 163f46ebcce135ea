// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the set-up needs of the host: two programs and Debian's keys.

use std::path::Path;

use anyhow::Result;

use crate::host::{install, on_path};
use crate::steps::Steps;

/// The keys that the packages' signatures are checked with.
pub(super) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Makes sure of them.
pub(super) fn prepare(steps: &Steps) -> Result<()> {
    let needs = [
        ("mmdebstrap", on_path("mmdebstrap")),
        ("bubblewrap", on_path("bwrap")),
        ("debian-archive-keyring", Path::new(KEYRING).exists()),
    ];
    install(steps, &needs)
}
