// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The broker, the VM, the eight ends, and the taps.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use barlink_crash_load::{Note, Random};
use barlink_driver_checks::complaint;
use barlink_protocol::wire::layout::End;

use super::fault::{Fault, Role, Side};
use super::watch::{CHANNELS, DOORBELLS, Mark, Watch};
use super::worker::{Task, Worker};
use barlink_sandbox::builds::{Artifacts, CRASH_LOAD};
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::{COMMAND_TIMEOUT, Process, Vm};

/// Small channels, so that they are often full and often wrap, a channel that is only rung, and
/// room for as many channels as the table has.
const ARGUMENTS: [&str; 13] = [
    "--channel",
    "down=down,16K",
    "--channel",
    "up=up,16K",
    "--channel",
    "dropping-up=up,16K,drop",
    "--channel",
    "newest-down=down,16K,overwrite",
    "--channel",
    "newest-up=up,16K,overwrite",
    "--channel",
    "doorbells=up,4K",
    "--reserve=432K,1",
];

/// Number of rings that show that rings are answered: the ring that was under way, and later ones.
const RINGS: u64 = 3;

/// Time between two reads of the notes.
pub(super) const LOOK: Duration = Duration::from_micros(500);

/// Reads of the notes for each check of the processes.
const LOOKS: u32 = 50;

/// Time limit for a stream that stands still although nothing that it needs is missing.
pub(super) const TIMEOUT: Duration = COMMAND_TIMEOUT;

/// Text that QEMU prints when the server of a vfio-user device does not answer.
const UNANSWERED: &str = "timed out";

/// The broker, the VM and the ends: see the module. The fields are dropped in this order.
pub struct Scene<'a> {
    workers: Vec<Worker>,
    /// A tap of each channel, on the host, which lives as long as this scene.
    taps: Vec<Worker>,
    pub(super) vm: Option<Vm>,
    pub(super) watch: Watch,
    pub(super) broker: Broker,
    artifacts: &'a Artifacts,
    pub(super) transport: Transport,
    seed: u64,
    pub(super) random: Random,
    /// Number of channels that were added.
    pub(super) added: usize,
    /// Number of times that this VM's QEMU has waited in vain for an answer.
    unanswered: usize,
    /// Whether the guest was suspended since it booted.
    pub(super) has_slept: bool,
}

impl<'a> Scene<'a> {
    /// Starts the broker, as a service if it is `managed`, the VM, and the ends.
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
            taps: Vec::new(),
            vm: None,
            watch,
            broker,
            artifacts,
            transport,
            seed,
            random: Random::new(seed),
            added: 0,
            unanswered: 0,
            has_slept: false,
        };
        // Taps count from their beginning, so they begin before any record.
        for channel in CHANNELS {
            let tap = scene.launch(Task::Tap(Side::Host), channel)?;
            scene.taps.push(tap);
        }
        scene.wait_until("the taps do not begin", |scene| {
            Ok(scene.watch.have_taps_begun())
        })?;
        scene.boot()?;
        for role in Role::ALL {
            scene.start(role)?;
        }
        Ok(scene)
    }

    /// Returns the notes and counters.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// Returns the VM.
    pub fn vm(&self) -> Result<&Vm> {
        self.vm.as_ref().context("there is no VM")
    }

    /// Returns one of the ends.
    pub fn worker(&mut self, role: Role) -> Result<&mut Worker> {
        let task = Task::End(role);
        let worker = self.workers.iter_mut().find(|worker| worker.task == task);
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

    /// Suspends the guest to memory, and wakes it.
    pub fn suspend(&mut self) -> Result<()> {
        self.has_slept = true;
        self.vm()?.suspend()
    }

    /// Loads the driver.
    pub fn load_driver(&self) -> Result<()> {
        let loaded = self.vm()?.run(["insmod", "/lib/barlink.ko"])?;
        loaded.require_success()
    }

    /// Starts an end, and drops the worker that had this role before.
    pub fn start(&mut self, role: Role) -> Result<()> {
        self.dismiss(role);
        let worker = self.launch(Task::End(role), role.channel())?;
        self.workers.push(worker);
        Ok(())
    }

    /// Starts a process that is none of the scene's own.
    pub fn launch(&self, task: Task, channel: &str) -> Result<Worker> {
        let vm = self.vm.as_ref();
        Worker::start(task, channel, self.artifacts, &self.broker, vm, self.seed)
    }

    /// Drops the worker of a role that has ended, so that no process of this role is to go on.
    pub fn dismiss(&mut self, role: Role) {
        let task = Task::End(role);
        self.workers.retain(|worker| worker.task != task);
    }

    /// Starts a process in the guest that rings the host without a pause, until it is killed.
    pub fn start_ringing(&self) -> Result<Process> {
        let program = [CRASH_LOAD, "--device", "/dev/barlink0"];
        let argv = program.into_iter().chain(["ringer", DOORBELLS]);
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

    /// Returns the ends in the guest.
    pub fn guest() -> impl Iterator<Item = Role> {
        let all = Role::ALL.into_iter();
        all.filter(|role| role.side == Side::Guest)
    }

    /// Waits until a tap has copied the newest record of a producer that was killed. The record
    /// stays until the next producer commits one.
    pub fn wait_for_newest(&mut self, role: Role) -> Result<()> {
        if !role.overwrites() {
            return Ok(());
        }
        self.dismiss(role);
        self.wait_until("the newest record is not found", |scene| {
            Ok(scene.watch.is_at_newest(role.channel()))
        })
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

    /// Waits until the tap of each channel has copied a new record.
    pub fn wait_until_taps_follow(&mut self) -> Result<()> {
        let mark = self.watch.mark(&CHANNELS);
        self.wait_until("a tap stands still", |scene| {
            Ok(scene.watch.is_tapped_beyond(&mark))
        })
    }

    /// Waits until rings have woken every end.
    pub fn wait_until_all_are_woken(&mut self) -> Result<()> {
        let since = self.watch.woken();
        self.wait_until("an end is not woken", |scene| {
            Ok(scene.watch.all_were_woken(&since))
        })
    }

    /// Waits until a condition holds. An error if an end ends meanwhile, or after [`TIMEOUT`].
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
            if start.elapsed() > TIMEOUT {
                break;
            }
            thread::sleep(LOOK);
        }
        bail!("{otherwise}; {}", self.watch.describe())
    }

    /// Returns an error if an end or a tap has ended, because none does so by itself.
    pub fn check_workers(&mut self) -> Result<()> {
        for worker in self.workers.iter_mut().chain(&mut self.taps) {
            if worker.has_ended()? {
                let ended = worker.wait()?;
                bail!("{}; {}", worker.describe(&ended), self.watch.describe());
            }
        }
        Ok(())
    }

    /// Returns an error if the guest's kernel has logged a complaint, before or after a reset.
    pub fn check_kernel(&self) -> Result<()> {
        let complaint = complaint(&self.vm()?.console_log());
        ensure!(
            complaint.is_empty(),
            "the guest's kernel complains:\n{complaint}"
        );
        Ok(())
    }

    /// Returns an error if QEMU has waited in vain for an answer since the last call. That is
    /// allowed after a kill of the broker, which may have been within a message.
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

    /// Returns the logs of broker, QEMU and guest, which help to find the cause of a failure.
    pub fn evidence(&self) -> String {
        let broker = self.broker.log().unwrap_or_default();
        let vm = self.vm().map(Vm::last_words).unwrap_or_default();
        format!("the broker's log:\n{broker}{vm}")
    }

    /// Ends the streams in good order, and compares the counts.
    pub fn finish(&mut self) -> Result<()> {
        self.wait_until_all_flow()?;
        for channel in CHANNELS {
            self.watch.channel(channel)?.notes.write(Note::Stop, 1);
        }
        let (producers, consumers): (Vec<_>, Vec<_>) = self.workers.iter_mut().partition(
            |worker| matches!(worker.task, Task::End(role) if role.end == End::Producer),
        );
        for worker in producers.into_iter().chain(consumers).chain(&mut self.taps) {
            worker.wait_done().with_context(|| self.watch.describe())?;
        }
        self.watch.check_totals()
    }
}
