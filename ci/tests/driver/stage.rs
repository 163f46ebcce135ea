// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The VM that the checks run in, and the host's part in the checks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use barlink_driver_checks::tier::{self, Tier};
use barlink_driver_checks::{Answer, Region, Request};
use barlink_vm::Vm;
use barlink_vm::broker::Transport;
use barlink_vm_tests::{LIMIT, Task};

use crate::devices::{Devices, Machine};

/// A shell command that makes the guest's kernel reboot on an oops. The reboot ends QEMU, so a
/// check that breaks the kernel fails at once.
const END_ON_OOPS: &str =
    "echo 1 >/proc/sys/kernel/panic_on_oops && echo -1 >/proc/sys/kernel/panic";

/// Time from one key press to the next. A press before the guest sleeps has no effect, so it is
/// repeated.
const PRESS: Duration = Duration::from_millis(20);

/// Limit of the time between two requests of a check. It is longer than the limits of the check's
/// own waits, so that the check can report which event did not come.
const CHECK_LIMIT: Duration = LIMIT.saturating_mul(2);

/// A VM with its devices. The fields are dropped in this order.
pub struct Stage {
    /// The work that rings or presses keys while a check does something else.
    background: Option<Background>,
    vm: Arc<Vm>,
    devices: Devices,
}

impl Stage {
    /// Starts a VM with the devices of these regions over this transport.
    pub fn set(transport: Transport, machine: Machine, regions: &[Region]) -> Result<Self> {
        let devices = Devices::new(transport, machine, regions)?;
        let vm = match machine {
            Machine::Usual | Machine::BehindAnIommu => Vm::restore(&devices.config)?,
            Machine::Sleeper => Vm::boot(&devices.config)?,
        };
        vm.run(["sh", "-c", END_ON_OOPS])?.require_success()?;
        Ok(Self {
            background: None,
            vm: Arc::new(vm),
            devices,
        })
    }

    /// Runs a check to its end. Returns its measurements as text.
    pub fn check(&mut self, name: &str) -> Result<Vec<String>> {
        let tier = format!("{}={}", tier::VARIABLE, Tier::current());
        let process = self
            .vm
            .spawn(["env", &tier, "barlink-driver-checks", name])?;
        let mut figures = Vec::new();
        while let Some(line) = process.next_line(CHECK_LIMIT)? {
            let request = serde_json::from_str(&line);
            let request = request.with_context(|| format!("not a request: {line}"))?;
            let wakes = matches!(request, Request::Wake);
            let answer = self.answer(request, &mut figures)?;
            let mut line = serde_json::to_vec(&answer)?;
            line.push(b'\n');
            process.write(&line)?;
            if wakes {
                let woken = self.vm.wake();
                woken.with_context(|| self.vm.last_words())?;
            }
        }
        self.background = None;
        process.wait(LIMIT)?.require_success()?;
        Ok(figures)
    }

    fn answer(&mut self, request: Request, figures: &mut Vec<String>) -> Result<Answer> {
        match request {
            Request::Load {
                region,
                offset,
                count,
            } => {
                return Ok(Answer::Words(
                    self.devices.tap(region)?.load(offset, count)?,
                ));
            }
            Request::Store {
                region,
                offset,
                words,
            } => self.devices.tap(region)?.store(offset, &words)?,
            Request::Ring {
                region,
                vector,
                times,
            } => {
                let tap = self.devices.tap(region)?;
                tap.ring(region.facts().slot, vector, times)?;
            }
            Request::Burst {
                region,
                vector,
                times,
                offset,
                word,
            } => {
                let tap = self.devices.tap(region)?;
                for left in (0..times).rev() {
                    if left == 0 {
                        tap.store(offset, &[word])?;
                    }
                    tap.ring(region.facts().slot, vector, 1)?;
                }
            }
            Request::Rings {
                region,
                peer,
                vector,
                timeout,
            } => {
                let timeout = Duration::from_millis(timeout.into());
                let tap = self.devices.tap(region)?;
                return Ok(Answer::Count(tap.wait(peer, vector, timeout)?));
            }
            Request::RingAll { region } => {
                let (tap, facts) = (self.devices.tap(region)?, region.facts());
                for vector in 0..facts.vectors {
                    tap.ring(facts.slot, vector, 1)?;
                }
            }
            Request::AllRings { region, peer } => {
                let tap = self.devices.tap(region)?;
                let counts = (0..region.facts().vectors).map(|vector| tap.rings(peer, vector));
                return Ok(Answer::Counts(counts.collect::<Result<_>>()?));
            }
            Request::Echo { region, vector } => self.background = Some(self.echo(region, vector)?),
            Request::Storm { region } => self.background = Some(self.storm(region)?),
            Request::Press => self.background = Some(self.press()),
            Request::Calm => self.background = None,
            Request::Pause { region } => self.devices.pause(region)?,
            Request::GoOn { region, after } => {
                let after = Duration::from_millis(after.into());
                self.devices.go_on(region, after)?;
            }
            // `check` wakes the VM after it has sent the answer, because the guest goes to sleep
            // only then.
            Request::Wake => (),
            Request::Unplugs => return Ok(Answer::Is(self.devices.unplug_at_all())),
            Request::Plug { region } => self.devices.plug(&self.vm, region)?,
            Request::Unplug { region } => self.devices.unplug(&self.vm, region)?,
            Request::Show { figure } => figures.push(figure),
        }
        Ok(Answer::Done)
    }

    /// Answers rings of a vector of the host by as many rings of the same vector of the VM.
    fn echo(&self, region: Region, vector: u32) -> Result<Background> {
        let tap = Arc::clone(self.devices.tap(region)?);
        Ok(Background::start(move || {
            // The wait is short because the order to stop is checked between two waits.
            let rung = tap.wait(region.host(), vector, Duration::from_millis(10))?;
            if rung > 0 {
                tap.ring(region.facts().slot, vector, rung)?;
            }
            Ok(())
        }))
    }

    /// Rings all vectors of the VM, again and again.
    fn storm(&self, region: Region) -> Result<Background> {
        let tap = Arc::clone(self.devices.tap(region)?);
        Ok(Background::start(move || {
            for vector in 0..region.facts().vectors {
                tap.ring(region.facts().slot, vector, 1)?;
            }
            // The pause leaves processor time to the VM.
            thread::sleep(Duration::from_micros(100));
            Ok(())
        }))
    }

    /// Presses a key of the VM, again and again.
    fn press(&self) -> Background {
        let vm = Arc::clone(&self.vm);
        Background::start(move || {
            thread::sleep(PRESS);
            vm.press_key()
        })
    }
}

/// Work that a thread repeats until this is dropped.
struct Background {
    ends: Arc<AtomicBool>,
    work: Option<Task<Result<()>>>,
}

impl Background {
    fn start(mut work: impl FnMut() -> Result<()> + Send + 'static) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&ends);
        let work = Task::start("the work in the background", move || {
            while !ended.load(Ordering::Relaxed) {
                work()?;
            }
            Ok(())
        });
        Self {
            ends,
            work: Some(work),
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        let ended = self.work.take().map(|work| work.end().flatten());
        if let Some(Err(error)) = ended {
            eprintln!("in the background: {error:#}");
        }
    }
}
