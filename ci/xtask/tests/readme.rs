// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the README's commands as a user types them: those for the host in one shell, those for
//! the guest in a VM.
//!
//! `cargo xtask demo` and `cargo xtask test` are not run here, because `.ci/run` runs them. The VM
//! is this project's own, in place of the user's image. Its device comes from the arguments of the
//! README's `qemu-system-x86_64`.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};
use barlink_sandbox::builds::repository;
use barlink_sandbox::tools::{Tools, VmArgs};
use barlink_vm::{Config, Vm};

/// Line that marks the end of a block's output.
const END: &str = "-- end of block --";

/// A block of commands, for the host or the guest.
#[derive(Debug, PartialEq, Eq)]
enum Block {
    Host(String),
    Guest(String),
}

fn blocks(readme: &str) -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    for part in readme.split("```sh\n").skip(1) {
        let commands = part.split("```").next().unwrap_or_default();
        blocks.push(match commands.split_once('\n') {
            Some((place, commands)) if place.starts_with("# on the host") => {
                Block::Host(commands.to_owned())
            }
            Some(("# in the guest", commands)) => Block::Guest(commands.to_owned()),
            _ => anyhow::bail!("a block does not say where it runs: {commands}"),
        });
    }
    Ok(blocks)
}

/// A shell that runs one block after the other.
struct Shell {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Shell {
    fn start(run_folder: &Path, programs: &Path) -> Result<Self> {
        let path = std::env::var("PATH")?;
        let mut child = Command::new("bash")
            .args(["-e", "-o", "pipefail"])
            .current_dir(repository())
            .env("XDG_RUNTIME_DIR", run_folder)
            .env("PATH", format!("{}:{path}", programs.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().context("no input")?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        Ok(Self {
            child,
            input,
            output,
        })
    }

    /// Runs a block to its end, and returns its output.
    fn run(&mut self, commands: &str) -> Result<String> {
        writeln!(self.input, "{{\n{commands}\n}} </dev/null\necho '{END}'")?;
        let mut printed = String::new();
        loop {
            let start = printed.len();
            let length = self.output.read_line(&mut printed)?;
            ensure!(
                length > 0,
                "a command failed in:\n{commands}after:\n{printed}"
            );
            if printed[start..].trim_end() == END {
                printed.truncate(start);
                return Ok(printed);
            }
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // Ends the broker, which the README starts in the background of this shell.
        let _ = self.run("kill %1");
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn every_command_works_as_written() -> Result<()> {
    let readme = fs::read_to_string(repository().join("README.md"))?;
    let folder = tempfile::tempdir()?;
    // A stand-in for QEMU that writes its arguments to a file.
    let given = folder.path().join("given");
    let qemu = folder.path().join("qemu-system-x86_64");
    fs::write(
        &qemu,
        format!("#!/bin/sh\nprintf '%s\\n' \"$@\" >{}\n", given.display()),
    )?;
    fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755))?;
    // The README's path of the socket is an example, and could be in use on this host.
    let socket = folder.path().join("vm.sock");
    let readme = readme.replace("/tmp/vm.sock", &socket.display().to_string());
    // Uses the build options of the tests, so that the guest's program is not built again.
    let readme = readme.replace(
        "RUSTFLAGS=",
        "CARGO_PROFILE_RELEASE_STRIP=debuginfo RUSTFLAGS=",
    );

    let mut shell = Shell::start(folder.path(), folder.path())?;
    let mut vm: Option<Vm> = None;
    let mut printed = String::new();
    let mut ci = Vec::new();
    for block in blocks(&readme)? {
        match block {
            Block::Host(commands) if commands.starts_with("cargo xtask") => ci.push(commands),
            // The packages are those that `cargo xtask` installs for root.
            Block::Host(commands) if commands.starts_with("sudo apt-get install") => {}
            Block::Host(commands) => {
                printed.push_str(&shell.run(&commands)?);
            }
            Block::Guest(commands) => {
                if vm.is_none() {
                    vm = Some(Vm::boot(&Config {
                        paths: vec![folder.path().to_owned()],
                        ..config(&given)?
                    })?);
                }
                let vm = vm.as_ref().context("no VM")?;
                printed.push_str(
                    &vm.run(["sh", "-ec", &format!("cd /lib\n{commands}")])?
                        .success()?,
                );
            }
        }
    }
    assert_eq!(ci, ["cargo xtask demo\n", "cargo xtask test\n"]);
    for expected in [
        "cache mode",
        "hello from the guest",
        "a text in the",
        "broker process",
        "driver epoch 1",
    ] {
        assert!(printed.contains(expected), "no `{expected}` in:\n{printed}");
    }
    Ok(())
}

/// Returns the configuration of a VM with the device that the README's QEMU was given.
fn config(given: &Path) -> Result<Config> {
    let given = fs::read_to_string(given).context("the README starts no QEMU")?;
    let arguments = given
        .lines()
        .skip_while(|&argument| argument != "-chardev")
        .map(str::to_owned);
    Ok(Config {
        arguments: arguments.collect(),
        ..Config::default()
    })
}

#[test]
fn driver_makefile_builds_or_names_missing_headers() -> Result<()> {
    let tools = Tools::find(&VmArgs::from_environment()?.tools)?;
    let Some(sandbox) = &tools.sandbox else {
        eprintln!(
            "without a sandbox: not run, since the host need not have the driver's compilers"
        );
        return Ok(());
    };
    let source = repository().join("guest-driver");
    let wire = repository().join("protocol/src/wire");
    let output = tempfile::tempdir()?;
    let make = |arguments: &[String]| {
        let enter = sandbox.enter().bind_read_only(&source);
        let enter = enter.bind_read_only(&wire);
        let mut make = enter.bind(output.path(), output.path()).run("make");
        make.arg("-C").arg(&source).args(arguments);
        make.output()
    };
    // Builds for the running kernel, whose headers are not in the sandbox.
    let failed = make(&[])?;
    let errors = String::from_utf8(failed.stderr)?;
    ensure!(!failed.status.success());
    for part in [
        "No kernel headers with Rust metadata at /lib/modules/",
        "KDIR=FOLDER",
        "`cargo xtask driver`",
    ] {
        ensure!(errors.contains(part), "no `{part}` in:\n{errors}");
    }
    let built = make(&[
        format!("KDIR={}", sandbox.headers().display()),
        format!("MO={}", output.path().display()),
    ])?;
    let errors = String::from_utf8_lossy(&built.stderr);
    ensure!(built.status.success(), "{errors}");
    ensure!(output.path().join("barlink.ko").is_file(), "{errors}");
    Ok(())
}
