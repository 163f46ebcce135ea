// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The machinery itself: the VM boots the chosen kernel, and its agent does what the other tests rely on.

use std::time::Duration;

use anyhow::Result;
use barlink_agent::Status;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::{COMMAND_TIMEOUT, Config, Vm};
use rustix::process::Signal;
use serde_json::json;

#[test]
fn a_stock_kernel_boots_and_the_agent_runs_commands() -> Result<()> {
    let vm = Vm::boot(&Config::default())?;

    let release = vm.run(["uname", "-r"])?.success()?;
    assert_eq!(release.trim_end(), Artifacts::shared()?.tools.release);
    assert!(vm.console_log().contains("Linux version"));

    let failing = vm.run(["sh", "-c", "echo out; echo error >&2; exit 3"])?;
    assert_eq!(failing.status, Status::Code(3));
    assert_eq!(
        (&failing.stdout[..], &failing.stderr[..]),
        (&b"out\n"[..], &b"error\n"[..])
    );

    let missing = vm.run(["no-such-program"]).unwrap_err();
    assert!(
        format!("{missing:#}").contains("no-such-program cannot be started"),
        "{missing:#}"
    );
    Ok(())
}

#[test]
fn large_and_binary_output_and_input_pass_unchanged() -> Result<()> {
    let vm = Vm::boot(&Config::default())?;
    let bytes: Vec<u8> = (0..1_u32 << 18)
        .flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    vm.put_file("/tmp/file", &bytes)?;
    assert!(
        vm.get_file("/tmp/file")? == bytes,
        "1 MiB came back changed"
    );
    Ok(())
}

#[test]
fn processes_run_side_by_side_take_input_and_can_be_killed() -> Result<()> {
    let vm = Vm::boot(&Config::default())?;

    let sleeper = vm.spawn(["sh", "-c", "echo started; sleep 1000 & wait"])?;
    sleeper.wait_for("started", COMMAND_TIMEOUT)?;

    let echo = vm.spawn(["cat"])?;
    echo.write(b"first\n")?;
    echo.wait_for("first", COMMAND_TIMEOUT)?;
    echo.write(b"second\n")?;
    echo.close_stdin()?;
    assert_eq!(echo.wait(COMMAND_TIMEOUT)?.success()?, "first\nsecond\n");

    // Its child dies with it, or its output would never end.
    sleeper.kill(Signal::TERM)?;
    assert_eq!(
        sleeper.wait(COMMAND_TIMEOUT)?.status,
        Status::Signal(Signal::TERM.as_raw())
    );

    // Nothing on the way from init ignores Ctrl-C.
    let interrupted = vm.run(["sh", "-c", "kill -INT $$"])?;
    assert_eq!(interrupted.status, Status::Signal(Signal::INT.as_raw()));

    let slow = vm.spawn(["sleep", "1000"])?;
    let error = slow.wait(Duration::from_millis(300)).unwrap_err();
    assert!(format!("{error:#}").contains("in vain"), "{error:#}");
    Ok(())
}

#[test]
fn a_reset_guest_comes_back() -> Result<()> {
    let vm = Vm::boot(&Config::default())?;
    vm.put_file("/tmp/mark", b"")?;
    let cut_off = vm.spawn(["sleep", "1000"])?;
    vm.reset()?;
    cut_off.wait(COMMAND_TIMEOUT).unwrap_err();
    vm.run(["test", "!", "-e", "/tmp/mark"])?.require_success()
}

#[test]
fn devices_come_and_go_while_the_guest_runs() -> Result<()> {
    let vm = Vm::boot(&Config {
        arguments: ["-device", "pcie-root-port,id=empty"]
            .map(String::from)
            .into(),
        ..Config::default()
    })?;
    let devices = || vm.run(["ls", "/sys/bus/pci/devices"])?.success();
    let before = devices()?;
    vm.plug(&json!({ "driver": "virtio-rng-pci", "id": "plugged", "bus": "empty" }))?;
    let script = format!(
        "until [ \"$(ls /sys/bus/pci/devices)\" != '{}' ]; do sleep 0.1; done",
        before.trim_end()
    );
    vm.run(["sh", "-c", &script])?.require_success()?;
    vm.unplug("plugged")?;
    assert_eq!(devices()?, before);
    Ok(())
}
