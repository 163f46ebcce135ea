// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The set-up's needs on the host: two programs and Debian's keys.

use std::path::Path;

use anyhow::Result;

use crate::host::{install, on_path};
use crate::steps::Steps;

/// Path of the keys that sign Debian's packages.
pub(super) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Installs the programs and the keys, if needed.
pub(super) fn prepare(steps: &Steps) -> Result<()> {
    let needs = [
        ("mmdebstrap", on_path("mmdebstrap")),
        ("bubblewrap", on_path("bwrap")),
        ("debian-archive-keyring", Path::new(KEYRING).exists()),
    ];
    install(steps, &needs)
}
