// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The build of the bare guest, the firmware image in `ci/bare-guest/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

/// Files that are compiled.
const SOURCES: [&str; 5] = ["start.S", "serial.c", "interrupts.c", "pci.c", "orders.c"];
/// Other files that the image is made of.
const INCLUDED: [&str; 2] = ["guest.h", "image.ld"];
/// Size of the image in bytes.
const SIZE: u64 = 64 << 10;

/// Arguments of the host's C compiler, which links Rust programs, too. The code has no library and
/// no registers but general ones, and lies where the linker script says.
const ARGUMENTS: [&str; 23] = [
    "-m64",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffreestanding",
    "-fno-pic",
    "-fno-pie",
    "-mcmodel=small",
    "-mno-red-zone",
    "-mgeneral-regs-only",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-jump-tables",
    "-fcf-protection=none",
    // The compiler must not turn a loop into a call of `memset`.
    "-fno-tree-loop-distribute-patterns",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,-T,image.ld",
    "-Wl,-m,elf_x86_64",
    "-Wl,--build-id=none",
    // The image has one segment, and no page tables that could protect parts of it.
    "-Wl,--no-warn-rwx-segments",
];

/// Builds the image in a folder and returns its path, which depends on the sources. An image that
/// exists is not built again.
pub(crate) fn build(repository: &Path, folder: &Path) -> Result<PathBuf> {
    let sources = repository.join("ci/bare-guest");
    let mut hash = Sha256::new();
    hash.update(ARGUMENTS.join(" "));
    for name in SOURCES.iter().chain(&INCLUDED) {
        let path = sources.join(name);
        let text = fs::read(&path).with_context(|| format!("{} is missing", path.display()))?;
        hash.update(text.len().to_le_bytes());
        hash.update(text);
    }
    let digest = hash.finalize();
    let digits: String = digest
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let image = folder.join(format!("bare-guest-{digits}.bin"));
    if !image.exists() {
        eprintln!("building the bare guest ...");
        // Another process may build the same image. Both have the same content.
        let built = NamedTempFile::new_in(folder)?;
        compile(&sources, built.path())?;
        let size = fs::metadata(built.path())?.len();
        ensure!(size == SIZE, "the bare guest has {size} bytes, not {SIZE}");
        built.persist(&image)?;
    }
    Ok(image)
}

fn compile(sources: &Path, image: &Path) -> Result<()> {
    let mut command = Command::new("cc");
    command.current_dir(sources).args(ARGUMENTS).args(SOURCES);
    let output = command.arg("-o").arg(image).output();
    let output = output.context("there is no C compiler (cc), which the bare guest needs")?;
    ensure!(
        output.status.success(),
        "the bare guest does not build\n{}",
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(())
}
