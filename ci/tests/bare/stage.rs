// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The broker, the tap and the machine of a scene.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlink_protocol::wire::layout::{PAGE_SIZE, presence};
use barlink_sandbox::builds::Artifacts;
use barlink_sandbox::tools::Accel;
use barlink_vm::broker::{Broker, Transport};
use barlink_vm::tap::Tap;
use barlink_vm::{Bare, Config, Executor, PciDevice};
use barlink_vm_tests::wait_until;
use serde_json::json;

/// The transport and the accelerator of a scene.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub transport: Transport,
    pub accel: Accel,
}

/// The ID of the VM's slot, and of the slot that the tap comes from.
pub const VM: u32 = 0;
pub const OTHER: u32 = 1;
/// The host's ID as a peer.
pub const HOST: u32 = 2;
/// The vectors of each peer.
pub const VECTORS: u32 = 5;
/// Size of the region in bytes.
pub const REGION: u64 = 1 << 20;
/// Place of the epoch of the VM's driver in the region.
const EPOCH: u64 = REGION - PAGE_SIZE * (VM as u64 + 1) + presence::EPOCH;
/// The first vector of the processor for interrupts of a device.
pub const FIRST: u8 = 0x30;
/// The number of the processor's vectors from [`FIRST`] on that a device can have.
pub const ALL: u32 = 0xef - FIRST as u32;
/// Timeout of an interrupt.
pub const LIMIT: Duration = Duration::from_secs(20);

impl Setting {
    /// Returns the module part of the names of tests.
    pub fn module(self) -> String {
        let transport = self.transport.name().replace('-', "_");
        let accel = match self.accel {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        };
        format!("{transport}::{accel}")
    }

    /// Returns the transports of the broker's slots: that of the VM, and ivshmem for the tap.
    pub fn slots(self) -> [Transport; 2] {
        [self.transport, Transport::Ivshmem]
    }

    /// Starts a broker and takes a tap from it.
    pub fn stage(self) -> Result<Stage> {
        self.stage_of(&self.slots(), &["--size", "1M"], VECTORS)
    }

    /// Starts a broker with these slots and arguments, and takes a tap from the last slot, which is
    /// over ivshmem.
    pub fn stage_of(self, slots: &[Transport], arguments: &[&str], vectors: u32) -> Result<Stage> {
        let broker = Broker::start_over(Artifacts::shared()?, slots, arguments)?;
        self.stage_with(broker, slots.len(), vectors)
    }

    /// Starts a broker as the service of a manager that stores its descriptors, and takes a tap
    /// from it.
    pub fn managed_stage(self) -> Result<Stage> {
        let arguments = ["--size", "1M"];
        let broker = Broker::start_managed_over(Artifacts::shared()?, &self.slots(), &arguments)?;
        self.stage_with(broker, 2, VECTORS)
    }

    fn stage_with(self, broker: Broker, slots: usize, vectors: u32) -> Result<Stage> {
        let tap = Tap::before_the_vm(&broker, slots - 1, slots as u32, vectors)?;
        Ok(Stage {
            setting: self,
            broker,
            tap,
        })
    }

    /// Starts a machine.
    pub fn machine(self, config: &Config) -> Result<Bare> {
        Bare::start_by(Executor::Guest(self.accel), Artifacts::shared()?, config)
    }
}

/// A broker whose slot 0 is for the machine, and the memory and eventfds of its region.
pub struct Stage {
    pub setting: Setting,
    pub broker: Broker,
    pub tap: Tap,
}

impl Stage {
    /// Returns the configuration of a machine with the device of a slot.
    pub fn config(&self, slot: usize) -> Result<Config> {
        Ok(Config {
            memory_mib: 128,
            arguments: self.broker.arguments(slot)?,
            paths: vec![self.broker.folder().to_owned()],
            shared_memory: self.setting.transport == Transport::VhostUser,
            ..Config::default()
        })
    }

    /// Starts a machine with the device of slot 0.
    pub fn machine(&self) -> Result<(Bare, Device)> {
        let mut machine = self.setting.machine(&self.config(0)?)?;
        let device = Device::find(&mut machine, "barlink0")?;
        Ok((machine, device))
    }

    /// Rings each vector of the VM `times` times, and checks that each ring is one interrupt.
    pub fn interrupts_come(&self, machine: &mut Bare, times: u64) -> Result<()> {
        (0..VECTORS).try_for_each(|vector| self.interrupts_come_by(machine, vector, times))
    }

    /// Does the same for one vector.
    pub fn interrupts_come_by(&self, machine: &mut Bare, vector: u32, times: u64) -> Result<()> {
        let place = FIRST + vector as u8;
        for _ in 0..times {
            let before = machine.taken(place, 1)?;
            self.tap.ring(VM, vector, 1)?;
            let taken = machine.sleep_until(place, before + 1, LIMIT)? - before;
            ensure!(taken == 1, "vector {vector}: {taken} interrupts for a ring");
        }
        Ok(())
    }

    /// Stores the epoch of the VM's driver, as the driver does when it comes and goes.
    pub fn set_epoch(&self, epoch: u64) -> Result<()> {
        self.tap.store(EPOCH, &[epoch])
    }

    /// Lets a machine that is killed in round `round`, counted from 1, leave an odd epoch, except
    /// in the first round. Checks that the epoch of the machine before is even.
    pub fn hold_from_second_round(&self, round: u64) -> Result<()> {
        let epoch = self.tap.load(EPOCH, 1)?[0];
        ensure!(epoch.is_multiple_of(2), "epoch {epoch} of a former VM");
        match round {
            1 => Ok(()),
            _ => self.set_epoch(epoch + 1),
        }
    }

    /// Waits until slot 0 has no VM.
    pub fn wait_until_free(&self) -> Result<()> {
        wait_until("the slot is free", || {
            Ok(self.broker.inspect()?["broker"]["slots"][0]["vm"].is_null())
        })
    }

    /// Waits until the broker, which writes its log in a thread of its own, has logged this text.
    pub fn wait_for_log(&self, text: &str) -> Result<()> {
        wait_until(text, || Ok(self.broker.log()?.contains(text)))
            .with_context(|| self.broker.log().unwrap_or_default())
    }

    /// Checks that QEMU has written no error.
    pub fn check_quiet(&self, machine: &Bare) -> Result<()> {
        let errors = machine.errors()?;
        ensure!(errors.is_empty(), "QEMU complains: {errors}");
        Ok(())
    }
}

/// The device in a guest, with a doorbell register and an MSI-X table.
pub struct Device {
    pub pci: PciDevice,
    /// Address of the MSI-X capability in its configuration space.
    msix: u64,
}

/// Bits of the MSI-X capability.
const ENABLE: u32 = 1 << 31;
const MASK: u32 = 1 << 30;

impl Device {
    /// Finds a device by its ID, once the guest has given it addresses.
    pub fn find(machine: &mut Bare, id: &str) -> Result<Self> {
        machine.wait_for_firmware(1)?;
        let pci = machine.device(id)?;
        let mut place = machine.read(pci.config + 0x34)? & 0xff;
        while machine.read(pci.config + u64::from(place))? & 0xff != 0x11 {
            place = machine.read(pci.config + u64::from(place))? >> 8 & 0xff;
            ensure!(place != 0, "{id} has no MSI-X");
        }
        let msix = pci.config + u64::from(place);
        Ok(Self { pci, msix })
    }

    pub fn doorbell(&self) -> u64 {
        self.pci.bars[0].0 + 12
    }

    /// Address of the control word of a vector, whose lowest bit masks it.
    pub fn vector_control(&self, vector: u32) -> u64 {
        self.pci.bars[1].0 + 16 * u64::from(vector) + 12
    }

    /// Sets up the vectors, from [`FIRST`] on, and enables MSI-X.
    pub fn enable(&self, machine: &mut Bare) -> Result<()> {
        // Enables memory accesses and bus mastering.
        machine.write(self.pci.config + 4, 6)?;
        machine.set_vectors(self.pci.bars[1].0, VECTORS, FIRST, VECTORS as u8)?;
        self.set_msix(machine, true, false)
    }

    /// Enables or disables MSI-X, and masks all vectors or none.
    pub fn set_msix(&self, machine: &mut Bare, enable: bool, mask: bool) -> Result<()> {
        let bits = if enable { ENABLE } else { 0 } | if mask { MASK } else { 0 };
        machine.write(self.msix, bits)
    }
}

/// Waits until QEMU has handled all rings of the VM so far, also those that become no interrupt.
/// `register` is the address of a register that the broker answers for, except over ivshmem. The
/// broker's session takes rings and messages in batches, and QEMU serves all its sockets and
/// eventfds between two answers.
pub fn wait_for_rings(machine: &mut Bare, register: u64) -> Result<()> {
    for _ in 0..3 {
        machine.read(register)?;
        machine.qmp("query-status", &json!({}))?;
    }
    Ok(())
}
