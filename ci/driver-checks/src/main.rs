// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink-driver-checks NAME`: runs one check of the driver, in the guest. With
//! `debug PID ADDRESS WORD` it is a debugger instead.

use anyhow::{Context, Result};
use barlink_driver_checks::{DEBUG, debug, run};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        [DEBUG, process, address, word] => {
            let seen = debug(process.parse()?, address.parse()?, word.parse()?)?;
            println!("{}", serde_json::to_string(&seen)?);
            Ok(())
        }
        _ => run(words.first().context("which check?")?),
    }
}
