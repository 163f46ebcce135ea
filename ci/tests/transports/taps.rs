// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Taps in a guest and on the host. Those of the example `watch`, which is one program for both,
//! wait by their descriptors, as an event loop does.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use barlink_agent::Status;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::broker::Broker;
use barlink_vm::{COMMAND_TIMEOUT, Process, Vm};
use barlink_vm_tests::{LIMIT, run};

use super::TRANSPORT;
use crate::support::*;

/// A channel with a consumer and one without, each way.
const CHANNELS: [&str; 4] = [
    "--channel=down=down,64K",
    "--channel=settings=host-taps,64K,overwrite",
    "--channel=up=up,64K",
    "--channel=camera=0-taps,64K,overwrite",
];

/// Longest time between two looks of a tap in the first seconds without a record, in milliseconds.
const LONGEST_LOOK: u128 = 10;
/// Looks of a tap before it waits that long, and wake-ups for other reasons.
const FIRST_LOOKS: u128 = 20;

/// A shell script that stops the example while it waits in `poll` or `ppoll`, unbinds its device,
/// and continues it. A process that was stopped between two system calls would access the memory of
/// a device that is gone.
const UNBIND_IN_POLL: &str = "\
pid=$(pidof watch) && \
until kill -STOP $pid && sleep 0.1 && grep -qE '^(7|271) ' /proc/$pid/syscall; do \
kill -CONT $pid && sleep 0.1; done && ";

/// The input of a sender, which is part of a stream for each write.
trait Input {
    fn write(&mut self, bytes: &[u8]) -> Result<()>;
    /// Ends the stream.
    fn close(self) -> Result<()>;
}

impl Input for ChildStdin {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.write_all(bytes)?)
    }

    fn close(self) -> Result<()> {
        drop(self);
        Ok(())
    }
}

impl Input for Process {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        Process::write(self, bytes)
    }

    fn close(self) -> Result<()> {
        self.close_stdin()?;
        self.wait(COMMAND_TIMEOUT)?.require_success()
    }
}

/// Sends into each channel in turn, and checks that the watcher prints each record before the next
/// one is sent. Then checks that the watcher sleeps between its looks, and ends the streams.
/// `status` returns the text of its `/proc/PID/status`.
fn watch_streams(
    senders: impl IntoIterator<Item = (&'static str, impl Input)>,
    mut line: impl FnMut() -> Result<String>,
    status: impl Fn() -> Result<String>,
) -> Result<()> {
    let mut senders: Vec<_> = senders.into_iter().collect();
    let mut expect = |expected: String| {
        let line = line()?;
        ensure!(line == expected, "{line}, not {expected}");
        Ok(())
    };
    expect(format!("watching {} channels", senders.len()))?;
    for number in 1..4 {
        for (channel, input) in &mut senders {
            input.write(&noise(number))?;
            if number == 1 {
                expect(format!("{channel}: record 0, 0 bytes"))?;
            }
            expect(format!("{channel}: record {number}, {number} bytes"))?;
        }
    }
    let (start, before) = (Instant::now(), sleeps(&status()?)?);
    thread::sleep(Duration::from_secs(1));
    let slept = u128::from(sleeps(&status()?)? - before);
    let most = start.elapsed().as_millis() / LONGEST_LOOK + FIRST_LOOKS;
    let most = most * senders.len() as u128;
    // A watcher whose descriptors stay readable never sleeps.
    ensure!((10..=most).contains(&slept), "{slept} sleeps of {most}");
    for (channel, input) in senders {
        input.close()?;
        expect(format!("{channel}: end, 0 missed"))?;
    }
    Ok(())
}

/// Shows the records of a channel by taps in the guest, which open the device for reading only,
/// before a receiver takes the same records.
#[test]
fn taps_in_guest_consume_no_record() -> Result<()> {
    let channels = ["up=up,64K", "down=down,64K", "camera=up,64K,overwrite"];
    let args = channels.map(|channel| format!("--channel={channel}"));
    let (broker, vm) = start(TRANSPORT, &args.each_ref().map(String::as_str))?;
    send(&broker, "down", b"first")?;
    let tail = || vm.spawn(["barlink-guest", "tail", "down", "--latest", "-n", "4"]);
    let tails = [tail()?, tail()?];
    let expect = |ending: &str| -> Result<()> {
        for tail in &tails {
            let line = tail.next_line(COMMAND_TIMEOUT)?;
            let line = line.context("the tap has ended")?;
            ensure!(line.trim_end().ends_with(ending), "{line}, not {ending}");
        }
        Ok(())
    };
    expect(" end 2 0")?;
    send(&broker, "down", b"second")?;
    expect(" begin 3 0")?;
    expect(" data 4 6 \"second\"")?;
    expect(" end 5 0")?;
    for tail in &tails {
        tail.wait(COMMAND_TIMEOUT)?.require_success()?;
    }
    for text in ["first", "second"] {
        let received = vm.run(["barlink-guest", "recv"])?.success()?;
        ensure!(received == text, "{received}, not {text}");
    }
    overwrite(&broker, &vm)
}

/// Overwrites the channel `camera` from the guest, without a receiver. Taps on both sides find the
/// newest record.
fn overwrite(broker: &Broker, vm: &Vm) -> Result<()> {
    vm.put_file("/tmp/file", &noise(300_000))?;
    vm.run(["barlink-guest", "send", "--channel", "camera", "/tmp/file"])?
        .require_success()?;
    let refused = vm.run(["barlink-guest", "recv", "--channel", "camera"])?;
    let text = String::from_utf8_lossy(&refused.stderr);
    ensure!(text.contains("channel `camera` has no consumer"), "{text}");
    let tail = ["tail", "camera", "--latest", "-n", "1"];
    let in_guest = vm
        .run(["barlink-guest"].into_iter().chain(tail))?
        .success()?;
    let on_host = run(&mut broker.app(tail), "the tap")?;
    let on_host = String::from_utf8(on_host.stdout)?;
    ensure!(in_guest == on_host, "{in_guest}, not {on_host}");
    let newest = in_guest.split(' ').skip(1).collect::<Vec<_>>();
    ensure!(newest.first() == Some(&"end"), "{in_guest}");
    Ok(())
}

#[test]
fn guest_waits_by_descriptors_of_taps() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &CHANNELS)?;
    let watched = ["down", "settings"];
    let command = ["watch", "/dev/barlink0"].into_iter().chain(watched);
    let watch = vm.spawn(command.clone())?;
    let mut senders = Vec::new();
    let inputs = watched.map(|channel| {
        let mut app = broker.app(["send", "--channel", channel]);
        let mut sender = App::start(app.stdin(Stdio::piped()))?;
        let input = sender.stdin.take().context("no input")?;
        senders.push(sender);
        anyhow::Ok((channel, input))
    });
    let inputs = inputs.into_iter().collect::<Result<Vec<_>>>()?;
    let line = || {
        let line = watch.next_line(COMMAND_TIMEOUT)?;
        line.context("the watcher has ended")
    };
    let status = "cat /proc/$(pidof watch)/status";
    watch_streams(inputs, line, || vm.run(["sh", "-c", status])?.success())?;
    watch.wait(COMMAND_TIMEOUT)?.require_success()?;
    for mut sender in senders {
        ensure!(wait_for_end(&mut sender, "the sender")?.success());
    }
    removal_ends_a_watcher(&vm, &vm.spawn(command)?)
}

/// Unbinds the device of a watcher that waits. Its next look finds that, and no signal ends it.
fn removal_ends_a_watcher(vm: &Vm, watch: &Process) -> Result<()> {
    watch.wait_for("watching", COMMAND_TIMEOUT)?;
    let script = format!("{UNBIND_IN_POLL} ({UNBIND}); kill -CONT $pid");
    vm.run(["sh", "-c", &script])?.require_success()?;
    let ended = watch.wait(COMMAND_TIMEOUT)?;
    let errors = String::from_utf8(ended.stderr)?;
    ensure!(
        ended.status == Status::Code(1) && errors.contains("Error: the device"),
        "{:?}: {errors}",
        ended.status
    );
    Ok(())
}

#[test]
fn host_waits_by_descriptors_of_taps() -> Result<()> {
    let (broker, vm) = start(TRANSPORT, &CHANNELS)?;
    let watched = ["up", "camera"];
    let mut watch = Command::new(Artifacts::shared()?.guest("watch")?);
    watch.arg(broker.control()).args(watched);
    let mut watch = App::start(watch.stdout(Stdio::piped()))?;
    let output = BufReader::new(watch.stdout.take().context("no output")?);
    let (sender, lines) = mpsc::channel();
    // The thread ends with the watcher or with the test.
    thread::spawn(move || output.lines().try_for_each(|line| sender.send(line).ok()));
    let inputs = watched.map(|channel| {
        let sender = vm.spawn(["barlink-guest", "send", "--channel", channel]);
        anyhow::Ok((channel, sender?))
    });
    let inputs = inputs.into_iter().collect::<Result<Vec<_>>>()?;
    let status = format!("/proc/{}/status", watch.id());
    watch_streams(
        inputs,
        || Ok(lines.recv_timeout(LIMIT)??),
        || Ok(fs::read_to_string(&status)?),
    )?;
    ensure!(wait_for_end(&mut watch, "the watcher")?.success());
    Ok(())
}
