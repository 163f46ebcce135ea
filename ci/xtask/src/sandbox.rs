// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask setup`, `clean` and `driver`: the sandbox, and the driver that is built in it.

use std::process::ExitCode;

use anyhow::Result;
use barlink_sandbox::builds::{self, target_folder};
use barlink_sandbox::setup;
use barlink_sandbox::tools::{Qemu, ToolArgs};
use barlink_vm::remove_snapshots;

/// Makes the sandbox if there is none, and prints its content.
pub fn set_up(args: &ToolArgs) -> Result<ExitCode> {
    let tools = setup::ensure(args)?;
    println!(
        "kernel   {} ({})",
        tools.release,
        tools.kernel_image.display()
    );
    match &tools.qemu {
        Qemu::Sandboxed(_) => println!("qemu     the sandbox's"),
        Qemu::Own(path) => println!("qemu     {}", path.display()),
    }
    if let Some(sandbox) = &tools.sandbox {
        println!("sandbox  {}", sandbox.folder.display());
        for folder in setup::unused()? {
            println!(
                "unused   {}: another version's, or a superseded kernel's; `cargo xtask clean` removes it",
                folder.display()
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Removes the sandboxes of other versions of barlink and of superseded kernels, except for those
/// in use, and all snapshots of guests.
pub fn clean() -> Result<ExitCode> {
    let (mut removed, left) = setup::clean()?;
    removed.extend(remove_snapshots()?);
    for (what, paths) in [("removed", &removed), ("in use ", &left)] {
        for path in paths {
            println!("{what}  {}", path.display());
        }
    }
    if removed.is_empty() && left.is_empty() {
        println!("nothing to remove");
    }
    Ok(ExitCode::SUCCESS)
}

/// Sets up the tools that the driver needs, builds the driver, and prints the path of the module.
pub fn driver(args: &ToolArgs) -> Result<ExitCode> {
    let module = builds::driver(&setup::ensure(args)?, &target_folder()?)?;
    println!("{}", module.display());
    Ok(ExitCode::SUCCESS)
}
