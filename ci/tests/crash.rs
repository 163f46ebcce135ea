//! Crashes of every kind, once each; `cargo xtask crash` does as many as one likes.

use anyhow::{Result, ensure};
use xtask::builds::Artifacts;
use xtask::crash;

#[test]
fn every_kind_of_fault_costs_no_record() -> Result<()> {
    let report = crash::once(Artifacts::shared()?)?;
    print!("{report}");
    ensure!(report.is_good(), "see the table");
    Ok(())
}
