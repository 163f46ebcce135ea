// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Cache modes: the modes that programs ask for, the modes that a stock kernel grants at the
//! address of the BAR, and the reports of both sides. TCG does not show the effect of a mode on
//! speed.

use anyhow::{Context, Result, ensure};
use barlink_agent::Status;
use barlink_protocol::Shortfall;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::broker::Broker;
use barlink_vm::{COMMAND_TIMEOUT, Config, Vm};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::TRANSPORT;
use crate::support::*;

/// End of the address space below 4 GiB, in bytes.
const FOUR_GIB: u64 = 4 << 30;
/// Each cache mode: the value of `--cache`, its name, and the mode granted below 4 GiB. Above 4 GiB
/// the kernel grants each mode.
const MODES: [(&str, &str, &str); 3] = [
    ("noncached", "uncached-minus", "uncached-minus"),
    ("write-combining", "write-combining", "write-combining"),
    ("write-back", "write-back", "uncached-minus"),
];

fn broker() -> Result<Broker> {
    Broker::start_over(Artifacts::shared()?, &[TRANSPORT], &["--size", "4M"])
}

/// Returns the configuration of a VM without the root port that `barlink qemu-args` prints, so that
/// its device is on the root bus.
fn on_the_root_bus(broker: &Broker) -> Result<Config> {
    let mut config = broker.vm()?;
    let port = |word: &String| word.starts_with("pcie-root-port,");
    let port = config.arguments.iter().position(port).context("no port")?;
    config.arguments.drain(port - 1..=port);
    for word in &mut config.arguments {
        *word = word.replace("\"bus\":\"barlink0-port\",", "");
        *word = word.replace(",bus=barlink0-port", "");
    }
    Ok(config)
}

fn boot_with(config: &Config) -> Result<Vm> {
    let vm = Vm::boot(config)?;
    load(&vm)?;
    Ok(vm)
}

/// Returns the output of `barlink-guest info` with this cache mode.
fn info(vm: &Vm, cache: &str) -> Result<Value> {
    let output = vm.run(["barlink-guest", "--cache", cache, "info", "--json"])?;
    Ok(serde_json::from_str(&output.success()?)?)
}

/// Sends a stream both ways in each mode, and checks that guest, host and the guest's kernel report
/// the same mode. A program that writes and asks for another mode receives an error that names
/// the process that has the region mapped.
fn modes_are_what_is_granted(broker: &Broker, vm: &Vm, is_above: bool) -> Result<()> {
    let bytes = noise(3_000_003);
    for (cache, name, below) in MODES {
        let granted = if is_above { name } else { below };
        let echo = vm.spawn(["barlink-guest", "--cache", cache, "echo"])?;
        wait_for_holder(broker, "up", "producer", true)?;

        let info = info(vm, "same")?;
        let seen = &info["cache"];
        assert_eq!(
            (&seen["asked"], &seen["granted"]),
            (&json!(name), &json!(granted))
        );
        assert_eq!(info["cache_mode"], granted);
        assert_eq!(broker.inspect()?["guests"][0]["cache"], *seen);
        let start = info["region_address"].as_u64().context("no address")?;
        assert_eq!(start >= FOUR_GIB, is_above, "BAR at {start:#x}");
        let cause = format!("BAR at {start:#x} lies below 4 GiB, under an uncachable MTRR");
        let expected = (name != granted).then_some(cause);
        assert_eq!(seen["cause"].as_str(), expected.as_deref());
        let cure = Shortfall::BelowFourGib { address: start }.cure();
        assert_eq!(seen["cure"].as_str(), expected.map(|_| cure));

        // The driver registers the mode for all that can be mapped: the region without the page of
        // the only slot's driver.
        let size = info["region_size"].as_u64().context("no size")?;
        let end = start + size - 4096;
        let entry = format!("PAT: [mem {start:#018x}-{end:#018x}] {granted}\n");
        let list = vm.run(["cat", "/sys/kernel/debug/x86/pat_memtype_list"])?;
        let list = list.success()?;
        ensure!(list.contains(&entry), "{entry} is not in\n{list}");

        for (other, ..) in MODES.into_iter().filter(|(other, ..)| *other != cache) {
            // A program that only reads takes the mode of those that write.
            vm.run(["barlink-guest", "--cache", other, "peek"])?
                .require_success()?;
            let refused = vm.run(["barlink-guest", "--cache", other, "poke", "x"])?;
            let error = String::from_utf8_lossy(&refused.stderr);
            assert_eq!(refused.status, Status::Code(4), "{error}");
            let pid = vm.run(["pidof", "barlink-guest"])?.success()?;
            let holder = format!(
                "process {} (barlink-guest) has it mapped {cache},",
                pid.trim()
            );
            ensure!(error.contains(&holder), "no `{holder}` in {error}");
        }
        let joined = self::info(vm, "auto")?;
        assert_eq!(joined["choice"], json!({"cache": "same", "speeds": {}}));

        let receiver = receive(broker, "up")?;
        let path = broker.folder().join("to-send");
        std::fs::write(&path, &bytes)?;
        let sent = barlink_vm_tests::run(broker.app(["send"]).arg(&path), "the sender")?;
        ensure!(sent.status.success(), "{cache}: {sent:?}");
        ensure!(
            receiver.bytes()? == bytes,
            "bytes came otherwise than they went, {cache}"
        );
        echo.wait(COMMAND_TIMEOUT)?.require_success()?;
        ensure!(broker.inspect()?["guests"][0]["cache"]["asked"].is_null());
    }
    Ok(())
}

#[test]
fn auto_chooses_noncached_if_fast_enough() -> Result<()> {
    let broker = broker()?;
    let vm = guest(&broker)?;
    modes_are_what_is_granted(&broker, &vm, true)?;
    // Each mode is granted above 4 GiB. The accelerator decides how fast it is.
    let info = info(&vm, "auto")?;
    let speed = |cache: &str| {
        let speed = info["choice"]["speeds"][cache].as_f64();
        speed.with_context(|| format!("no speed of {cache} in {info}"))
    };
    let [noncached, combining, back] = [
        speed("noncached")?,
        speed("write-combining")?,
        speed("write-back")?,
    ];
    let is_fast_enough = 2.0 * noncached >= combining.max(back);
    let chosen = &info["choice"]["cache"];
    assert_eq!(chosen == "noncached", is_fast_enough, "{info}");
    let (_, granted, _) = MODES
        .into_iter()
        .find(|(cache, ..)| chosen == cache)
        .context("no mode")?;
    assert_eq!(info["cache"]["granted"], granted);
    // Without an option a program chooses in the same way, and says so.
    let text = vm.run(["barlink-guest", "info"])?.success()?;
    ensure!(
        text.contains(" chosen ") && text.contains(": reads by write-back "),
        "{text}"
    );
    let receiver = receive(&broker, "up")?;
    let send = vm.run(["sh", "-c", "echo text | barlink-guest send"])?;
    ensure!(receiver.bytes()? == b"text\n");
    let errors = String::from_utf8_lossy(&send.stderr);
    ensure!(
        errors.contains("cache mode ") && errors.contains(" MiB/s, noncached "),
        "{errors}"
    );
    send.require_success()?;
    // Several processes that try modes at once all succeed, in any order, also beside others that
    // ask for a mode by its name: a measurement determines no mode. On a busy host noncached memory
    // can seem slow, so that a program maps another mode and others find the region in use (4). So
    // there are several tries, and each other error ends them.
    let many = |command: &str| {
        format!(
            "pids=; for i in $(seq 6); do {command} & pids=\"$pids $!\"; \
            barlink-guest --cache noncached poke x & pids=\"$pids $!\"; done; in_use=0; \
            for pid in $pids; do wait $pid || {{ [ $? = 4 ] || exit 1; in_use=4; }}; done; \
            exit $in_use"
        )
    };
    let pokes = many("barlink-guest poke x");
    wait_until("all processes write at once", || {
        let output = vm.run(["sh", "-c", &pokes])?;
        if output.status == Status::Code(4) {
            return Ok(false);
        }
        output.require_success()?;
        Ok(true)
    })?;
    vm.run([
        "sh",
        "-c",
        &many("barlink-guest --cache auto info >/dev/null"),
    ])?
    .require_success()
}

#[test]
fn low_bar_denies_write_back_with_cause() -> Result<()> {
    let broker = broker()?;
    let vm = boot_with(&on_the_root_bus(&broker)?)?;
    modes_are_what_is_granted(&broker, &vm, false)?;
    let info = info(&vm, "auto")?;
    let speeds = &info["choice"]["speeds"];
    assert_eq!(speeds["write-back"], json!(null), "not granted");
    ensure!(speeds["noncached"].as_f64() > Some(0.0), "{info}");
    assert_eq!(info["cache"]["cause"], json!(null));
    let text = vm
        .run(["barlink-guest", "--cache", "write-back", "info"])?
        .success()?;
    ensure!(
        text.contains("cache mode   asked write-back, granted uncached-minus"),
        "{text}"
    );
    ensure!(
        text.contains("lies below 4 GiB") && text.contains("pref64-reserve=8G"),
        "{text}"
    );
    Ok(())
}

#[test]
fn each_cure_grants_write_back() -> Result<()> {
    let broker = broker()?;
    let cure = Shortfall::BelowFourGib { address: 0 }.cure();
    let quoted: Vec<_> = cure.split('`').skip(1).step_by(2).collect();
    let &[port, bus, _] = quoted.as_slice() else {
        anyhow::bail!("no arguments in {cure}");
    };
    ensure!(cure.contains("3 GiB of RAM"));
    let (bus_name, bus) = bus.split_once('=').context("no bus")?;

    let low = on_the_root_bus(&broker)?;
    let mut high = low.clone();
    let device = high.arguments.last_mut().context("no device")?;
    *device = match device.strip_suffix('}') {
        Some(json) => format!("{json},\"{bus_name}\":\"{bus}\"}}"),
        None => format!("{device},{bus_name}={bus}"),
    };
    let port = port.split_whitespace().map(str::to_owned);
    high.arguments.splice(0..0, port);
    let large = Config {
        memory_mib: 3072,
        ..low
    };
    for config in [high, large] {
        let vm = boot_with(&config)?;
        let info = info(&vm, "write-back")?;
        assert_eq!(info["cache"]["granted"], "write-back", "{info}");
        drop(vm);
        wait_until("the slot is free", || {
            Ok(broker.inspect()?["broker"]["slots"][0]["vm"].is_null())
        })?;
    }
    Ok(())
}

/// Shows that the granted mode holds until the last mapping is gone, even after the process that
/// asked for it has ended.
#[test]
fn cache_mode_lasts_until_last_mapping_ends() -> Result<()> {
    let broker = broker()?;
    let vm = guest(&broker)?;
    let first = vm.spawn(["barlink-guest", "--cache", "write-combining", "recv"])?;
    wait_for_holder(&broker, "down", "consumer", true)?;
    let second = vm.spawn(["barlink-guest", "send"])?;
    wait_for_holder(&broker, "up", "producer", true)?;
    first.kill(Signal::KILL)?;
    wait_for_holder(&broker, "down", "consumer", false)?;
    let asked = || Ok::<_, anyhow::Error>(broker.inspect()?["guests"][0]["cache"]["asked"].clone());
    assert_eq!(asked()?, "write-combining");
    let refused = vm.run(["barlink-guest", "--cache", "write-back", "poke", "x"])?;
    assert_eq!(refused.status, Status::Code(4));
    second.kill(Signal::KILL)?;
    wait_until("nothing is mapped", || Ok(asked()?.is_null()))?;
    assert_eq!(info(&vm, "write-back")?["cache_mode"], "write-back");
    Ok(())
}
