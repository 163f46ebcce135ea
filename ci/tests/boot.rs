//! Spike.
use std::time::Instant;
use anyhow::Result;
use barlink_vm::{Config, Vm};
use barlink_vm::broker::{Broker,Transport};
use barlink_sandbox::builds::Artifacts;

#[test]
fn spike() -> Result<()> {
    let a = Artifacts::shared()?;
    for _ in 0..2 {
    let t = Instant::now();
    let vm = Vm::restore(&Config::default())?;
    eprintln!("restored {:?}", t.elapsed());
    vm.run(["uname", "-r"])?.success()?;
    eprintln!("ran {:?}", t.elapsed());
    }
    for tr in Transport::ALL {
    for _ in 0..3 {
    let t = Instant::now();
    let broker = Broker::start_over(a, &[tr], &[])?;
    let c = broker.vm()?;
    eprintln!("{tr} broker {:?}", t.elapsed());
    let vm = Vm::restore(&c)?;
    eprintln!("restored {:?}", t.elapsed());
    vm.run(["insmod", "/lib/barlink.ko"])?.require_success()?;
    eprintln!("loaded {:?}", t.elapsed());
    eprintln!("{}", vm.run(["barlink-guest", "info"])?.success()?);
    eprintln!("info {:?}", t.elapsed());
    }}
    Ok(())
}
