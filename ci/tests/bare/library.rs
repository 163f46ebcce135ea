// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Records between the guest and programs of the host: the library's end wakes the guest that
//! sleeps, and the guest wakes the library's end.

use std::io::{Read, Write};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlink_protocol::cursor::Kind;
use barlink_protocol::region::Region;
use barlink_protocol::wire::layout::{Channel, End, Layout, PAGE_SIZE, channel, presence};
use barlink_protocol::{AtomicU64, Notify, Ordering, Producer};
use barlink_vm::Bare;
use barlink_vm::broker::Transport;
use barlink_vm_tests::{App, Task, wait_until};

use crate::queues::Queues;
use crate::stage::{Device, FIRST, HOST, LIMIT, REGION, Setting, Stage, VM};

/// Holder word of a process of the guest: claim 1, process ID 42.
const PROCESS: u64 = 1 << 32 | 42;

/// Time in which a program that is awake falls asleep, and a ring that is under way arrives.
const PAUSE: Duration = Duration::from_secs(1);

/// The guest's end of a channel, whose words the test stores in place of a driver and a program.
struct Guest {
    machine: Bare,
    way: Way,
    channel: Channel,
    /// Address of the region.
    region: u64,
}

/// The way in which the guest rings and is interrupted.
enum Way {
    Registers(Device),
    Queues(Queues),
}

impl Guest {
    /// Starts a machine, whose driver is there, and a program that holds an end of a channel.
    fn start(stage: &Stage, name: &str, end: End) -> Result<Self> {
        let mut machine = stage.setting.machine(&stage.config(0)?)?;
        let (way, region) = match stage.setting.transport {
            Transport::VhostUser => {
                let mut queues = Queues::start(stage, &mut machine)?;
                // Each interrupt takes a buffer, whatever its vector is.
                for _ in 0..20 {
                    queues.give_buffer(&mut machine)?;
                }
                let region = queues.region();
                (Way::Queues(queues), region)
            }
            _ => {
                let device = Device::find(&mut machine, "barlink0")?;
                device.enable(&mut machine)?;
                let region = device.pci.bars[2].0;
                (Way::Registers(device), region)
            }
        };
        let page = stage.tap.load(0, PAGE_SIZE as usize / 8)?;
        let page = page.try_into().ok().context("the page has a wrong size")?;
        let layout = Layout::decode(&page, REGION)?;
        let (index, channel) = layout.find(name).context("no such channel")?;
        let own = region + layout.presence_page(VM);
        machine.write_long(own + presence::holder(index, end), PROCESS)?;
        machine.write_long(own + presence::EPOCH, 1)?;
        Ok(Self {
            machine,
            way,
            channel: *channel,
            region,
        })
    }

    /// Address of a word of the channel.
    fn word(&self, offset: u64) -> u64 {
        self.region + self.channel.offset + offset
    }

    /// Rings the host's end of the channel.
    fn ring(&mut self) -> Result<()> {
        let vector = self.channel.vector;
        match &mut self.way {
            Way::Registers(device) => {
                let word = HOST << 16 | vector;
                self.machine.write(device.doorbell(), word)
            }
            Way::Queues(queues) => queues.ring(&mut self.machine, HOST, vector),
        }
    }

    /// Returns the processor's vector for the channel.
    fn vector(&self) -> u8 {
        match self.way {
            Way::Registers(_) => FIRST + self.channel.vector as u8,
            Way::Queues(_) => FIRST,
        }
    }
}

/// A guest that waits for a record sleeps until `barlink send` sends it, and gets one interrupt.
pub fn sent_record_wakes_sleeping_guest(setting: Setting) -> Result<()> {
    let stage = setting.stage()?;
    let mut guest = Guest::start(&stage, "down", End::Consumer)?;
    let vector = guest.vector();
    let before = guest.machine.taken(vector, 1)?;
    let mut send = stage.broker.app(["send", "--channel", "down"]);
    let mut send = App::start(send.stdin(Stdio::piped()).stdout(Stdio::null()))?;
    // The sender rings once, because it is new.
    let taken = guest.machine.sleep_until(vector, before + 1, LIMIT)?;
    ensure!(taken > before, "the sender does not ring");
    // The guest passes over the records that are there, and arms its wake-up.
    let [read, threshold] = [channel::READ, channel::CONSUMER_THRESHOLD].map(|at| guest.word(at));
    let written = guest.word(channel::WRITTEN);
    let mut seen = guest.machine.read_long(written)?;
    loop {
        guest.machine.write_long(read, seen)?;
        guest.machine.write_long(threshold, seen + 1)?;
        let now = guest.machine.read_long(written)?;
        if now == seen {
            break;
        }
        seen = now;
    }
    // Over vhost-user the broker's rings by vector 0 come by the same interrupt.
    let before = guest.machine.sleep_until(vector, u64::MAX, PAUSE)?;
    let order = format!("await {vector} {} {}", before + 1, LIMIT.as_millis() / 10);
    guest.machine.begin(&order)?;
    let input = send.stdin.as_mut().context("no standard input")?;
    input.write_all(b"wake up\n")?;
    let taken = guest.machine.finish()?;
    ensure!(taken == before + 1, "{} interrupts", taken - before);
    let now = guest.machine.read_long(written)?;
    ensure!(now > seen, "the guest woke before the record was there");
    stage.check_quiet(&guest.machine)
}

/// `barlink recv` sleeps until the guest has rung, and then writes the guest's record.
pub fn record_of_guest_wakes_sleeping_program(setting: Setting) -> Result<()> {
    const TEXT: &[u8] = b"a record that the processor of a guest has written";
    let stage = setting.stage()?;
    let mut guest = Guest::start(&stage, "up", End::Producer)?;
    let mut receive = stage
        .broker
        .app(["recv", "--channel", "up", "--raw", "--partial"]);
    let mut receive = App::start(receive.stdout(Stdio::piped()).stderr(Stdio::null()))?;
    let mut output = receive.stdout.take().context("no standard output")?;
    let threshold = guest.word(channel::CONSUMER_THRESHOLD);
    wait_until("the program sleeps", || {
        Ok(guest.machine.read_long(threshold)? == 1)
    })?;
    // The first ring ends the program's fallback poll, so that only a ring wakes it. A program that
    // is awake arms its wake-up again before it sleeps.
    guest.machine.write_long(threshold, 0)?;
    guest.ring()?;
    wait_until("the program is awake", || {
        Ok(guest.machine.read_long(threshold)? == 1)
    })?;
    thread::sleep(PAUSE);
    let words: Vec<_> = stage.tap.load(0, REGION as usize / 8)?;
    let copy: Vec<_> = words.iter().copied().map(AtomicU64::new).collect();
    let mut producer = Producer::attach(Region::new(&copy[..]), &guest.channel)?;
    let mut reservation = producer.reserve(TEXT.len())?;
    reservation.write(0, TEXT);
    let (notify, _) = reservation.commit(Kind::USER, TEXT.len() as u32, 0)?;
    ensure!(notify == Notify::Ring, "the program does not sleep");
    // The words that a record changes: the limit first, and the cursor last.
    let changed = |offset: &u64| {
        let index = (*offset / 8) as usize;
        (words[index] != copy[index].load(Ordering::Relaxed)).then_some(*offset)
    };
    let [limit, written] = [channel::LIMIT, channel::WRITTEN].map(|at| guest.channel.offset + at);
    let mut offsets: Vec<_> = (0..REGION)
        .step_by(8)
        .filter_map(|at| changed(&at))
        .collect();
    offsets.sort_by_key(|offset| (*offset != limit, *offset == written));
    for offset in offsets {
        let word = copy[(offset / 8) as usize].load(Ordering::Relaxed);
        guest.machine.write_long(guest.region + offset, word)?;
    }
    let length = TEXT.len();
    let text = Task::start("the program's output", move || {
        let mut text = vec![0; length];
        output.read_exact(&mut text).map(|()| text)
    });
    thread::sleep(Duration::from_millis(200));
    let read = guest.word(channel::READ);
    ensure!(
        guest.machine.read_long(read)? == 0,
        "it woke without a ring"
    );
    guest.ring()?;
    ensure!(text.end()?? == TEXT, "another text");
    wait_until("the record is released", || {
        Ok(guest.machine.read_long(read)? > 0)
    })?;
    stage.check_quiet(&guest.machine)
}
