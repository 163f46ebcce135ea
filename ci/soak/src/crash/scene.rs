// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The broker, the VM, and the four ends.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use barlink_crash_load::{Note, Random};
use barlink_driver_checks::complaint;
use barlink_protocol::wire::layout::End;

use super::fault::{Fault, Role, Side};
use super::watch::{BELL, CHANNELS, Mark, Watch};
use super::worker::Worker;
use barlink_sandbox::builds::{Artifacts, CRASH_LOAD};
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::{COMMAND_TIMEOUT, Process, Vm};

/// Small channels, so that they are often full and often wrap; and one that is only rung.
const ARGUMENTS: [&str; 6] = [
    "--channel",
    "down=down,16K",
    "--channel",
    "up=up,16K",
    "--channel",
    "bell=up,4K",
];

/// Rings that show that they go on: the one that was under way, and some that began later.
const RINGS: u64 = 3;

/// How often the notes are looked at.
pub(super) const LOOK: Duration = Duration::from_micros(500);

/// Looks at the notes for each look at the processes.
const LOOKS: u32 = 50;

/// How long a stream may stand still while everything is there that it needs.
pub(super) const PATIENCE: Duration = COMMAND_TIMEOUT;

/// What QEMU prints when the server of a vfio-user device does not answer.
const UNANSWERED: &str = "timed out";

/// See the module. The fields are dropped in this order.
pub struct Scene<'a> {
    workers: Vec<Worker>,
    pub(super) vm: Option<Vm>,
    watch: Watch,
    pub(super) broker: Broker,
    artifacts: &'a Artifacts,
    pub(super) transport: Transport,
    seed: u64,
    pub(super) random: Random,
    /// How often this VM's QEMU has waited in vain for an answer.
    unanswered: usize,
    /// Whether the guest was suspended since it booted.
    pub(super) has_slept: bool,
}

impl<'a> Scene<'a> {
    /// Starts all of it, the broker as a service if it is to be managed.
    pub fn set(
        artifacts: &'a Artifacts,
        transport: Transport,
        seed: u64,
        managed: bool,
    ) -> Result<Self> {
        let broker = match managed {
            true => Broker::start_managed(artifacts, transport, &ARGUMENTS)?,
            false => Broker::start_over(artifacts, &[transport], &ARGUMENTS)?,
        };
        let watch = Watch::new(&broker)?;
        let mut scene = Self {
            workers: Vec::new(),
            vm: None,
            watch,
            broker,
            artifacts,
            transport,
            seed,
            random: Random::new(seed),
            unanswered: 0,
            has_slept: false,
        };
        scene.boot()?;
        for role in Role::ALL {
            scene.start(role)?;
        }
        Ok(scene)
    }

    /// The notes and counters.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// The VM.
    pub fn vm(&self) -> Result<&Vm> {
        self.vm.as_ref().context("there is no VM")
    }

    /// One of the ends.
    pub fn worker(&mut self, role: Role) -> Result<&mut Worker> {
        let worker = self.workers.iter_mut().find(|worker| worker.role == role);
        worker.with_context(|| format!("there is no {role}"))
    }

    /// Boots a VM, with the driver loaded.
    pub fn boot(&mut self) -> Result<()> {
        self.vm = Some(Vm::boot_with(self.artifacts, &self.broker.vm()?)?);
        self.unanswered = 0;
        self.has_slept = false;
        self.load_driver()
    }

    /// Resets the guest, and loads the driver.
    pub fn reset(&mut self) -> Result<()> {
        self.vm()?.reset()?;
        self.has_slept = false;
        self.load_driver()
    }

    /// Has the guest suspend itself, and wakes it.
    pub fn suspend(&mut self) -> Result<()> {
        self.has_slept = true;
        self.vm()?.suspend()
    }

    /// Loads the driver.
    pub fn load_driver(&self) -> Result<()> {
        let loaded = self.vm()?.run(["insmod", "/lib/barlink.ko"])?;
        loaded.require_success()
    }

    /// Starts an end, in place of the one before.
    pub fn start(&mut self, role: Role) -> Result<()> {
        self.workers.retain(|worker| worker.role != role);
        let vm = self.vm.as_ref();
        let worker = Worker::start(role, self.artifacts, &self.broker, vm, self.seed)?;
        self.workers.push(worker);
        Ok(())
    }

    /// Starts a process in the guest that rings the host without a pause, until it is killed.
    pub fn start_ringing(&self) -> Result<Process> {
        let program = [CRASH_LOAD, "--device", "/dev/barlink0"];
        let argv = program.into_iter().chain(["ringer", BELL]);
        self.vm()?.spawn(argv)
    }

    /// Waits until the guest's rings are answered.
    pub fn wait_until_rings_go(&mut self) -> Result<()> {
        let since = self.watch.rung();
        self.wait_until("no ring is answered", |scene| {
            Ok(scene.watch.rung() >= since + RINGS)
        })
    }

    /// Starts the ends in the guest.
    pub fn start_guest(&mut self) -> Result<()> {
        Self::guest().try_for_each(|role| self.start(role))
    }

    /// The ends in the guest.
    pub fn guest() -> impl Iterator<Item = Role> {
        let all = Role::ALL.into_iter();
        all.filter(|role| role.side == Side::Guest)
    }

    /// Waits until records come through that are newer than a mark.
    pub fn wait_beyond(&mut self, mark: &Mark) -> Result<()> {
        self.wait_until("a stream stands still", |scene| {
            Ok(scene.watch.is_beyond(mark))
        })
    }

    /// Waits until new records come through in both directions.
    pub fn wait_until_all_flow(&mut self) -> Result<()> {
        self.wait_beyond(&self.watch.mark(&CHANNELS))
    }

    /// Waits until rings have woken every end.
    pub fn wait_until_all_are_woken(&mut self) -> Result<()> {
        let since = self.watch.woken();
        self.wait_until("an end is not woken", |scene| {
            Ok(scene.watch.all_were_woken(&since))
        })
    }

    /// Waits for something while all ends live.
    pub fn wait_until(
        &mut self,
        otherwise: &str,
        mut holds: impl FnMut(&Self) -> Result<bool>,
    ) -> Result<()> {
        let start = Instant::now();
        for look in 1_u32.. {
            if holds(self)? {
                return Ok(());
            }
            if look.is_multiple_of(LOOKS) {
                self.check_workers()?;
            }
            if start.elapsed() > PATIENCE {
                break;
            }
            thread::sleep(LOOK);
        }
        bail!("{otherwise}; {}", self.watch.told())
    }

    /// An error if an end has ended, which none does by itself.
    fn check_workers(&mut self) -> Result<()> {
        for worker in &mut self.workers {
            if worker.has_ended()? {
                let ended = worker.wait()?;
                bail!("{}; {}", worker.told(&ended), self.watch.told());
            }
        }
        Ok(())
    }

    /// An error if the guest's kernel has complained of anything, before a reset or after it.
    pub fn check_kernel(&self) -> Result<()> {
        let complaint = complaint(&self.vm()?.console_log());
        ensure!(
            complaint.is_empty(),
            "the guest's kernel complains:\n{complaint}"
        );
        Ok(())
    }

    /// An error if QEMU has waited in vain for an answer since this was asked last, unless the broker was killed, which may
    /// have been within a message.
    pub fn check_answers(&mut self, fault: Fault) -> Result<()> {
        let errors = self.vm()?.errors();
        let unanswered = errors.matches(UNANSWERED).count();
        let before = std::mem::replace(&mut self.unanswered, unanswered);
        ensure!(
            unanswered <= before || fault.kills_broker(),
            "QEMU was not answered:\n{errors}"
        );
        Ok(())
    }

    /// What broker, QEMU and guest have told, for who looks for the cause of a failure.
    pub fn evidence(&self) -> String {
        let broker = self.broker.log().unwrap_or_default();
        let vm = self.vm().map(Vm::last_words).unwrap_or_default();
        format!("the broker's log:\n{broker}{vm}")
    }

    /// Ends the streams in good order, and compares what was counted.
    pub fn finish(&mut self) -> Result<()> {
        self.wait_until_all_flow()?;
        for channel in CHANNELS {
            self.watch.notes(channel)?.write(Note::Stop, 1);
        }
        for end in [End::Producer, End::Consumer] {
            for worker in &mut self.workers {
                if worker.role.end == end {
                    worker.wait_done().with_context(|| self.watch.told())?;
                }
            }
        }
        self.watch.check_totals()
    }
}
