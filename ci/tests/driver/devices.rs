// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The devices of the VM, and their memory and brokers on the host.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use barlink_driver_checks::Region;
use barlink_protocol::wire::virtio;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::tap::Tap;
use barlink_vm::{Config, FIRST_FILE, Iommu, Vm};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::Signal;
use serde_json::json;

/// The kind of machine that the VM is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Machine {
    /// A machine like a user's: q35, with the devices behind PCI Express root ports.
    Usual,
    /// The usual machine with an IOMMU, for [`barlink_driver_checks::BEHIND_AN_IOMMU`].
    BehindAnIommu,
    /// A machine that can sleep in ACPI's S3 any number of times, for
    /// [`barlink_driver_checks::SLEEPING`]: QEMU's older `pc`, with PCI bridges. It has one
    /// processor because a second one at times does not start under TCG within the ten seconds for
    /// which Linux waits.
    Sleeper,
}

/// The devices of some regions. This must outlive the VM.
pub struct Devices {
    /// The configuration of the VM that has the devices.
    pub config: Config,
    taps: HashMap<Region, Arc<Tap>>,
    brokers: HashMap<Region, Arc<Served>>,
    transport: Transport,
    machine: Machine,
}

/// A broker that a check can pause.
struct Served {
    broker: Broker,
    /// The number of pauses so far.
    pauses: AtomicU32,
}

impl Served {
    /// Resumes the broker from the pause with this number, if no later pause has begun.
    fn go_on(&self, pause: u32) -> Result<()> {
        if self.pauses.load(Ordering::Acquire) == pause {
            self.broker.signal(Signal::CONT)?;
        }
        Ok(())
    }
}

impl Devices {
    /// Starts the brokers of these regions, and creates the memory of the regions without a broker.
    /// The devices with vectors use this transport.
    pub fn new(transport: Transport, machine: Machine, regions: &[Region]) -> Result<Self> {
        let mut config = Config {
            iommu: (machine == Machine::BehindAnIommu).then_some(Iommu::Remapping),
            shared_memory: transport == Transport::VhostUser,
            ends_on_reboot: true,
            ..Config::default()
        };
        if machine == Machine::Sleeper {
            config.machine = "pc";
            config.cpus = 1;
        }
        let mut devices = Self {
            config,
            taps: HashMap::new(),
            brokers: HashMap::new(),
            transport,
            machine,
        };
        for (&region, chassis) in regions.iter().zip(1..) {
            devices.add(region, transport, chassis)?;
        }
        Ok(devices)
    }

    /// Returns whether devices of this transport can be unplugged at all.
    pub fn unplug_at_all(&self) -> bool {
        unplugs(self.transport)
    }

    /// Returns the host's access to a region.
    pub fn tap(&self, region: Region) -> Result<&Arc<Tap>> {
        let tap = self.taps.get(&region);
        tap.with_context(|| format!("there is no {region:?}"))
    }

    /// Stops the broker of a region with SIGSTOP.
    pub fn pause(&self, region: Region) -> Result<()> {
        let served = self.brokers.get(&region).context("no broker")?;
        served.pauses.fetch_add(1, Ordering::AcqRel);
        served.broker.signal(Signal::STOP)
    }

    /// Resumes the broker of a region after a delay, unless it is stopped again before.
    pub fn go_on(&self, region: Region, after: Duration) -> Result<()> {
        let served = self.brokers.get(&region).context("no broker")?;
        let pause = served.pauses.load(Ordering::Acquire);
        // The thread holds a weak reference, so that the broker ends with the test.
        let served = Arc::downgrade(served);
        thread::spawn(move || {
            thread::sleep(after);
            // The broker may have ended.
            let _ = served.upgrade().map(|served| served.go_on(pause));
        });
        Ok(())
    }

    /// Plugs in the device of a region, with the arguments that `barlink qemu-args` prints.
    pub fn plug(&self, vm: &Vm, region: Region) -> Result<()> {
        let broker = &self.brokers.get(&region).context("no broker")?.broker;
        let address = json!({ "type": "unix", "data": { "path": broker.socket(region.facts().slot as usize) } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        vm.qmp(
            "chardev-add",
            &json!({ "id": socket(region), "backend": backend }),
        )?;
        let mut device = match self.transport {
            Transport::VhostUser => json!({
                "driver": "vhost-user-test-device-pci",
                "virtio-id": virtio::DEVICE_TYPE,
                "num_vqs": virtio::QUEUES,
                "vq_size": virtio::QUEUE_SIZE,
                "config_size": virtio::config::SIZE,
            }),
            _ => json!({ "driver": "ivshmem-doorbell", "vectors": region.facts().vectors }),
        };
        device["id"] = id(region).into();
        device["bus"] = port(region).into();
        device["chardev"] = socket(region).into();
        vm.plug(&device)
    }

    /// Requests the guest to release the device of a region, and unplugs it.
    pub fn unplug(&self, vm: &Vm, region: Region) -> Result<()> {
        vm.unplug(&id(region))?;
        vm.qmp("chardev-remove", &json!({ "id": socket(region) }))?;
        Ok(())
    }

    fn add(&mut self, region: Region, transport: Transport, chassis: usize) -> Result<()> {
        match region {
            Region::Main | Region::Bus => {
                let broker = self.serve(region, transport)?;
                let slot = region.facts().slot as usize;
                let mut arguments = broker.arguments_with(slot, &id(region), chassis)?;
                let is_port = |argument: &&mut String| argument.starts_with("pcie-root-port,");
                if self.machine == Machine::Sleeper {
                    let port = arguments.iter_mut().find(is_port);
                    *port.context("qemu-args prints no port")? = self.port_device(region, chassis);
                }
                self.config.arguments.extend(arguments);
            }
            Region::Plain => {
                // A broker has written the superblock. The broker has no further part in this
                // memory.
                self.serve(region, Transport::Ivshmem)?;
                let words = region.facts().size as usize / 8;
                let words = self.tap(region)?.load(0, words)?;
                self.keep(region, chassis, &words)?;
            }
            Region::Foreign => self.keep(region, chassis, &[])?,
            Region::Plugged if unplugs(transport) => {
                self.serve(region, transport)?;
                self.add_port(region, chassis);
            }
            Region::Plugged => (),
        }
        Ok(())
    }

    /// Starts the broker of a region, with the VM's slot over this transport. The host takes its
    /// tap from the first slot over ivshmem, because a tap uses ivshmem's protocol.
    fn serve(&mut self, region: Region, transport: Transport) -> Result<&Broker> {
        let facts = region.facts();
        let mut options = vec![
            format!("--size={}", facts.size),
            format!("--vectors={}", facts.vectors),
        ];
        let channels = facts.channels.iter();
        options.extend(channels.map(|channel| format!("--channel={channel}")));
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        let mut slots = vec![Transport::Ivshmem; facts.slots as usize];
        slots[facts.slot as usize] = transport;
        let tapped = slots.iter().position(|slot| *slot == Transport::Ivshmem);
        let broker = Broker::start_over(Artifacts::shared()?, &slots, &options)?;
        let tapped = tapped.context("no slot to tap")?;
        let tap = Tap::before_the_vm(&broker, tapped, facts.slots, facts.vectors)?;
        self.taps.insert(region, Arc::new(tap));
        self.config.paths.push(broker.folder().to_owned());
        let served = Served {
            broker,
            pauses: AtomicU32::new(0),
        };
        let entry = self.brokers.entry(region).insert_entry(Arc::new(served));
        Ok(&entry.into_mut().broker)
    }

    /// Adds a device over memory of its own, which begins with these words and is zero otherwise.
    fn keep(&mut self, region: Region, chassis: usize, words: &[u64]) -> Result<()> {
        let (size, id) = (region.facts().size, id(region));
        // If the VM also has a device over vhost-user, QEMU passes this memory to that device's
        // broker. The broker rejects memory that is not sealed against shrinking.
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = File::from(rustix::fs::memfd_create(&id, flags)?);
        memory.set_len(size)?;
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK)?;
        let number = FIRST_FILE + i32::try_from(self.config.files.len())?;
        self.config.files.push(Arc::new(memory.try_clone()?));
        let tap = Tap::of_memory(memory);
        tap.store(0, words)?;
        self.taps.insert(region, Arc::new(tap));
        self.add_port(region, chassis);
        let path = format!("/proc/self/fd/{number}");
        let memory = format!("memory-backend-file,id={id},mem-path={path},size={size},share=on");
        let device = format!("ivshmem-plain,bus={},memdev={id}", port(region));
        let arguments = ["-object".to_owned(), memory, "-device".to_owned(), device];
        self.config.arguments.extend(arguments);
        Ok(())
    }

    /// Adds a port whose slot is empty.
    fn add_port(&mut self, region: Region, chassis: usize) {
        let device = self.port_device(region, chassis);
        self.config.arguments.extend(["-device".to_owned(), device]);
    }

    /// Returns the arguments of a port: a root port as `barlink qemu-args` prints it, or a bridge
    /// for [`Machine::Sleeper`]. The bridge has no hot-plug controller (SHPC), which would take the
    /// first place behind it, where the device belongs.
    fn port_device(&self, region: Region, chassis: usize) -> String {
        let port = port(region);
        match self.machine {
            Machine::Usual | Machine::BehindAnIommu => {
                format!("pcie-root-port,id={port},chassis={chassis},pref64-reserve=8G")
            }
            Machine::Sleeper => format!("pci-bridge,id={port},chassis_nr={chassis},shpc=off"),
        }
    }
}

/// Returns whether devices of a transport can be unplugged from a running VM: see
/// [`barlink_driver_checks::UNPLUGGING`].
pub fn unplugs(transport: Transport) -> bool {
    transport != Transport::VfioUser
}

/// Returns QEMU's ID of the device of a region.
fn id(region: Region) -> String {
    format!("{region:?}").to_lowercase()
}

fn port(region: Region) -> String {
    format!("{}-port", id(region))
}

fn socket(region: Region) -> String {
    format!("{}-socket", id(region))
}
