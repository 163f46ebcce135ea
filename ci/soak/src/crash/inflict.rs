// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Doing a fault, and what an operator would do after it: start again what has ended.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use barlink_crash_load::{Note, Point};
use barlink_protocol::wire::layout::End;
use rustix::process::Signal;
use serde_json::{Map, Value, json};

use super::fault::{Fault, Role};
use super::scene::{LOOK, PATIENCE, Scene};
use super::watch::CHANNELS;
use barlink_vm::COMMAND_TIMEOUT;
use barlink_vm::broker::{Broker, Transport};

/// How often the broker is killed, or replaced, while the guest rings, and the longest time before each. A kill within a message
/// takes five seconds.
const KILLS: usize = 3;
const REPLACEMENTS: usize = 10;
const MOMENT: Duration = Duration::from_millis(50);

impl Scene<'_> {
    /// Does what has to be done before a fault can be, which is none by itself.
    pub fn prepare(&mut self, fault: Fault) -> Result<()> {
        if fault.needs_acpi() && self.has_slept {
            self.interrupt(Self::reset)?;
        }
        Ok(())
    }

    /// Does a fault, and gives the time from there until a record came through that was committed later, in each
    /// direction that the fault was in; after one of the broker, until it also told a host app who is there.
    pub fn inflict(&mut self, fault: Fault) -> Result<Duration> {
        match fault {
            Fault::Killed(role) => {
                let start = Instant::now();
                self.worker(role)?.kill()?;
                self.go_on(start, role)
            }
            Fault::KilledAt(role, point) => {
                let start = self.spring(role, point)?;
                self.worker(role)?.wait_killed()?;
                self.go_on(start, role)
            }
            Fault::BothKilled(role) => {
                let start = Instant::now();
                self.worker(role)?.kill()?;
                self.worker(role.other())?.kill()?;
                let mark = self.watch().mark(&[role.channel()]);
                self.start(role)?;
                self.start(role.other())?;
                self.wait_beyond(&mark)?;
                Ok(start.elapsed())
            }
            Fault::DriverReloaded => self.interrupt(|scene| {
                // While it is in use it cannot be unloaded.
                Self::guest().try_for_each(|role| scene.worker(role)?.kill())?;
                scene.vm()?.run(["rmmod", "barlink"])?.require_success()?;
                scene.load_driver()
            }),
            Fault::DeviceUnbound => self.interrupt(|scene| {
                let driver = scene.shell("readlink -f /sys/class/misc/barlink0/device/driver")?;
                let device =
                    scene.shell("basename $(readlink -f /sys/class/misc/barlink0/device)")?;
                scene.shell(&format!("echo {device} >{driver}/unbind"))?;
                Self::guest().try_for_each(|role| scene.worker(role)?.wait_gone())?;
                scene.shell(&format!("echo {device} >{driver}/bind"))?;
                Ok(())
            }),
            Fault::DeviceUnplugged => self.interrupt(Self::unplug_and_plug),
            Fault::GuestSuspended => {
                let start = Instant::now();
                self.suspend()?;
                self.wait_until_all_flow()?;
                Ok(start.elapsed())
            }
            Fault::GuestReset => self.interrupt(Self::reset),
            Fault::QemuKilled => self.interrupt(|scene| {
                drop(scene.vm.take());
                scene.boot()
            }),
            Fault::BrokerKilled => {
                let roll = self.roll()?;
                let start = Instant::now();
                self.broker.kill()?;
                // What flows over ivshmem needs no broker. Over vfio-user a guest that rings waits for the next one.
                if self.transport == Transport::Ivshmem {
                    self.wait_until_all_flow()?;
                }
                self.broker.start_again()?;
                self.is_as_before(&roll)?;
                Ok(start.elapsed())
            }
            Fault::BrokerAndEndKilled(role) => {
                let start = Instant::now();
                self.broker.kill()?;
                self.worker(role)?.kill()?;
                self.broker.start_again()?;
                self.go_on(start, role)
            }
            Fault::BrokerReplaced => {
                let roll = self.roll()?;
                let start = Instant::now();
                self.broker.replace()?;
                self.is_as_before(&roll)?;
                Ok(start.elapsed())
            }
            Fault::BrokerKilledAmidRings => self.amid_rings(KILLS, |broker| {
                broker.kill()?;
                broker.start_again()
            }),
            Fault::BrokerReplacedAmidRings => self.amid_rings(REPLACEMENTS, Broker::replace),
        }
    }

    /// Changes the broker so many times while a process in the guest rings without a pause, so that mostly a message is under
    /// way, and gives the longest time until rings went on.
    fn amid_rings(
        &mut self,
        times: usize,
        change: fn(&mut Broker) -> Result<()>,
    ) -> Result<Duration> {
        let roll = self.roll()?;
        let ringing = self.start_ringing()?;
        self.wait_until_rings_go()?;
        let mut longest = Duration::ZERO;
        for _ in 0..times {
            thread::sleep(MOMENT.mul_f64(self.random.below(1000) as f64 / 1000.0));
            let start = Instant::now();
            change(&mut self.broker)?;
            self.wait_until_rings_go()?;
            longest = longest.max(start.elapsed());
        }
        ringing.kill(Signal::KILL)?;
        ringing.wait(COMMAND_TIMEOUT)?;
        self.is_as_before(&roll)?;
        Ok(longest)
    }

    /// Starts an end that was killed, and waits for records in its direction.
    fn go_on(&mut self, start: Instant, role: Role) -> Result<Duration> {
        let mark = self.watch().mark(&[role.channel()]);
        self.start(role)?;
        self.wait_beyond(&mark)?;
        Ok(start.elapsed())
    }

    /// Does something that ends the guest's part, starts that again, and waits for records in both directions.
    fn interrupt(&mut self, fault: impl FnOnce(&mut Self) -> Result<()>) -> Result<Duration> {
        let start = Instant::now();
        fault(self)?;
        let mark = self.watch().mark(&CHANNELS);
        self.start_guest()?;
        self.wait_beyond(&mark)?;
        Ok(start.elapsed())
    }

    /// Has an end die at a point, and gives the time when it did.
    fn spring(&mut self, role: Role, point: Point) -> Result<Instant> {
        let note = match role.end {
            End::Producer => Note::ProducerTrap,
            End::Consumer => Note::ConsumerTrap,
        };
        let notes = self.watch().notes(role.channel())?.clone();
        notes.write(note, point as u64);
        let start = Instant::now();
        while notes.read(note) != 0 {
            ensure!(
                start.elapsed() < PATIENCE,
                "the {role} does not come to {point:?}; {}",
                self.watch().told()
            );
            thread::sleep(LOOK);
        }
        Ok(Instant::now())
    }

    /// Runs a shell command in the guest.
    fn shell(&self, command: &str) -> Result<String> {
        let output = self.vm()?.run(["sh", "-c", command])?;
        Ok(output.success()?.trim_end().to_owned())
    }

    fn unplug_and_plug(&mut self) -> Result<()> {
        let device = self.device()?;
        let text = |name: &str| device[name].as_str().context("the device has no such name");
        let (id, chardev) = (text("id")?, text("chardev")?);
        self.vm()?.unplug(id)?;
        Self::guest().try_for_each(|role| self.worker(role)?.wait_gone())?;
        let vm = self.vm()?;
        // QEMU's connection has told all that it will ever tell: with the old one, a new device waits for ever.
        vm.qmp("chardev-remove", &json!({ "id": chardev }))?;
        let address = json!({ "type": "unix", "data": { "path": self.broker.socket(0) } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        vm.qmp("chardev-add", &json!({ "id": chardev, "backend": backend }))?;
        vm.plug(&device)
    }

    /// The device, as `device_add` takes it: what `barlink qemu-args` prints as QEMU's argument.
    fn device(&self) -> Result<Value> {
        let arguments = self.broker.arguments(0)?;
        let device = arguments.iter().rfind(|word| !word.starts_with('-'));
        let device = device.context("qemu-args prints nothing")?;
        let (driver, properties) = device.split_once(',').context("no properties")?;
        let mut object = Map::new();
        object.insert("driver".to_owned(), driver.into());
        for property in properties.split(',') {
            let (name, value) = property.split_once('=').context("no value")?;
            let value = match value.parse::<u64>() {
                Ok(number) => number.into(),
                Err(_) => value.into(),
            };
            object.insert(name.to_owned(), value);
        }
        Ok(object.into())
    }

    /// Who is there, by the broker's own knowledge, as a host app is told that comes now.
    fn roll(&self) -> Result<Value> {
        let status = self.broker.inspect()?["broker"].take();
        let roll = json!({ "slots": status["slots"], "claims": status["claims"] });
        let claims = roll["claims"].as_array().map(Vec::len);
        ensure!(claims == Some(2), "two ends are on the host: {roll}");
        ensure!(!roll["slots"][0]["vm"].is_null(), "the VM is there: {roll}");
        Ok(roll)
    }

    /// An error unless the broker knows all that its predecessor knew, and the streams flow.
    fn is_as_before(&mut self, roll: &Value) -> Result<()> {
        let now = self.roll()?;
        ensure!(now == *roll, "who is there changed: {roll} and {now}");
        self.wait_until_all_flow()
    }
}
