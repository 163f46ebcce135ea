// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Causes a fault, and does the work of an operator after it: starts again all that has ended.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use barlink_crash_load::{Note, Point};
use barlink_protocol::wire::layout::End;
use rustix::process::Signal;
use serde_json::{Map, Value, json};

use super::fault::{Fault, Role, Side};
use super::scene::{LOOK, Scene, TIMEOUT};
use super::watch::CHANNELS;
use barlink_vm::COMMAND_TIMEOUT;
use barlink_vm::broker::{Broker, Transport};

/// Number of kills and of replacements of the broker while the guest rings, and the longest time
/// before each. There are fewer kills, because a kill within a message takes five seconds.
const KILLS: usize = 3;
const REPLACEMENTS: usize = 10;
const MOMENT: Duration = Duration::from_millis(50);

impl Scene<'_> {
    /// Does the steps that a fault needs before it. They are not part of the fault.
    pub fn prepare(&mut self, fault: Fault) -> Result<()> {
        if fault.needs_acpi() && self.has_slept {
            self.interrupt(Self::reset)?;
        }
        Ok(())
    }

    /// Causes a fault, and returns the time of the recovery: until a record that was committed
    /// later has come through, in each direction that the fault affects. After a fault of the
    /// broker it is the time until the broker also answers a host app.
    pub fn inflict(&mut self, fault: Fault) -> Result<Duration> {
        match fault {
            Fault::Killed(role) => {
                let start = Instant::now();
                self.worker(role)?.kill()?;
                self.wait_for_newest(role)?;
                self.go_on(start, role)
            }
            Fault::KilledAt(role, point) => {
                let start = self.spring(role, point)?;
                self.worker(role)?.wait_killed()?;
                self.wait_for_newest(role)?;
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
                // The driver cannot be unloaded while it is in use.
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
                // Streams over ivshmem need no broker. Over vfio-user a guest that rings waits for
                // the next broker.
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
            Fault::TapKilled(side) => self.kill_tap(side),
            Fault::ChannelReset(channel) => self.reset_by_force(channel),
            Fault::ChannelAdded => self.add_channel(),
            Fault::BrokerKilledAmidAdding => self.kill_amid_adding(),
            Fault::BrokerKilledAmidRings => self.amid_rings(KILLS, |broker| {
                broker.kill()?;
                broker.start_again()
            }),
            Fault::BrokerReplacedAmidRings => self.amid_rings(REPLACEMENTS, Broker::replace),
        }
    }

    /// Changes the broker this many times while a process in the guest rings without a pause, so
    /// that usually a message is under way. Returns the longest time until rings were answered
    /// again.
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
            thread::sleep(self.moment(MOMENT));
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

    /// Runs a fault that ends the guest's ends, starts these again, and waits for records in both
    /// directions.
    fn interrupt(&mut self, fault: impl FnOnce(&mut Self) -> Result<()>) -> Result<Duration> {
        let start = Instant::now();
        fault(self)?;
        let mark = self.watch().mark(&CHANNELS);
        self.start_guest()?;
        self.wait_beyond(&mark)?;
        Ok(start.elapsed())
    }

    /// Makes an end die at a point, and returns the time of its death.
    fn spring(&mut self, role: Role, point: Point) -> Result<Instant> {
        let note = match role.end {
            End::Producer => Note::ProducerTrap,
            End::Consumer => Note::ConsumerTrap,
        };
        let notes = self.watch().channel(role.channel())?.notes.clone();
        notes.write(note, point as u64);
        let start = Instant::now();
        while notes.read(note) != 0 {
            ensure!(
                start.elapsed() < TIMEOUT,
                "the {role} does not come to {point:?}; {}",
                self.watch().describe()
            );
            thread::sleep(LOOK);
        }
        Ok(Instant::now())
    }

    /// Runs a shell command in the guest, and returns its output.
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
        // The old connection has already delivered its handshake, so a new device on it would wait
        // for ever.
        vm.qmp("chardev-remove", &json!({ "id": chardev }))?;
        let address = json!({ "type": "unix", "data": { "path": self.broker.socket(0) } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        vm.qmp("chardev-add", &json!({ "id": chardev, "backend": backend }))?;
        vm.plug(&device)
    }

    /// Returns the device as `device_add` takes it, from the argument that `barlink qemu-args`
    /// prints.
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

    /// Returns the slots and claims as the broker reports them to a new host app. Checks that the
    /// VM and all ends on the host are there.
    pub(super) fn roll(&self) -> Result<Value> {
        let status = self.broker.inspect()?["broker"].take();
        let roll = json!({ "slots": status["slots"], "claims": status["claims"] });
        let claims = roll["claims"].as_array().map(Vec::len);
        let ends = Role::ALL.iter().filter(|role| role.side == Side::Host);
        let ends = ends.count();
        ensure!(claims == Some(ends), "{ends} ends are on the host: {roll}");
        ensure!(!roll["slots"][0]["vm"].is_null(), "the VM is there: {roll}");
        Ok(roll)
    }

    /// Returns an error unless the broker knows all that its predecessor knew, and the streams
    /// flow.
    pub(super) fn is_as_before(&mut self, roll: &Value) -> Result<()> {
        let now = self.roll()?;
        ensure!(now == *roll, "who is there changed: {roll} and {now}");
        self.wait_until_all_flow()
    }
}
