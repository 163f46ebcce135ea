// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A peer of barlink: plain ivshmem, mapped through sysfs in the guest, with two cursors that both
//! ends poll.
//!
//! Bytes are copied in with barlink's copy function and read in place, so that the comparison shows
//! only how the ends meet.
#![expect(unsafe_code, reason = "turns a mapping into words")]

use std::fs::{self, File};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use barlink_protocol::region::{self, Region};
use barlink_protocol::{AtomicU64, Ordering};
use clap::Args;
use vm_memory::{FileOffset, MmapRegion};

use crate::stream::sum_of;
use crate::{CAPACITY, Flow, Measured, STRIDE};

/// Bytes of the memory.
pub const SIZE: usize = 2 * CAPACITY as usize;
/// Byte offsets of the sender's cursor, of the receiver's cursor, and of the word that ends the
/// stream.
const WRITTEN: u64 = 0;
const READ: u64 = 64;
const ENDED: u64 = 128;
/// Byte offset of the records, which have [`CAPACITY`] bytes.
const DATA: u64 = 4096;

/// The memory. Its first page is zero before the stream.
#[derive(Args, Debug)]
struct RawMemory {
    /// The file of the memory; without it, in the guest, the ivshmem device without a driver
    #[arg(long)]
    file: Option<PathBuf>,
    /// Bytes of a record, a power of two
    #[arg(long)]
    record_size: usize,
}

/// Writes records to the memory.
#[derive(Args, Debug)]
pub struct RawSend {
    #[command(flatten)]
    memory: RawMemory,
    /// Length of the timed part of the stream, in milliseconds
    #[arg(long)]
    time: u64,
}

/// Reads records from the memory.
#[derive(Args, Debug)]
pub struct RawReceive {
    #[command(flatten)]
    memory: RawMemory,
}

/// Reports the cache mode of the memory in the guest, mapped as by an end of a stream.
#[derive(Args, Debug)]
pub struct RawMode {}

/// The memory's words.
struct Words(MmapRegion);

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping begins at a page boundary, has this number of bytes, can be read and
        // written, and lives as long as this value. This process has no other reference or pointer
        // to it.
        unsafe { region::words(self.0.as_ptr(), self.0.size()) }
    }
}

impl RawMemory {
    fn map(&self) -> Result<Words> {
        let path = match &self.file {
            Some(path) => path.clone(),
            None => find_device()?.join("resource2"),
        };
        map(&path)
    }
}

fn map(path: &Path) -> Result<Words> {
    let file = File::options().read(true).write(true).open(path)?;
    let mapped = MmapRegion::from_file(FileOffset::new(file, 0), SIZE);
    let mapped = mapped.with_context(|| format!("{} cannot be mapped", path.display()))?;
    Ok(Words(mapped))
}

/// Finds the ivshmem device without a driver.
fn find_device() -> Result<PathBuf> {
    let is_free = |device: &Path| {
        let says = |file, what: &str| {
            fs::read_to_string(device.join(file)).is_ok_and(|text| text.trim_end() == what)
        };
        says("vendor", "0x1af4") && says("device", "0x1110") && !device.join("driver").exists()
    };
    let devices = fs::read_dir("/sys/bus/pci/devices")?;
    let mut paths = devices.filter_map(|device| Some(device.ok()?.path()));
    let found = paths.find(|device| is_free(device));
    found.context("there is no free ivshmem device")
}

impl RawMode {
    /// Returns the mode that the guest's kernel lists while the memory is mapped.
    pub fn run(&self) -> Result<String> {
        const LIST: &str = "/sys/kernel/debug/x86/pat_memtype_list";
        let device = find_device()?;
        let _words = map(&device.join("resource2"))?;
        // Each BAR has a line with its first byte, its last byte, and flags.
        let bars = fs::read_to_string(device.join("resource"))?;
        let start = bars.lines().nth(2).and_then(|bar| bar.split(' ').next());
        let start = start.context("the ivshmem device has no BAR2")?;
        let list = fs::read_to_string(LIST).context(LIST)?;
        let entry = format!("PAT: [mem {start}-");
        let found = list.lines().find(|line| line.starts_with(&entry));
        let mode = found.and_then(|line| Some(line.split_once("] ")?.1));
        let mode = mode.with_context(|| format!("`{entry}` is not in {LIST}"))?;
        Ok(mode.to_owned())
    }
}

impl RawSend {
    /// Writes the same record again and again.
    pub fn run(&self) -> Result<Measured> {
        let size = self.memory.record_size;
        let region = Region::new(self.memory.map()?);
        let [written, read, ended] = [WRITTEN, READ, ENDED].map(|offset| region.word(offset));
        let words = 0..size as u64 / 8;
        let record: Vec<u8> = words.clone().flat_map(u64::to_le_bytes).collect();
        let sum = words.fold(0, u64::wrapping_add);
        let mut cursor = 0;
        let mut flow = Flow::begin();
        while flow.lasts(self.time) {
            for _ in 0..STRIDE.div_ceil(size as u64) {
                let next = cursor + size as u64;
                while next - read.load(Ordering::Acquire) > CAPACITY {
                    std::hint::spin_loop();
                }
                region.copy_in(DATA + cursor % CAPACITY, &record);
                written.store(next, Ordering::Release);
                cursor = next;
                flow.add(1, size as u64, sum);
            }
        }
        let measured = flow.end();
        ended.store(1, Ordering::Release);
        Ok(measured)
    }
}

impl RawReceive {
    /// Reads records in place, and adds up their words.
    pub fn run(&self) -> Result<Measured> {
        let size = self.memory.record_size;
        let memory = self.memory.map()?;
        let [written, read, ended] =
            [WRITTEN, READ, ENDED].map(|offset| &memory[offset as usize / 8]);
        let mut flow = None;
        let mut cursor = 0;
        loop {
            let is_last = ended.load(Ordering::Acquire) == 1;
            if written.load(Ordering::Acquire) == cursor {
                if is_last {
                    break;
                }
                std::hint::spin_loop();
                continue;
            }
            let flow = flow.get_or_insert_with(Flow::begin);
            let first = (DATA + cursor % CAPACITY) as usize / 8;
            let words = &memory[first..first + size / 8];
            flow.add(1, size as u64, sum_of(words));
            cursor += size as u64;
            read.store(cursor, Ordering::Release);
        }
        Ok(flow.unwrap_or_else(Flow::begin).end())
    }
}
