// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask demo`: boots a guest with all that barlink is made of.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Args;

use crate::builds::Artifacts;
use crate::setup;
use crate::tools::VmArgs;
use crate::vm::{Config, Vm, accelerator};

/// How to run the demo.
#[derive(Args, Debug)]
pub struct DemoArgs {
    /// Leave the guest running at the end, with a root shell on this terminal
    #[arg(long)]
    pub keep: bool,

    /// The tools.
    #[command(flatten)]
    pub vm: VmArgs,
}

/// Sets up and builds what is needed, and boots the guest.
pub fn run(args: &DemoArgs) -> Result<ExitCode> {
    let tools = setup::ensure(&args.vm.tools)?;
    let artifacts = Artifacts::build(tools, args.vm.clone())?;
    let started = Instant::now();
    let vm = Vm::boot_with(
        &artifacts,
        &Config {
            interactive: args.keep,
            ..Config::default()
        },
    )?;
    let seconds = started.elapsed().as_secs_f64();
    println!("booted   in {seconds:.1} s");
    println!(
        "kernel   {}",
        vm.run(["uname", "-r"])?.success()?.trim_end()
    );
    println!("runs by  {:?}", accelerator(args.vm.accel));
    if args.keep {
        println!("the guest's console; Ctrl-] leaves and ends the guest");
        vm.attach_terminal()?;
    }
    Ok(ExitCode::SUCCESS)
}
