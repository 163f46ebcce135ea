// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The results as JSON and as tables.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::Result;
use barlink_bench_load::{CAPACITY, STRIDE, WARM_UP};
use indicatif::BinaryBytes;
use serde::Serialize;
use serde_json::{Value, json};

use super::case::{Case, Direction, Way};
use super::charts;
use super::host::TRIP_CAPACITY;
use super::idle;
use super::newest;
use super::plan::Plan;
use super::readers;
use super::scene::{Conditions, Side};
use super::spread::range_name;
use super::steps;
use super::stream;
use super::trip::{self, Trip};
use barlink_vm::broker::Transport;

/// The results and the conditions of the measurements.
#[derive(Clone, Debug)]
pub struct Report {
    conditions: Conditions,
    /// Length of all measurements in seconds, from the start of the VM, and the number of rounds.
    pub(super) took: (f64, u32),
    pub(super) streams: Vec<stream::Row>,
    pub(super) readers: Vec<readers::Row>,
    pub(super) newest: Vec<newest::Row>,
    pub(super) steps: Option<steps::Row>,
    pub(super) trips: Vec<trip::Row>,
    pub(super) idle: Vec<idle::Row>,
}

impl Report {
    /// Creates a report with a row for each case of the plan, without results.
    pub(super) fn new(conditions: Conditions, plan: Plan) -> Self {
        Self {
            conditions,
            took: Default::default(),
            streams: plan.streams.into_iter().map(stream::Row::new).collect(),
            readers: plan.readers.into_iter().map(readers::Row::new).collect(),
            newest: plan.newest.into_iter().map(newest::Row::new).collect(),
            steps: plan.steps.then(steps::Row::default),
            trips: plan.trips.into_iter().map(trip::Row::new).collect(),
            idle: Vec::new(),
        }
    }

    /// Returns the number of rows that are measured in each round.
    pub(super) fn rows(&self) -> usize {
        let steps = usize::from(self.steps.is_some());
        self.streams.len() + self.readers.len() + self.newest.len() + steps + self.trips.len()
    }

    /// Returns the median rate of the first way divided by that of the second, for records of this
    /// size.
    pub fn ratio(&self, ways: [(Way, Direction); 2], record_size: u64) -> Option<f64> {
        let rate = |(way, direction)| {
            let case = Case {
                way,
                direction,
                record_size,
            };
            let row = self.streams.iter().find(|row| row.case == case);
            row.map(|row| row.rate.median())
        };
        let [one, other] = ways.map(rate);
        Some(one? / other?)
    }

    /// Returns the largest number of rings of the producer for each record. Records above 64 KiB do
    /// not count: a channel holds only a few of them, so any may find the other end asleep.
    pub fn most_rings_per_record(&self) -> f64 {
        let small = |row: &&stream::Row| row.case.record_size <= 64 << 10;
        let counted = self.streams.iter().filter(small);
        let counted = counted.filter_map(|row| Some(row.wakeups()? / 1e3));
        counted.fold(0.0, f64::max)
    }

    /// Returns, for each pair of channels whose ends should sleep, the least part of round trips in
    /// which both ends slept.
    pub fn asleep(&self) -> impl Iterator<Item = (String, f64)> {
        let channels = self.trips.iter().filter(|row| row.is_of_channels());
        channels.filter_map(|row| Some((row.trip.to_string(), row.asleep()?)))
    }

    /// Returns the processor time of each pair of ends that slept, in nanoseconds.
    pub fn idle_cpu(&self) -> impl Iterator<Item = (String, u64)> {
        self.idle.iter().map(idle::Row::ends)
    }

    /// Writes `results.json`, `results.md` and the charts.
    pub fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        let json = serde_json::to_string_pretty(&self.json()?)?;
        fs::write(folder.join("results.json"), json)?;
        let mut text = self.to_string();
        for chart in charts::draw(self, &self.conditions.to_string(), folder)? {
            text += &format!("\n![{}]({})\n", chart.title, chart.file);
        }
        fs::write(folder.join("results.md"), text)?;
        Ok(())
    }

    /// Returns every row with its conditions.
    fn json(&self) -> Result<Value> {
        let streams = self.streams.iter().map(|row| {
            let more = json!({
                "cache_mode": self.cache_mode(row.case.way),
                "wait": row.case.way.wait(),
                "consumer_reads_every_byte": row.case.way.is_read(),
                "host_cpu_seconds_per_gib": row.cpu(Side::Host),
                "guest_cpu_seconds_per_gib": row.cpu(Side::Guest),
                "wakeups_per_1000_records": row.wakeups(),
            });
            self.with_conditions(row, more)
        });
        let readers = self.readers.iter();
        let readers =
            readers.map(|row| self.with_conditions(row, json!({ "wait": readers::WAIT })));
        let newest = self.newest.iter();
        let newest = newest.map(|row| self.with_conditions(row, json!({ "wait": "poll" })));
        let steps = self.steps.iter();
        let steps = steps.map(|row| self.with_conditions(row, json!({ "wait": "none" })));
        let trips = self.trips.iter().map(|row| {
            let cache_mode = match row.trip {
                Trip::Channels(transport, _) | Trip::Doorbells(transport) => {
                    self.cache_mode(Way::Channel(transport))
                }
                _ => None,
            };
            let more = json!({
                "name": row.trip.to_string(),
                "part_asleep_at_both_ends": row.asleep(),
                "record_size": row.trip.record_size(),
                "cache_mode": cache_mode,
                "wait": row.trip.wait(),
                "consumer_reads_every_byte": !matches!(row.trip, Trip::Doorbells(_)),
            });
            self.with_conditions(row, more)
        });
        let idle = self.idle.iter().map(|row| {
            let way = row.transport.map(Way::Channel);
            let more = json!({
                "cache_mode": way.and_then(|way| self.cache_mode(way)),
                "wait": "sleep",
            });
            self.with_conditions(row, more)
        });
        Ok(json!({
            "seconds": self.took.0,
            "rounds": self.took.1,
            "streams": streams.collect::<Result<Vec<_>>>()?,
            "readers": readers.collect::<Result<Vec<_>>>()?,
            "newest": newest.collect::<Result<Vec<_>>>()?,
            "steps": steps.collect::<Result<Vec<_>>>()?,
            "trips": trips.collect::<Result<Vec<_>>>()?,
            "idle": idle.collect::<Result<Vec<_>>>()?,
        }))
    }

    /// Returns the cache mode of the device's memory in the guest, if the way uses one.
    fn cache_mode(&self, way: Way) -> Option<&str> {
        match way {
            Way::Channel(transport) => {
                let mode = self.conditions.cache_modes.get(transport.index());
                mode.map(String::as_str)
            }
            Way::Raw => Some(&self.conditions.raw_cache_mode),
            _ => None,
        }
    }

    fn with_conditions(&self, row: &impl Serialize, more: Value) -> Result<Value> {
        let mut row = serde_json::to_value(row)?;
        let all = json!({
            "accelerator": self.conditions.accelerator,
            "processor": self.conditions.processor,
            "host_kernel": self.conditions.host_kernel,
            "qemu": self.conditions.qemu,
            "kernel": self.conditions.kernel,
            "guest_cpus": self.conditions.guest_cpus,
            "host_cpus": self.conditions.host_cpus,
        });
        for part in [all, more] {
            if let (Value::Object(row), Value::Object(part)) = (&mut row, part) {
                row.extend(part);
            }
        }
        Ok(row)
    }
}

impl fmt::Display for Conditions {
    /// Formats the conditions as one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Conditions {
            accelerator,
            kernel,
            cache_modes,
            raw_cache_mode,
            guest_cpus,
            host_cpus,
            ..
        } = self;
        write!(
            f,
            "accelerator {accelerator}, guest kernel {kernel}, {guest_cpus} vCPUs on {host_cpus} CPUs, region "
        )?;
        if cache_modes.iter().all(|mode| mode == raw_cache_mode) {
            return write!(f, "and raw ivshmem mapped {raw_cache_mode} in the guest");
        }
        let modes = Transport::ALL.iter().zip(cache_modes);
        let modes = modes.map(|(transport, mode)| format!("{mode} over {transport}"));
        let modes = modes.collect::<Vec<_>>().join(", ");
        write!(f, "mapped {modes}, raw ivshmem {raw_cache_mode}")
    }
}

impl fmt::Display for Report {
    /// Formats the report as Markdown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let conditions = &self.conditions;
        let (seconds, rounds) = self.took;
        let range = range_name(rounds);
        let Conditions {
            processor,
            host_kernel,
            qemu,
            ..
        } = conditions;
        writeln!(
            f,
            "Rounds: {rounds}. Time: {seconds:.0} s. Machine: {processor}, host kernel {host_kernel}, QEMU {qemu}.\n"
        )?;
        if !self.streams.is_empty() {
            writeln!(
                f,
                "## Streams\n\nConditions: {conditions}. The receiver reads every byte, except of `memcpy`, which has no receiver.\n\n\
                 Through channels of {} and as much plain memory. Between guest and host records are copied in by the sender, and \
                 smaller records are committed and released in batches of {}, unless the row says one by one. Within the host records of barlink and \
                 iceoryx2 are built in place, one by one, unless the row says in batches. All are read in place. Ends of channels spin for up to 50 µs, then back off, \
                 then sleep. Rates and processor time are those behind the first {} ms, records and wake-ups those of all of a \
                 stream. A record of a socket or a port is one `write`. Wake-ups are the doorbells that the producer rang. \
                 Processor time is that of the processes at the ends; the host's does not include QEMU and the broker.\n",
                BinaryBytes(CAPACITY),
                BinaryBytes(STRIDE),
                WARM_UP.as_millis()
            )?;
            writeln!(
                f,
                "| from where to where | how | record | MiB/s | {range} | records/s | wake-ups in 1,000 records \
                 | CPU s/GiB, host | guest | ends wait by |"
            )?;
            writeln!(f, "|---|---|---:|---:|---:|---:|---:|---:|---:|---|")?;
            for row in &self.streams {
                write!(f, "{row}")?;
            }
        }
        if !self.readers.is_empty() {
            writeln!(
                f,
                "\n## Several readers\n\nConditions: {conditions}. Between processes on the host. The sender never waits: the channel, of {}, \
                 and the queues of iceoryx2, as long, lose their oldest records. Each reader copies each record out (barlink), or reads it \
                 in place (iceoryx2), and adds up all words. A reader that finds no record looks again after {}. Rates are those behind the \
                 first {} ms. Missed records are counted by the reader, and are the rest of all that were sent.\n",
                BinaryBytes(CAPACITY),
                readers::WAIT,
                WARM_UP.as_millis()
            )?;
            writeln!(
                f,
                "| how | readers | record | sender | sender, MiB/s | readers together, MiB/s | {range} | missed |"
            )?;
            writeln!(f, "|---|---|---:|---|---:|---:|---:|---:|")?;
            for row in &self.readers {
                write!(f, "{row}")?;
            }
        }
        if !self.newest.is_empty() {
            writeln!(
                f,
                "\n## The newest value\n\nConditions: {conditions}. The sender is on the host, and never pauses. The reader is on the host, too, unless \
                 the row says otherwise. It copies the newest value again and again, and adds up all words. A sender of barlink builds values in place; one of iceoryx2 builds \
                 and copies them. A tap tries a bounded number of times to copy a value before it is written over, and counts a read that \
                 fails; a reader of a blackboard tries without end. Whole reads are part of all reads, of all rounds together. A torn read is \
                 a mixture of values.\n"
            )?;
            writeln!(
                f,
                "| how | value | values sent/s | reads/s | {range} | whole | torn reads |"
            )?;
            writeln!(f, "|---|---:|---:|---:|---:|---:|---:|")?;
            for row in &self.newest {
                write!(f, "{row}")?;
            }
        }
        if let Some(steps) = &self.steps {
            writeln!(
                f,
                "\n## Steps of a record\n\nConditions: {conditions}. Nanoseconds for a record of 64 bytes. One thread on the host \
                 has both ends of a channel, so that no line of memory goes from one processor to another. The last row is the shortest time of \
                 two threads: virtual processors that share a core take some tens of nanoseconds.\n"
            )?;
            writeln!(f, "| step | ns | {range} |")?;
            writeln!(f, "|---|---:|---:|")?;
            write!(f, "{steps}")?;
        }
        if !self.trips.is_empty() {
            writeln!(
                f,
                "\n## Round trips\n\nConditions: {conditions}. Of 64 bytes, if nothing else is said: the guest asks, the host answers, and \
                 both read every byte; a bare doorbell bears none. Ends that sleep are both asleep when they are woken, in this part of the \
                 trips at least; what one thinks before it answers is taken off. Channels within the host are of {}. Times in µs, medians of the rounds. \
                 A quantile of a round needs ten trips above it; with fewer, n is too small.\n",
                BinaryBytes(TRIP_CAPACITY)
            )?;
            writeln!(
                f,
                "| how | median | {range} | 99 % | 99.9 % | longest | trips | both slept | ends wait by |"
            )?;
            writeln!(f, "|---|---:|---:|---:|---:|---:|---:|---:|---|")?;
            for row in &self.trips {
                write!(f, "{row}")?;
            }
        }
        if !self.idle.is_empty() {
            writeln!(
                f,
                "\n## Sleep\n\nConditions: {conditions}. Both ends are attached and asleep. Processor time in µs for each second, and \
                 context switches for each second. QEMU's is the whole VM's, whose kernel ticks.\n"
            )?;
            writeln!(
                f,
                "| between | ends on the host | in the guest | broker | QEMU |"
            )?;
            writeln!(f, "|---|---:|---:|---:|---:|")?;
            for row in &self.idle {
                write!(f, "{row}")?;
            }
        }
        Ok(())
    }
}
