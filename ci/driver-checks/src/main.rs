// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink-driver-checks NAME`: runs one check of the driver, in the guest.

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let name = std::env::args().nth(1);
    barlink_driver_checks::run(&name.context("which check?")?)
}
