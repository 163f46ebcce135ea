// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `cargo xtask bindings`: makes the library for C and C++, with its header and its file for
//! `pkg-config`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;

use barlink_sandbox::builds::{cargo, repository, target_folder};

/// Version of the library's binary interface. It changes if a program that was linked before would
/// no longer work.
const SONAME: &str = "libbarlink.so.1";
/// The header in the tree, from the folder of the bindings on.
const HEADER: &str = "include/barlink.h";
/// Libraries that Rust's own library needs (`rustc --print native-static-libs`).
const SYSTEM_LIBRARIES: &str = "-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc";

/// Options of the task.
#[derive(Args, Debug)]
pub struct BindingsArgs {
    /// Folder that gets `include` and `lib` [default: target/bindings, and the header in the tree
    /// is made anew]
    #[arg(long, value_name = "DIR")]
    pub prefix: Option<PathBuf>,
    /// Build nothing, and check that the header in the tree belongs to the code
    #[arg(long, conflicts_with = "prefix")]
    pub check: bool,
}

/// Builds the library. Without a prefix, also writes the header into the tree.
pub fn run(args: &BindingsArgs) -> Result<()> {
    let folder = repository().join("bindings/c");
    let header = header(&folder)?;
    let in_tree = folder.join(HEADER);
    if args.check || args.prefix.is_some() {
        ensure!(
            fs::read_to_string(&in_tree)? == header,
            "bindings/c/{HEADER} is not of this code: run `cargo xtask bindings`"
        );
    } else {
        write(&in_tree, &header)?;
    }
    if args.check {
        return Ok(());
    }
    let target = target_folder()?;
    let prefix = args.prefix.clone();
    let prefix = prefix.unwrap_or_else(|| target.join("bindings"));
    let status = cargo("build")
        .args(["--release", "--package", "barlink-c"])
        .arg("--target-dir")
        .arg(&target)
        .status();
    ensure!(
        status.context("cannot start cargo")?.success(),
        "cargo cannot build the library for C"
    );
    let (include, lib) = (prefix.join("include"), prefix.join("lib"));
    for place in [&include, &lib.join("pkgconfig")] {
        fs::create_dir_all(place).with_context(|| format!("cannot make {}", place.display()))?;
    }
    write(&include.join("barlink.h"), &header)?;
    let archive = lib.join("libbarlink.a");
    let built = target.join("release/libbarlink_c.a");
    install(&archive, |new| {
        fs::copy(&built, new).with_context(|| format!("cannot copy {}", built.display()))?;
        Ok(())
    })?;
    link(&folder, &archive, &lib)?;
    let prefix = prefix.canonicalize()?;
    write(&lib.join("pkgconfig/barlink.pc"), &description(&prefix))?;
    println!("the library for C is in {}", prefix.display());
    Ok(())
}

/// Returns the header that belongs to the code in the folder of the bindings.
fn header(folder: &Path) -> Result<String> {
    let config = cbindgen::Config::from_file(folder.join("cbindgen.toml"));
    let config = config.map_err(|error| anyhow!("cbindgen.toml: {error}"))?;
    let bindings = cbindgen::generate_with_config(folder, config)?;
    let mut header = Vec::new();
    bindings.write(&mut header);
    let header = String::from_utf8(header)?;
    // C has no name spaces, and the name of the type says nothing more.
    let header = header.replace("BARLINK_CODE_", "BARLINK_");
    Ok(header.replace("// # Safety\n//\n// ", "// Required:\n// "))
}

/// Links the shared library. Cargo does not version its symbols.
fn link(folder: &Path, archive: &Path, lib: &Path) -> Result<()> {
    let map = folder.join("libbarlink.map");
    let linked = |new: &Path| {
        Command::new("cc")
            .args(["-shared", "-o"])
            .arg(new)
            .arg(format!("-Wl,-soname,{SONAME}"))
            .arg(format!("-Wl,--version-script={}", map.display()))
            .args([
                "-Wl,--gc-sections",
                "-Wl,--strip-debug",
                "-Wl,-z,defs",
                "-Wl,--whole-archive",
            ])
            .arg(archive)
            .arg("-Wl,--no-whole-archive")
            .args(SYSTEM_LIBRARIES.split(' '))
            .status()
    };
    install(&lib.join(SONAME), |new| {
        let status = linked(new).context("cannot start cc")?;
        ensure!(status.success(), "cc cannot link {SONAME}");
        Ok(())
    })?;
    install(&lib.join("libbarlink.so"), |new| {
        std::os::unix::fs::symlink(SONAME, new).context("cannot make a link")
    })
}

/// Makes a file beside its place, and moves it there whole: a program that uses the former one goes
/// on with it.
fn install(place: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut new = place.as_os_str().to_owned();
    new.push(format!(".{}", std::process::id()));
    let new = PathBuf::from(new);
    make(&new)?;
    fs::rename(&new, place).with_context(|| format!("cannot make {}", place.display()))
}

fn description(prefix: &Path) -> String {
    format!(
        "prefix={}\n\
         includedir=${{prefix}}/include\n\
         libdir=${{prefix}}/lib\n\n\
         Name: barlink\n\
         Description: Shared memory as a PCI device, between guests and their host\n\
         Version: {}\n\
         Cflags: -I${{includedir}}\n\
         Libs: -L${{libdir}} -lbarlink\n\
         Libs.private: {SYSTEM_LIBRARIES}\n",
        prefix.display(),
        env!("CARGO_PKG_VERSION")
    )
}

fn write(path: &Path, text: &str) -> Result<()> {
    install(path, |new| {
        fs::write(new, text).with_context(|| format!("cannot write {}", path.display()))
    })
}
