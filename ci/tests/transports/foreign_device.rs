// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A vhost-user device that has the virtio type of barlink's device, but is not one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use anyhow::Result;
use barlink_protocol::wire::virtio::{MAGIC, QUEUE_SIZE, QUEUES, VERSION, config};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{
    VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserVirtioFeatures,
};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// The property in which the device differs from barlink's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// The device's configuration space has no magic number.
    Magic,
    /// The device's configuration space has another version.
    Version,
    /// It has no shared memory.
    NoMemory,
    /// It has shared memory, into which it never maps a file.
    NotMapped,
}

impl Fault {
    pub const ALL: [Fault; 4] = [
        Fault::Magic,
        Fault::Version,
        Fault::NoMemory,
        Fault::NotMapped,
    ];

    /// Returns the message with which the driver declines the device.
    pub fn message(self) -> &'static str {
        match self {
            Fault::Magic => {
                "declined: no barlink device: magic 0x00000000, not 0x6c726162, version 1"
            }
            Fault::Version => {
                "declined: no barlink device: magic 0x6c726162, not 0x6c726162, version 2"
            }
            Fault::NoMemory => "declined: it has no shared memory of whole pages",
            Fault::NotMapped => "declined: the host has mapped no region within 10 s",
        }
    }
}

/// Starts a thread that serves the device to one VM, and returns QEMU's arguments for it.
pub fn start(folder: &Path, fault: Fault) -> Result<Vec<String>> {
    let path = socket(folder, fault);
    let mut listener = Listener::new(&path, true)?;
    thread::spawn(move || {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let device = Arc::new(ForeignDevice(fault));
        let mut daemon = VhostUserDaemon::new(format!("{fault:?}"), device, memory)
            .map_err(|error| io::Error::other(error.to_string()))?;
        let served = daemon.start(&mut listener).and_then(|()| daemon.wait());
        served.map_err(|error| io::Error::other(error.to_string()))
    });
    let place = format!("id={fault:?},chardev={fault:?}-socket");
    Ok([
        "-chardev".to_owned(),
        format!("socket,id={fault:?}-socket,path={}", path.display()),
        "-device".to_owned(),
        format!(
            "vhost-user-test-device-pci,{place},virtio-id=6,num_vqs={QUEUES},vq_size={QUEUE_SIZE},config_size={}",
            config::SIZE
        ),
    ]
    .into())
}

fn socket(folder: &Path, fault: Fault) -> PathBuf {
    folder.join(format!("{fault:?}.sock"))
}

struct ForeignDevice(Fault);

impl VhostUserBackend for ForeignDevice {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE.into()
    }

    fn features(&self) -> u64 {
        1 << 32 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let all = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::BACKEND_SEND_FD
            | VhostUserProtocolFeatures::REPLY_ACK;
        if self.0 == Fault::NoMemory {
            all
        } else {
            all | VhostUserProtocolFeatures::SHMEM
        }
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let version = if self.0 == Fault::Version { 2 } else { VERSION };
        let mut bytes = [0; config::SIZE];
        if self.0 != Fault::Magic {
            bytes[config::MAGIC..][..4].copy_from_slice(&MAGIC.to_le_bytes());
        }
        bytes[config::VERSION..][..4].copy_from_slice(&version.to_le_bytes());
        bytes[offset as usize..][..size as usize].to_vec()
    }

    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(1, &[1 << 20]))
    }

    fn update_memory(&self, _memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        Ok(())
    }

    fn handle_event(
        &self,
        _event: u16,
        _set: EventSet,
        _queues: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        Ok(())
    }
}
