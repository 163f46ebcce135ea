//! Crashes of every kind, once each; `cargo xtask crash` does as many as one likes.

use anyhow::{Result, ensure};
use barlink_sandbox::builds::Artifacts;
use barlink_soak::crash;
use barlink_vm::broker::Transport;

#[test]
fn every_kind_of_fault_costs_no_record() -> Result<()> {
    costs_no_record(Transport::Ivshmem)
}

#[test]
fn every_kind_of_fault_over_vfio_user_costs_no_record() -> Result<()> {
    costs_no_record(Transport::VfioUser)
}

#[test]
fn every_kind_of_fault_over_vhost_user_costs_no_record() -> Result<()> {
    costs_no_record(Transport::VhostUser)
}

fn costs_no_record(transport: Transport) -> Result<()> {
    let report = crash::once(Artifacts::shared()?, transport)?;
    print!("{report}");
    ensure!(report.is_good(), "see the table");
    Ok(())
}
