// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program `barlink-guest` in a real guest: pipes, errors, and users who may only read the
//! device.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use barlink_agent::Status;
use barlink_vm::broker::Broker;
use barlink_vm::{COMMAND_TIMEOUT, Config, Vm};
use barlink_vm_tests::{run, wait_for_end};
use rustix::process::Signal;

use super::TRANSPORT;
use crate::support::*;

#[test]
fn pipes_work_in_guest_and_host() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let receiver = receive(&broker, "up")?;
    vm.run([
        "sh",
        "-c",
        "tar c /bin/busybox 2>/dev/null | barlink-guest send",
    ])?
    .require_success()?;
    let archive = broker.folder().join("archive");
    fs::write(&archive, receiver.bytes()?)?;
    let listed = run(Command::new("tar").arg("tf").arg(&archive), "tar")?;
    assert_eq!(listed.stdout, b"bin/busybox\n");
    Ok(())
}

#[test]
fn guest_app_rejects_invalid_requests() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    let first = vm.spawn(["barlink-guest", "send"])?;
    wait_for_holder(&broker, "up", "producer", true)?;
    let refused = |argv: &[&str], code, text: &str| -> Result<()> {
        let output = vm.run(argv.iter().copied())?;
        let errors = String::from_utf8(output.stderr)?;
        assert_eq!(output.status, Status::Code(code), "{errors}");
        assert!(
            errors.contains(text) && errors.lines().count() == 1,
            "{errors}"
        );
        Ok(())
    };
    refused(
        &["barlink-guest", "send"],
        4,
        "channel `up` already has a producer: stop the process in this VM",
    )?;
    refused(
        &["barlink-guest", "send", "--channel", "x"],
        1,
        "no channel `x` in this region; there are: up, down",
    )?;
    refused(
        &["barlink-guest", "send", "--channel", "down"],
        1,
        "the producer of channel `down` is not in this VM",
    )?;
    refused(
        &["barlink-guest", "--device", "/dev/null", "info"],
        3,
        "not a barlink device: /dev/null",
    )?;
    refused(
        &["barlink-guest", "peek", "--at", "1G"],
        1,
        "is not in the raw window",
    )?;
    first.kill(Signal::INT)?;
    assert_eq!(
        first.wait(COMMAND_TIMEOUT)?.status,
        Status::Signal(Signal::INT.as_raw())
    );
    wait_for_holder(&broker, "up", "producer", false)
}

#[test]
fn reader_of_device_describes_and_peeks() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    vm.run(["barlink-guest", "poke", "bytes"])?
        .require_success()?;
    // A user who may read the device as a member of its group, and not write to it.
    let user = "echo reader:x:1000:1000::/:/bin/sh >>/etc/passwd && \
        chgrp 1000 /dev/barlink0 && chmod 640 /dev/barlink0";
    vm.run(["sh", "-c", user])?.require_success()?;
    let as_reader = |command: &str| vm.run(["su", "reader", "-c", command]);
    ensure!(as_reader("barlink-guest info")?.success()?.contains("slot"));
    let auto = as_reader("barlink-guest --cache auto info")?.success()?;
    ensure!(auto.contains(" chosen "), "{auto}");
    let peek = as_reader("barlink-guest peek --raw --length 5")?;
    assert_eq!(peek.success()?, "bytes");
    for command in ["send", "recv", "poke other", "buffer"] {
        let refused = as_reader(&format!("barlink-guest {command}"))?;
        let error = String::from_utf8(refused.stderr)?;
        assert_eq!(refused.status, Status::Code(1), "{command}: {error}");
        ensure!(
            error.contains("no permission to open /dev/barlink0 for writing")
                && error.contains("group barlink")
                && error.lines().count() == 1,
            "{command}: {error}"
        );
    }
    assert_eq!(broker.run(["peek", "--raw", "--length", "5"])?, b"bytes");
    reader_of_device_taps(&broker, &vm)?;
    // Without permission to read, the error names the same cure.
    vm.run(["chmod", "600", "/dev/barlink0"])?
        .require_success()?;
    let refused = as_reader("barlink-guest info")?;
    let error = String::from_utf8(refused.stderr)?;
    ensure!(
        error.contains("no permission to open /dev/barlink0:") && error.contains("group barlink"),
        "{error}"
    );
    Ok(())
}

/// Checks that a user who may only read the device copies the records of a stream, and consumes
/// none.
fn reader_of_device_taps(broker: &Broker, vm: &Vm) -> Result<()> {
    let mut sender = App::start(broker.app(["send"]).stdin(Stdio::piped()))?;
    let mut input = sender.stdin.take().context("no input")?;
    input.write_all(b"first")?;
    wait_until("the first bytes are there", || {
        Ok(broker.inspect()?["channels"][1]["records"] == 1)
    })?;
    let as_reader = |command: &str| vm.run(["su", "reader", "-c", command])?.success();
    let line = as_reader("barlink-guest tail down --latest -n 1")?;
    ensure!(line.ends_with(" data 1 5 \"first\"\n"), "{line}");
    assert_eq!(as_reader("barlink-guest recv --latest")?, "first");
    // It says that it waits for the next stream once it is there.
    let tap = vm.spawn(["su", "reader", "-c", "barlink-guest recv --tap 2>&1"])?;
    tap.wait_for("waiting", COMMAND_TIMEOUT)?;
    drop(input);
    ensure!(wait_for_end(&mut sender, "the sender")?.success());
    send(broker, "down", b"second")?;
    let copied = tap.wait(COMMAND_TIMEOUT)?.success()?;
    ensure!(copied.ends_with("second"), "{copied}");
    for text in ["first", "second"] {
        assert_eq!(vm.run(["barlink-guest", "recv"])?.success()?, text);
    }
    Ok(())
}

#[test]
fn guest_app_reports_missing_device() -> Result<()> {
    let vm = Vm::restore(&Config::default())?;
    for argv in [&["barlink-guest", "info"][..], &["barlink-guest", "recv"]] {
        let output = vm.run(argv.iter().copied())?;
        let errors = String::from_utf8(output.stderr)?;
        assert_eq!(output.status, Status::Code(3));
        assert!(
            errors.contains("no barlink device at /dev/barlink0") && errors.contains("insmod"),
            "{errors}"
        );
    }
    Ok(())
}

#[test]
fn closed_pipe_ends_guest_app_silently() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &[])?;
    for command in [
        "info",
        "info --json",
        "peek --length 1M",
        "peek --raw --length 1M",
    ] {
        // Not each shell has `pipefail`, so the first command's exit code goes through a file.
        let script = format!(
            "(barlink-guest {command}; echo $? >/tmp/code) 2>/tmp/errors | true; cat /tmp/code /tmp/errors"
        );
        assert_eq!(
            vm.run(["sh", "-c", &script])?.success()?,
            "0\n",
            "{command}"
        );
    }
    send(&broker, "down", &noise(1 << 20))?;
    let script = "(barlink-guest recv; echo $? >/tmp/code) 2>/tmp/errors | head -c 10 >/dev/null; cat /tmp/code /tmp/errors";
    assert_eq!(vm.run(["sh", "-c", script])?.success()?, "0\n");
    Ok(())
}
