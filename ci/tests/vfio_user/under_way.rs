// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A broker that is replaced or killed while it exchanges messages with the VM.
//! `docs/transports.md` describes the consequences to users.

use std::fs;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use rustix::io::ioctl_fionread;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::relay::Half;
use super::*;

/// A vector of the host, and the value that rings it when it is written to the doorbell.
const VECTOR: u32 = 3;
const RING: u32 = HOST << 16 | VECTOR;

/// Time for which QEMU waits for an answer (`x-msg-timeout`).
const QEMU_TIMEOUT: Duration = Duration::from_secs(5);

fn doorbell(device: &PciDevice) -> u64 {
    device.bars[0].0 + 12
}

/// Waits for a thread, and returns its result. The thread ends by itself, because each access to
/// the machine has a limit.
fn ended<T>(thread: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    let outcome = thread.join();
    outcome.map_err(|_| anyhow::anyhow!("a thread panicked"))?
}

/// A thread that rings without a pause until this is dropped.
struct Ringing<'scope, 'a> {
    rung: &'a Rung,
    thread: Option<ScopedJoinHandle<'scope, Result<()>>>,
}

/// The count of rings of [`Ringing`], and its order to stop.
#[derive(Default)]
struct Rung {
    count: AtomicU64,
    stop: AtomicBool,
}

impl<'scope, 'a: 'scope> Ringing<'scope, 'a> {
    fn start(
        scope: &'scope Scope<'scope, '_>,
        machine: &'a mut Bare,
        device: &'a PciDevice,
        rung: &'a Rung,
    ) -> Self {
        let thread = scope.spawn(move || {
            while !rung.stop.load(Ordering::Relaxed) {
                machine.write(doorbell(device), RING)?;
                rung.count.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let thread = Some(thread);
        Self { rung, thread }
    }

    /// Waits for this many more rings.
    fn go_on(&self, times: u64) -> Result<()> {
        let count = || self.rung.count.load(Ordering::Relaxed);
        let wanted = count() + times;
        let thread = self.thread.as_ref();
        wait_until("the VM rings on", || {
            let ends = thread.is_none_or(ScopedJoinHandle::is_finished);
            ensure!(!ends, "the VM rings no more");
            Ok(count() >= wanted)
        })
    }

    /// Stops the thread, and returns the count of its rings.
    fn end(mut self) -> Result<u64> {
        self.rung.stop.store(true, Ordering::Relaxed);
        self.thread.take().map_or(Ok(()), ended)?;
        Ok(self.rung.count.load(Ordering::Relaxed))
    }
}

impl Drop for Ringing<'_, '_> {
    fn drop(&mut self) {
        self.rung.stop.store(true, Ordering::Relaxed);
    }
}

pub fn replacement_delivers_each_ring_once(executor: Executor) -> Result<()> {
    const TIMES: u64 = 10;
    let mut setting = Setting::new(executor, "1M")?;
    // On a busy host a replacement can take longer than the timeout, which is another matter.
    let mut config = setting.config()?;
    lengthen_timeout(&mut config);
    let (mut machine, device) = setting.started(&config)?;
    // The register of the interrupt line is stored only in the broker: QEMU has no copy of it.
    machine.write(device.config + 0x3c, 0x5a)?;
    setting.tap.rings(HOST, VECTOR)?;
    let rings = Rung::default();
    let broker = &mut setting.broker;
    let rung = thread::scope(|scope| {
        let ringing = Ringing::start(scope, &mut machine, &device, &rings);
        for time in 0..TIMES {
            ringing.go_on(20)?;
            // The delay differs in each round, so that the broker is replaced at another moment of
            // an exchange.
            thread::sleep(Duration::from_micros(1_237 * time));
            broker.replace()?;
        }
        ringing.end()
    })?;
    println!("{rung} rings while {TIMES} brokers took over");
    assert_eq!(setting.tap.rings(HOST, VECTOR)?, rung);
    assert_eq!(machine.read(device.config + 0x3c)? & 0xff, 0x5a);
    assert_eq!(machine.errors()?, "");
    Ok(())
}

/// Returns whether a connection of the broker to the VM of slot 0 holds bytes that the broker has
/// not read. Those of host apps do not count.
fn has_unread_bytes(broker: &Broker) -> Result<bool> {
    let (process, path) = (broker.process(), broker.socket(0));
    let pid = Pid::from_raw(process.cast_signed()).context("a process has no number")?;
    let descriptor = pidfd_open(pid, PidfdFlags::empty())?;
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let entry = entry?;
        if !fs::read_link(entry.path())?
            .to_string_lossy()
            .starts_with("socket:")
        {
            continue;
        }
        let number = entry.file_name().to_string_lossy().parse()?;
        let socket = pidfd_getfd(&descriptor, number, PidfdGetfdFlags::empty())?;
        let socket = UnixStream::from(socket);
        // A connection has the local address of the socket that accepted it.
        let address = socket.local_addr();
        let is_of_vm = address.is_ok_and(|address| address.as_pathname() == Some(&*path));
        // A socket that listens has no bytes.
        if is_of_vm && ioctl_fionread(&socket).is_ok_and(|bytes| bytes > 0) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Shows a limit of QEMU 11.1: it ends when reading from its server fails (`vfio_user_recv_hdr`
/// sets an error twice). Reading fails once a broker is killed that had unread bytes.
pub fn broker_killed_with_unread_message_ends_qemu(executor: Executor) -> Result<()> {
    let ring = |machine: &mut Bare, device: &PciDevice| machine.write(doorbell(device), RING);
    let reset =
        |machine: &mut Bare, _: &PciDevice| machine.qmp("system_reset", &json!({})).map(drop);
    let acts: [fn(&mut Bare, &PciDevice) -> Result<()>; 2] = [ring, reset];
    for act in acts {
        let mut setting = Setting::new(executor, "1M")?;
        let direct = Config {
            arguments: setting.broker.arguments(0)?,
            ..setting.config()?
        };
        let (mut machine, device) = setting.started(&direct)?;
        let mut app = setting.broker.app(["recv"]);
        let mut app = App::start(app.stdout(Stdio::null()).stderr(Stdio::null()))?;
        wait_until("the host app is there", || {
            let claims = setting.broker.inspect()?["broker"]["claims"].take();
            Ok(claims.as_array().is_some_and(|claims| claims.len() == 1))
        })?;
        let broker = &mut setting.broker;
        broker.signal(Signal::STOP)?;
        thread::scope(|scope| {
            // The thread ends with QEMU.
            scope.spawn(|| act(&mut machine, &device));
            let is_sent = wait_until("QEMU sends a message", || has_unread_bytes(broker));
            broker.kill()?;
            is_sent
        })?;
        assert!(!machine.end()?.success());
        assert_eq!(app.try_wait()?, None, "the host app goes on");
        let refused = broker.inspect();
        let error = format!("{:#}", refused.expect_err("a broker answers"));
        assert!(error.contains("no broker"), "{error}");
        // A broker that is started now has a new region, and serves the next VM.
        broker.start_again()?;
        let (mut next, device) = setting.started(&direct)?;
        next.write(doorbell(&device), RING)?;
        let magic = next.read(device.bars[0].0 + 0x10)?;
        assert_eq!(magic, REGISTERS_MAGIC);
        assert_eq!(next.errors()?, "");
    }
    Ok(())
}

/// Kills a broker without a service manager, so that the connection ends with it.
pub fn vm_survives_missing_reply_from_killed_broker(executor: Executor) -> Result<()> {
    let mut setting = Setting::new(executor, "1M")?;
    let (mut machine, device) = setting.machine()?;
    setting.relay.keep(Half::Answer, WRITE);
    let start = Instant::now();
    let (relay, broker) = (&setting.relay, &mut setting.broker);
    thread::scope(|scope| {
        let ringing = scope.spawn(|| machine.write(doorbell(&device), RING));
        wait_until("the answer is kept", || Ok(relay.has_kept()))?;
        broker.kill()?;
        ended(ringing)
    })?;
    let waited = start.elapsed();
    assert!(waited > QEMU_TIMEOUT.mul_f64(0.9), "only {waited:?}");
    // QEMU waits for no more answers. With a wait for each of these rings it would take several
    // times as long.
    const MORE: u32 = 10;
    let start = Instant::now();
    let (registers, region) = (device.bars[0].0, device.bars[2].0);
    for _ in 0..MORE {
        machine.write(doorbell(&device), RING)?;
        assert_eq!(machine.read(registers + 8)?, u32::MAX);
    }
    assert!(start.elapsed() < MORE * QEMU_TIMEOUT);
    machine.write(region + 4096, 0x600d_600d)?;
    assert_eq!(machine.read(region + 4096)?, 0x600d_600d);
    Ok(())
}

/// Kills a broker with a service manager. The connection stays open, and only the unanswered
/// message can be lost.
pub fn unanswered_message_delays_qemu_five_seconds(_: Executor) -> Result<()> {
    let exchanges = [
        (Half::Message, WRITE),
        (Half::Answer, WRITE),
        (Half::Message, RESET),
        (Half::Answer, UNMAP),
    ];
    thread::scope(|scope| {
        let threads = exchanges.map(|(half, command)| {
            scope.spawn(move || {
                let outcome = kill_within_a_reset(half, command);
                outcome.with_context(|| format!("{half:?} of {command}"))
            })
        });
        let all = threads.into_iter().map(ended);
        all.collect::<Result<Vec<()>>>().map(drop)
    })
}

fn kill_within_a_reset(half: Half, command: u16) -> Result<()> {
    let mut setting = Setting::managed()?;
    let (mut machine, device) = setting.machine()?;
    enable_interrupts(&mut machine, &device)?;
    setting.relay.keep(half, command);
    let start = Instant::now();
    machine.qmp("system_reset", &json!({}))?;
    wait_until("half of the exchange is kept", || {
        Ok(setting.relay.has_kept())
    })?;
    setting.broker.kill()?;
    setting.broker.start_again()?;
    ensure!(machine.qmp("query-status", &json!({}))?["running"] == true);
    let waited = start.elapsed();
    ensure!(waited > QEMU_TIMEOUT.mul_f64(0.9), "only {waited:?}");
    ensure!(machine.errors()?.contains("timed out"));
    // The firmware sets the device up again, and rings work both ways as before.
    machine.wait_for_firmware(2)?;
    let device = machine.device("barlink0")?;
    enable_interrupts(&mut machine, &device)?;
    interrupt_comes(&setting, &mut machine, 2)?;
    setting.tap.rings(HOST, VECTOR)?;
    machine.write(doorbell(&device), RING)?;
    ensure!(setting.tap.rings(HOST, VECTOR)? == 1);
    Ok(())
}

pub fn lost_interrupt_setup_works_when_repeated(_: Executor) -> Result<()> {
    let mut setting = Setting::managed()?;
    let (mut machine, device) = setting.machine()?;
    setting.relay.keep(Half::Message, SET_IRQS);
    let (relay, broker) = (&setting.relay, &mut setting.broker);
    thread::scope(|scope| {
        let enabling = scope.spawn(|| enable_interrupts(&mut machine, &device));
        wait_until("the message is kept", || Ok(relay.has_kept()))?;
        broker.kill()?;
        broker.start_again()?;
        ended(enabling)
    })?;
    let errors = machine.errors()?;
    assert!(errors.contains("failed to enable vectors"), "{errors}");
    machine.fill(TARGET, 64, 0)?;
    setting.tap.ring(0, 2, 1)?;
    // The broker's session takes rings and messages in batches, and QEMU takes interrupts in its
    // main loop.
    for _ in 0..3 {
        pass_broker(&mut machine, &device)?;
        machine.qmp("query-status", &json!({}))?;
    }
    assert_eq!(machine.read(TARGET + 8)?, 0, "QEMU has given no eventfd");
    // A driver that is loaded again, or a guest that reboots, does the same.
    machine.write(device.config + 0x40, 0)?;
    enable_interrupts(&mut machine, &device)?;
    interrupt_comes(&setting, &mut machine, 2)
}

/// Stops a broker in good order. QEMU then reads the end of its connection and not an error,
/// because the broker has left no bytes unread.
pub fn vm_survives_broker_stopped_amid_rings(executor: Executor) -> Result<()> {
    for _ in 0..2 {
        let setting = Setting::new(executor, "1M")?;
        let direct = Config {
            arguments: setting.broker.arguments(0)?,
            ..setting.config()?
        };
        let (mut machine, device) = setting.started(&direct)?;
        let rings = Rung::default();
        thread::scope(|scope| {
            let ringing = Ringing::start(scope, &mut machine, &device, &rings);
            ringing.go_on(20)?;
            setting.broker.signal(Signal::INT)?;
            wait_until("the broker has ended", || {
                Ok(setting.broker.inspect().is_err())
            })?;
            ringing.end()
        })?;
        let region = device.bars[2].0;
        machine.write(region + 4096, 0x600d_600d)?;
        assert_eq!(machine.read(region + 4096)?, 0x600d_600d);
    }
    Ok(())
}

/// Time for which a message waits for a stopped broker: longer than QEMU waits.
const STOP: Duration = Duration::from_secs(7);

/// Rings while the broker is stopped with SIGSTOP for [`STOP`].
fn ring_stopped_broker(setting: &Setting, machine: &mut Bare, device: &PciDevice) -> Result<()> {
    setting.broker.signal(Signal::STOP)?;
    thread::scope(|scope| {
        let ringing = scope.spawn(|| machine.write(doorbell(device), RING));
        let broker = &setting.broker;
        let is_sent = wait_until("QEMU sends the ring", || has_unread_bytes(broker));
        thread::sleep(STOP);
        broker.signal(Signal::CONT)?;
        is_sent?;
        ended(ringing)
    })
}

/// Shows a limit of QEMU 11.1: an answer that comes after its timeout is no longer expected. QEMU
/// reads the answer's first half, takes the second half for a message, and reads no more.
pub fn late_answer_of_stopped_broker_ends_connection(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    let direct = Config {
        arguments: setting.broker.arguments(0)?,
        ..setting.config()?
    };
    let (mut machine, device) = setting.started(&direct)?;
    ring_stopped_broker(&setting, &mut machine, &device)?;
    // The VM runs on with its memory, and without registers and rings. The broker learns of the end
    // by its answer to the first of these, for which QEMU waits once more.
    let (registers, region) = (device.bars[0].0, device.bars[2].0);
    for _ in 0..5 {
        assert_eq!(machine.read(registers + 0x10)?, u32::MAX);
        machine.write(doorbell(&device), RING)?;
    }
    wait_until("the broker sees the VM leave", || {
        Ok(setting.broker.inspect()?["broker"]["slots"][0]["vm"].is_null())
    })?;
    let errors = machine.errors()?;
    for error in ["timed out waiting for reply", "unexpected reply"] {
        assert!(errors.contains(error), "no `{error}` in {errors}");
    }
    machine.write(region + 4096, 0x600d_600d)?;
    assert_eq!(machine.read(region + 4096)?, 0x600d_600d);
    drop(machine);
    // The broker serves the next VM.
    let (mut next, device) = setting.started(&direct)?;
    let magic = next.read(device.bars[0].0 + 0x10)?;
    assert_eq!(magic, REGISTERS_MAGIC);
    Ok(())
}

/// Shows the cure that `docs/transports.md` names.
pub fn longer_timeout_survives_stopped_broker(executor: Executor) -> Result<()> {
    let setting = Setting::new(executor, "1M")?;
    let mut patient = Config {
        arguments: setting.broker.arguments(0)?,
        ..setting.config()?
    };
    lengthen_timeout(&mut patient);
    let (mut machine, device) = setting.started(&patient)?;
    setting.tap.rings(HOST, VECTOR)?;
    ring_stopped_broker(&setting, &mut machine, &device)?;
    for _ in 0..5 {
        let magic = machine.read(device.bars[0].0 + 0x10)?;
        assert_eq!(magic, REGISTERS_MAGIC);
        machine.write(doorbell(&device), RING)?;
    }
    assert_eq!(setting.tap.rings(HOST, VECTOR)?, 6);
    assert_eq!(machine.errors()?, "");
    Ok(())
}
