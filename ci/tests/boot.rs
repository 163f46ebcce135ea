// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Virtual machines: a guest boots the chosen kernel or is restored from a file, and its agent does
//! what the other tests rely on.

use std::time::{Duration, Instant};

use anyhow::Result;
use barlink_agent::Status;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::{COMMAND_TIMEOUT, Config, Vm};
use rustix::process::Signal;

#[test]
fn stock_kernel_boots_and_agent_runs_commands() -> Result<()> {
    let start = Instant::now();
    let vm = Vm::boot(&Config::default())?;
    println!("booted in {:?}", start.elapsed());

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
fn restored_guest_works_like_booted_one() -> Result<()> {
    // The first VM with a configuration boots, and its state is written to a file.
    Vm::restore(&Config::default())?;
    let start = Instant::now();
    let vm = Vm::restore(&Config::default())?;
    let release = vm.run(["uname", "-r"])?.success()?;
    println!("restored in {:?}", start.elapsed());
    assert_eq!(release.trim_end(), Artifacts::shared()?.tools.release);
    // Writes and reads back 1 MiB, so that the transfer is tested with all values of a byte.
    let numbers = (0..1_u32 << 18).map(|number| number.wrapping_mul(2_654_435_761));
    let bytes: Vec<u8> = numbers.flat_map(u32::to_le_bytes).collect();
    vm.put_file("/tmp/file", &bytes)?;
    assert!(
        vm.get_file("/tmp/file")? == bytes,
        "1 MiB came back changed"
    );
    Ok(())
}

#[test]
fn agent_runs_and_kills_parallel_processes() -> Result<()> {
    let vm = Vm::restore(&Config::default())?;

    let sleeper = vm.spawn(["sh", "-c", "echo started; sleep 1000 & wait"])?;
    sleeper.wait_for("started", COMMAND_TIMEOUT)?;

    let echo = vm.spawn(["cat"])?;
    echo.write(b"first\n")?;
    echo.wait_for("first", COMMAND_TIMEOUT)?;
    echo.write(b"second\n")?;
    echo.close_stdin()?;
    assert_eq!(echo.wait(COMMAND_TIMEOUT)?.success()?, "first\nsecond\n");

    // The signal must also end the child `sleep`, because its output would otherwise never end.
    sleeper.kill(Signal::TERM)?;
    assert_eq!(
        sleeper.wait(COMMAND_TIMEOUT)?.status,
        Status::Signal(Signal::TERM.as_raw())
    );

    // The default action of SIGINT is set: no process between init and the command ignores it.
    let interrupted = vm.run(["sh", "-c", "kill -INT $$"])?;
    assert_eq!(interrupted.status, Status::Signal(Signal::INT.as_raw()));

    let slow = vm.spawn(["sleep", "1000"])?;
    let error = slow.wait(Duration::from_millis(300)).unwrap_err();
    assert!(format!("{error:#}").contains("in vain"), "{error:#}");
    Ok(())
}
