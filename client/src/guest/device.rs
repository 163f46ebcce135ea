// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A barlink device, and the ends of channels that it claims.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};

use barlink_protocol::wire::layout::{End, Identity, Layout};
use barlink_protocol::wire::uapi::{self, CacheMode, Info};

use crate::claim::{Held, NoConsumer, NotHere};
use crate::doorbell::Doorbells;
use crate::error::Error;
use crate::event_error::EventError;
use crate::guest::broker::{Asker, SleepQuestions};
use crate::guest::buffer::Buffer;
use crate::guest::cache::{Cache, Choice};
use crate::guest::direct::ClaimFault;
use crate::guest::error::DeviceError;
use crate::guest::events::DeviceEvents;
use crate::guest::interface::{Interface, Opened};
use crate::guest::node::system;
use crate::guest::watch::BrokerWatch;
use crate::layouts::Layouts;
use crate::memory::{Access, Mapping, RingRegion};
use crate::options::{ChannelOptions, Side, find, sealed};
use crate::receiver::Receiver;
use crate::region::Region;
use crate::removal::{self, Removal};
use crate::sender::Sender;
use crate::tap::Tap;

/// A device, open and mapped. Ends of channels outlive it. After the device was unplugged, or its
/// driver unbound, an access to its region is SIGBUS. By VFIO the memory stays, and the kernel
/// waits until the program has dropped the device, its ends and all its regions.
///
/// ```no_run
/// use barlink::Kind;
/// use barlink::guest::{self, Device};
///
/// let device: Device = guest::open("/dev/barlink0")?;
/// let mut sensor = device.sender("up")?;
/// for reading in [21.5_f32, 21.7, 21.6] {
///     sensor.send(Kind::USER, &reading.to_le_bytes())?;
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
#[derive(Debug)]
pub struct Device {
    path: PathBuf,
    interface: Interface,
    access: Access,
    mapping: Mapping,
    granted: u32,
    identity: Identity,
    slot: u32,
    layouts: Layouts,
    choice: Option<Choice>,
    /// Asks whether the broker is alive, if the device is open for writing.
    asker: Option<Asker>,
}

impl Device {
    /// Opens a device by its path, by the name of its region's broker, or by its PCI address, and
    /// maps all of its region that can be mapped.
    pub(super) fn open(device: &Path, cache: Cache, access: Access) -> Result<Self, DeviceError> {
        let Opened {
            interface,
            mapping,
            granted,
            identity,
            slot,
            layout,
            choice,
        } = Interface::open(device, cache, access)?;
        let asker = (access == Access::ReadWrite).then(|| {
            let region = interface.region(&mapping, granted);
            Asker::new(interface.clone(), region, &layout, slot)
        });
        Ok(Device {
            path: interface.path(),
            interface,
            access,
            asker,
            mapping,
            granted,
            identity,
            slot,
            layouts: Layouts::new(layout),
            choice,
        })
    }

    /// Returns the region for the ring. The mode of a mapping for reading can change to
    /// write-combining at any time, so it is always accessed as if it were.
    fn ring_region(&self) -> RingRegion {
        match self.access {
            Access::ReadOnly => {
                let granted = CacheMode::WriteCombining as u32;
                self.interface.region(&self.mapping, granted)
            }
            Access::ReadWrite => self.interface.region(&self.mapping, self.granted),
        }
    }

    /// Returns the text by which programs open the device: the path of its node, or
    /// `sysfs:0000:01:00.0` or `vfio:0000:01:00.0` with its PCI address if it is used without its
    /// driver.
    ///
    /// ```no_run
    /// // The device of the broker that `barlink serve --name camera` started.
    /// let device = barlink::guest::open("camera")?;
    /// println!("{}", device.path().display());
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whether the device has its driver. Without it a killed program is noticed late. By
    /// sysfs the claims of programs exclude each other only as long as all of them use this
    /// library, and ends poll. By VFIO there is one program at a time (`docs/install.md`).
    ///
    /// ```no_run
    /// let device = barlink::guest::open("/dev/barlink0")?;
    /// if !device.has_driver() && device.info()?.vectors == 0 {
    ///     eprintln!("{}: receivers poll", device.path().display());
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn has_driver(&self) -> bool {
        matches!(self.interface, Interface::Driver(_))
    }

    /// Returns the result of [`Cache::Auto`], if that was requested.
    ///
    /// ```no_run
    /// use barlink::guest;
    ///
    /// let device = guest::open("/dev/barlink0")?;
    /// if let Some(choice) = device.choice() {
    ///     eprintln!("cache mode {choice}");
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn choice(&self) -> Option<&Choice> {
        self.choice.as_ref()
    }

    /// Returns the name of the region's broker and the number of the region, which the driver read
    /// when it was bound. A broker that is started anew with another region has another number,
    /// whatever its name is; a successor that took the region over has the same.
    ///
    /// ```no_run
    /// use barlink::guest;
    ///
    /// // The device of the broker that `barlink serve --name camera` started.
    /// let device = guest::open("camera")?;
    /// let identity = device.identity();
    /// println!("{}, instance {}", identity.name, identity.instance);
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Returns the cache mode that the guest's kernel granted to the mapping. `None` if the driver
    /// reports a mode that this release does not know. The mapping of a device that was opened for
    /// reading follows the mode of mappings for writing, which come and go, so that its mode can
    /// have changed since.
    ///
    /// ```no_run
    /// use barlink::guest::{self, CacheMode};
    ///
    /// let device = guest::open("/dev/barlink0")?;
    /// if device.cache_mode() == Some(CacheMode::UncachedMinus) {
    ///     eprintln!("each access goes over the bus: `barlink-guest info` says why");
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn cache_mode(&self) -> Option<CacheMode> {
        CacheMode::from_number(self.granted)
    }

    /// Returns the driver's information about the device (`docs/protocol.md`, section 6).
    ///
    /// ```no_run
    /// use barlink::guest;
    ///
    /// let info = guest::open("/dev/barlink0")?.info()?;
    /// println!("slot {}, region at {:#x}", info.id, info.region_address);
    /// if info.vectors == 0 {
    ///     println!("without interrupts, receivers poll once a millisecond");
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The device is gone.
    pub fn info(&self) -> Result<Info, Error> {
        Ok(self.interface.info()?)
    }

    /// Returns the region's layout: its size, channels and raw window, as the driver last reported.
    /// The broker can add channels: see [`Device::refresh`].
    ///
    /// ```no_run
    /// use barlink::guest;
    ///
    /// let device = guest::open("/dev/barlink0")?;
    /// let slot = device.info()?.id;
    /// for channel in device.layout().channels() {
    ///     if channel.consumer == slot {
    ///         println!("this VM receives {}", channel.name);
    ///     }
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    pub fn layout(&self) -> &Layout {
        self.layouts.latest()
    }

    /// Asks the driver for the channels that were added since the device was opened, and returns
    /// the layout with them. To claim an end of a channel that the layout does not have asks as
    /// well.
    ///
    /// ```no_run
    /// use barlink::guest;
    ///
    /// let device = guest::open("/dev/barlink0")?;
    /// while device.refresh()?.find("lidar").is_none() {
    ///     std::thread::sleep(std::time::Duration::from_secs(1));
    /// }
    /// let mut lidar = device.sender("lidar")?;
    /// # drop(lidar);
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The region's channel table has an entry that the driver does not take
    /// ([`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt)), or the device is gone or has lost its
    /// region.
    pub fn refresh(&self) -> Result<&Layout, Error> {
        self.check()?;
        let forged = !self.interface.refresh()?;
        let newer = self.interface.layout()?;
        let path = self.path.clone();
        match self.layouts.extend(newer) {
            true if forged => Err(DeviceError::Table { path }.into()),
            true => Ok(self.layouts.latest()),
            false => Err(DeviceError::Replaced { path }.into()),
        }
    }

    /// Returns the region, without the drivers' pages at its end. With [`Access::ReadOnly`] its
    /// methods that write return an error, and for the first two pages they always do: these
    /// describe the region to all programs of the VM.
    ///
    /// ```no_run
    /// use barlink::guest;
    ///
    /// let device = guest::open("/dev/barlink0")?;
    /// let layout = device.layout();
    /// // The raw window, as a file.
    /// let mut bytes = vec![0; layout.raw_size as usize];
    /// device.region().copy_out(layout.raw_offset, &mut bytes)?;
    /// std::fs::write("window.bin", bytes)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn region(&self) -> Region {
        Region::new(self.ring_region(), self.mapping.writable())
    }

    /// Checks that the device is there and has its region. A VM that is taken back to a snapshot
    /// loses it: what is read from there is then mostly zeros, and what is written is lost. An end
    /// of a channel checks this by itself, at the latest ten seconds after. A program that uses
    /// [`Device::region`] checks after it has read, and before it relies on what it has written.
    ///
    /// ```no_run
    /// let device = barlink::guest::open("/dev/barlink0")?;
    /// let mut sample = [0; 64];
    /// let window = device.layout().raw_offset;
    /// device.region().copy_out(window, &mut sample)?;
    /// device.check()?;
    /// println!("{sample:?}");
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The device is gone, or has lost its region ([`ErrorKind::Gone`](crate::ErrorKind::Gone)).
    pub fn check(&self) -> Result<(), Error> {
        self.interface
            .check(&self.mapping.region())
            .map_err(|error| match error {
                EventError::Lost => {
                    let path = self.path.clone();
                    DeviceError::Lost { path }.into()
                }
                error => error.into(),
            })
    }

    /// Waits until the device is gone, unbound or unplugged, or has lost its region, for which it
    /// looks every ten seconds. When the device is gone, its mappings have lost their memory, and
    /// an access to them is SIGBUS. By VFIO the memory stays, and the kernel waits until the
    /// program has dropped the device, its ends and all its regions.
    ///
    /// ```no_run
    /// use barlink::{Kind, guest};
    ///
    /// let device = guest::open("/dev/barlink0")?;
    /// let mut sender = device.sender("up")?;
    /// std::thread::spawn(move || {
    ///     if device.wait_until_gone().is_ok() {
    ///         // Ends the program before it touches the region again.
    ///         std::process::exit(1);
    ///     }
    /// });
    /// loop {
    ///     sender.send(Kind::USER, b"alive")?;
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// `poll(2)` failed.
    pub fn wait_until_gone(&self) -> Result<(), Error> {
        loop {
            match self.interface.wait_until_gone(Some(removal::LOOK)) {
                Ok(false) if removal::is_lost(&self.mapping.region()) => return Ok(()),
                Ok(false) => (),
                Ok(true) => return Ok(()),
                Err(error) => return Err(system("wait for", &self.path, error).into()),
            }
        }
    }

    /// Returns a watch over the broker. A user who may only read the device cannot ask.
    ///
    /// ```no_run
    /// let device = barlink::guest::open("/dev/barlink0")?;
    /// println!("{}", device.watch_broker()?.is_answered()?);
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The device was opened with [`Access::ReadOnly`], and this process may not open it for
    /// writing ([`ErrorKind::PermissionDenied`](crate::ErrorKind::PermissionDenied)).
    pub fn watch_broker(&self) -> Result<BrokerWatch, Error> {
        let asker = match &self.asker {
            Some(asker) => asker.clone(),
            None => {
                let interface = self.interface.for_writing()?;
                let region = interface.region(&self.mapping, self.granted);
                Asker::new(interface, region, self.layouts.latest(), self.slot)
            }
        };
        Ok(BrokerWatch::new(asker, self.path.clone()))
    }

    /// Allocates a DMA buffer: memory of the guest that the device can reach. The size is in bytes:
    /// whole pages of 4096, and [`MAX_BUFFER`](uapi::MAX_BUFFER) (4 MiB) at the most. The memory is
    /// zeroed, and contiguous for the device. A device has one such buffer at a time.
    ///
    /// ```no_run
    /// let device = barlink::guest::open("/dev/barlink0")?;
    /// let buffer = device.buffer(64 << 10)?;
    /// buffer.region().poke(0, b"for the host")?;
    /// println!("at {:#x}", buffer.address());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The size is not valid ([`ErrorKind::InvalidInput`]), the device has a buffer already
    /// ([`ErrorKind::InUse`]), the driver is too old for buffers ([`ErrorKind::Incompatible`]), the
    /// device was opened with [`Access::ReadOnly`] ([`ErrorKind::InvalidInput`]), or there is no
    /// contiguous memory of that size. Without its driver a device has no buffer
    /// ([`ErrorKind::InvalidInput`]).
    ///
    /// [`ErrorKind::InvalidInput`]: crate::ErrorKind::InvalidInput
    /// [`ErrorKind::InUse`]: crate::ErrorKind::InUse
    /// [`ErrorKind::Incompatible`]: crate::ErrorKind::Incompatible
    pub fn buffer(&self, size: u64) -> Result<Buffer, Error> {
        Ok(self.interface.buffer(size)?)
    }

    /// Claims the sending end of a channel, with the default [`ChannelOptions`].
    ///
    /// ```no_run
    /// use std::io::Write;
    ///
    /// use barlink::{Kind, guest};
    ///
    /// let device = guest::open("/dev/barlink0")?;
    /// let mut up = device.sender("up")?;
    /// let mut load = up.reserve(64)?;
    /// load.write_all(&std::fs::read("/proc/loadavg")?)?;
    /// load.commit(Kind::USER)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`ChannelOptions::sender`], and the device is gone.
    pub fn sender(&self, name: &str) -> Result<Sender, Error> {
        ChannelOptions::new().sender(self, name)
    }

    /// Claims the receiving end of a channel, with the default [`ChannelOptions`].
    ///
    /// ```no_run
    /// use barlink::guest;
    ///
    /// let device = guest::open("/dev/barlink0")?;
    /// let mut commands = device.receiver("down")?;
    /// for command in &mut commands {
    ///     println!("the host says {:?}", command?.bytes);
    /// }
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Device::sender`].
    pub fn receiver(&self, name: &str) -> Result<Receiver, Error> {
        ChannelOptions::new().receiver(self, name)
    }

    /// Returns a tap of a channel, which begins behind the newest record. It needs no claim, and
    /// works on a device that was opened with [`Access::ReadOnly`].
    ///
    /// ```no_run
    /// use barlink::Access;
    /// use barlink::guest::OpenOptions;
    ///
    /// let options = OpenOptions::new().access(Access::ReadOnly);
    /// let mut commands = options.open("/dev/barlink0")?.tap("down")?;
    /// println!("{:?}", commands.recv()?.bytes);
    /// # Ok::<(), barlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// There is no such channel.
    pub fn tap(&self, name: &str) -> Result<Tap, Error> {
        Tap::new(self, name)
    }
}

impl AsFd for Device {
    /// Returns the descriptor of the device's file, for a program that waits for several things.
    /// `POLLERR` says that the device is gone, as [`Device::wait_until_gone`] does. It comes
    /// without being requested, so the program requests no events. Without its driver this does not
    /// end a `poll` that has begun, so use a timeout. `POLLIN` says nothing: each end of a channel
    /// has a file of its own.
    ///
    /// ```no_run
    /// use barlink::guest;
    /// use rustix::event::{PollFd, PollFlags, poll};
    ///
    /// let device = guest::open("/dev/barlink0")?;
    /// let mut receiver = device.receiver("down")?;
    /// loop {
    ///     let mut files = [
    ///         PollFd::new(&device, PollFlags::empty()),
    ///         PollFd::new(&receiver, PollFlags::IN),
    ///     ];
    ///     poll(&mut files, None)?;
    ///     if !files[0].revents().is_empty() {
    ///         // Ends the program before it touches the region again.
    ///         std::process::exit(1);
    ///     }
    ///     while let Some(record) = receiver.try_recv()? {
    ///         println!("{:?}", record.to_vec());
    ///     }
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.interface.as_fd()
    }
}

impl AsRawFd for Device {
    fn as_raw_fd(&self) -> RawFd {
        self.interface.as_fd().as_raw_fd()
    }
}

impl sealed::Side for Device {
    const PLACE: &'static str = "on the host, ";

    fn find(&self, name: &str) -> Result<usize, Error> {
        let known = find(self.layouts.latest(), name);
        known.or_else(|unknown| match self.refresh() {
            Err(Error::Device(DeviceError::Table { path })) => {
                // The driver has taken the entries before the invalid one.
                let table = Error::Device(DeviceError::Table { path });
                find(self.layouts.latest(), name).map_err(|_| table)
            }
            Err(error) => Err(error),
            Ok(layout) => find(layout, name).map_err(|_| unknown),
        })
    }

    fn removal(&self) -> Removal {
        Removal::of(self.interface.shared())
    }
}

impl Side for Device {
    fn layout(&self) -> &Layout {
        self.layouts.latest()
    }

    fn region(&self) -> Region {
        Region::new(self.ring_region(), self.mapping.writable())
    }

    fn claim(&self, name: &str, end: End) -> Result<(usize, Doorbells), Error> {
        let index = sealed::Side::find(self, name)?;
        if self.access == Access::ReadOnly {
            let name = name.to_owned();
            return Err(Error::ReadOnly { name, end });
        }
        let channel = &self.layouts.latest().channels()[index];
        if end == End::Consumer && !channel.has_consumer() {
            return Err(NoConsumer::new(name.to_owned()).into());
        }
        let device = (self.slot, self.identity);
        let claimed = self.interface.claim(index, channel.vector, end, device);
        let claimed = claimed.map_err(|fault| match fault {
            ClaimFault::Held => {
                let (channel, pid) = (name.to_owned(), None);
                Error::Held(Held { channel, end, pid })
            }
            ClaimFault::NotHere => {
                let (channel, peer) = (name.to_owned(), None);
                Error::NotHere(NotHere { channel, end, peer })
            }
            ClaimFault::Device(error) => error.into(),
        })?;
        let doorbell = uapi::Doorbell {
            // The peer is not rung if the channel has no other end.
            peer: channel.peer(end.other()),
            vector: channel.vector,
        };
        let questions = self.asker.clone().map(SleepQuestions::new);
        let region = self.mapping.region();
        let events = DeviceEvents::new(claimed, region, doorbell, questions)?;
        Ok((index, events.into()))
    }
}
