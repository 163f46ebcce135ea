// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command `barlink-guest info`.

use std::collections::BTreeMap;

use anyhow::Result;
use barlink::guest::{Choice, Device};
use barlink_cli::cache::{Cache, wrap};
use barlink_cli::channel::{peer_name, policy_note};
use barlink_cli::standard::print;
use barlink_protocol::CacheState;
use barlink_protocol::wire::layout::NO_PEER;
use indicatif::BinaryBytes;
use serde::Serialize;

use super::broker;
use crate::args;

/// The output of `barlink-guest info --json`.
#[derive(Serialize)]
struct Report {
    /// Name of the region's broker, empty if it has none.
    name: String,
    /// Number of the region.
    instance: String,
    /// Whether the device has its driver. Programs use it by sysfs or VFIO otherwise.
    driver: bool,
    #[serde(skip)]
    is_by_vfio: bool,
    /// PCI address in the form of lspci, `DDDD:BB:DD.F`.
    pci_address: String,
    /// Guest-physical address of the region.
    region_address: u64,
    /// Size of the region, in bytes.
    region_size: u64,
    /// Slot of this VM.
    slot: u32,
    /// Number of the host, which follows those of the slots.
    host: u32,
    /// Number of the device's interrupt vectors.
    vectors: u32,
    /// Epoch of the driver.
    epoch: u64,
    /// Cache mode that the kernel granted to this program's mapping.
    cache_mode: &'static str,
    /// The requested mode, the granted mode, and the reason if they differ.
    cache: Cache,
    /// The measurement that chose the mode to ask for; `null` if the mode was requested by name.
    choice: Option<Measured>,
    /// The channels of the region.
    channels: Vec<Channel>,
    /// The reason why the broker is taken for gone; `null` if it answers, or if this user may not
    /// ask it.
    broker_fault: Option<&'static str>,
}

/// The choice of a cache mode by a measurement.
#[derive(Serialize)]
struct Measured {
    /// The chosen mode; `same` if the region was mapped already, which leaves `speeds` empty.
    cache: &'static str,
    /// Bytes a second that were read in each mode; `null` for a mode that was not granted.
    speeds: BTreeMap<&'static str, Option<f64>>,
    #[serde(skip)]
    text: String,
}

impl From<&Choice> for Measured {
    fn from(choice: &Choice) -> Self {
        let speeds = choice.speeds.iter();
        Measured {
            cache: choice.cache.name(),
            speeds: speeds
                .map(|(cache, speed)| (cache.name(), *speed))
                .collect(),
            text: format!("chosen {choice}"),
        }
    }
}

#[derive(Serialize)]
struct Channel {
    name: String,
    producer: u32,
    /// `null` if the channel has no consumer.
    consumer: Option<u32>,
    capacity: u64,
    /// The treatment of records that find no room: `wait`, `drop` or `overwrite`.
    policy: &'static str,
    #[serde(skip)]
    note: &'static str,
}

pub fn info(device: &Device, args: &args::Info) -> Result<()> {
    let info = device.info()?;
    let address = info.pci_address;
    let cache = Cache::from(CacheState::of(&info));
    let channels = device.layout().channels().iter().map(|channel| Channel {
        name: channel.name.to_string(),
        producer: channel.producer,
        consumer: channel.has_consumer().then_some(channel.consumer),
        capacity: channel.capacity,
        policy: channel.policy.as_str(),
        note: policy_note(channel.policy),
    });
    let identity = device.identity();
    let report = Report {
        name: identity.name.to_string(),
        instance: identity.instance.to_string(),
        driver: device.has_driver(),
        is_by_vfio: super::is_by_vfio(device.path()),
        pci_address: format!(
            "{:04x}:{:02x}:{:02x}.{}",
            address >> 16,
            address >> 8 & 0xff,
            address >> 3 & 0x1f,
            address & 7
        ),
        region_address: info.region_address,
        region_size: info.region_size,
        slot: info.id,
        host: device.layout().host(),
        vectors: info.vectors,
        epoch: info.epoch,
        cache_mode: cache.granted.unwrap_or("unknown"),
        cache,
        choice: device.choice().map(Measured::from),
        channels: channels.collect(),
        // The text comes at once, and a warning behind it.
        broker_fault: args.json.then(|| broker::fault(device)).flatten(),
    };
    let text = if args.json {
        serde_json::to_string_pretty(&report)?
    } else {
        describe(&report)
    };
    print(format!("{text}\n"))
}

fn describe(report: &Report) -> String {
    let mut cache = report.cache.lines();
    if let Some(choice) = &report.choice {
        cache.extend(wrap(&choice.text));
    }
    let mut text = format!(
        "name         {}\ninstance     {}\nPCI address  {}\nregion       {} at {:#x}\nslot         {} (the host is number {})\nvectors      {}\n\
         epoch        {}\ncache mode   {}",
        match report.name.as_str() {
            "" => "-",
            name => name,
        },
        report.instance,
        report.pci_address,
        BinaryBytes(report.region_size),
        report.region_address,
        report.slot,
        report.host,
        report.vectors,
        report.epoch,
        cache.join("\n             "),
    );
    if !report.driver {
        text.push_str("\ndriver       none: ");
        text.push_str(match report.is_by_vfio {
            true => "one program at a time uses the device, by VFIO",
            false => "programs use the device by sysfs, and poll",
        });
    }
    let peer = |id| peer_name(id, report.host);
    for channel in &report.channels {
        text.push_str(&format!(
            "\nchannel      {}: {} to {}, {}{}",
            channel.name,
            peer(channel.producer),
            peer(channel.consumer.unwrap_or(NO_PEER)),
            BinaryBytes(channel.capacity),
            channel.note,
        ));
    }
    text
}
