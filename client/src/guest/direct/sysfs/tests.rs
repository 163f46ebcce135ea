// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Sessions over a folder of ordinary files. `ci/tests/transports/sysfs.rs` has those of real
//! guests.
#![expect(unsafe_code, reason = "a test forks, as programs do")]

use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, symlink};

use barlink_protocol::wire::layout::{
    BROKER_PAGE, BrokerName, Channel, End, Layout, Name, Policy, presence,
};
use tempfile::TempDir;

use super::*;
use crate::guest::direct::claim::{Claim, ClaimFault};
use crate::guest::direct::find::{Opened, open_sysfs};
use crate::guest::direct::folder;
use crate::memory::RingRegion;
use crate::removal::Removable;

const ADDRESS: &str = "0000:01:00.0";
const SIZE: u64 = 1 << 20;
/// Offset of the page of slot 1 of two.
const PAGE: u64 = SIZE - 2 * PAGE_SIZE;
/// Bit of the command register for memory.
const ON: u8 = 2;

/// A folder like `/sys/bus/pci/devices`, with one device of slot 1.
pub(crate) struct Fake(TempDir);

impl Fake {
    pub(crate) fn new() -> Self {
        let fake = Fake(tempfile::tempdir().unwrap());
        std::fs::create_dir(fake.path("")).unwrap();
        fake.write("vendor", b"0x1af4\n");
        fake.write("device", b"0x1110\n");
        fake.write("config", &[0, 0, 0, 0, ON, 0]);
        fake.write("enable", b"0\n");
        let bars = format!(
            "0xfebd1000 0xfebd10ff 0x40200\n0x0 0x0 0x0\n{:#x} {:#x} 0x14220c\n",
            0x3_8000_0000_u64,
            0x3_8000_0000 + SIZE - 1
        );
        fake.write("resource", bars.as_bytes());
        let mut registers = vec![0; PAGE_SIZE as usize];
        registers[uapi::REGISTER_ID] = 1;
        fake.write("resource0", &registers);
        fake.write("resource2", &vec![0; SIZE as usize]);
        fake.publish(&layout(&["up", "down"]));
        fake
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(ADDRESS).join(name)
    }

    fn write(&self, name: &str, content: &[u8]) {
        std::fs::write(self.path(name), content).unwrap();
    }

    fn publish(&self, layout: &Layout) {
        for (index, word) in layout.encode().iter().enumerate() {
            self.store(8 * index as u64, *word);
        }
    }

    fn region(&self) -> File {
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .open(self.path("resource2"))
            .unwrap()
    }

    fn store(&self, offset: u64, word: u64) {
        self.region()
            .write_all_at(&word.to_le_bytes(), offset)
            .unwrap();
    }

    fn load(&self, offset: u64) -> u64 {
        let mut word = [0; 8];
        self.region().read_exact_at(&mut word, offset).unwrap();
        u64::from_le_bytes(word)
    }

    /// Takes the last doorbell away.
    pub(crate) fn rung(&self) -> u32 {
        let path = self.path("resource0");
        let file = File::options().read(true).write(true).open(path).unwrap();
        let mut word = [0; 4];
        file.read_exact_at(&mut word, uapi::REGISTER_DOORBELL as u64)
            .unwrap();
        file.write_all_at(&[0xff; 4], uapi::REGISTER_DOORBELL as u64)
            .unwrap();
        u32::from_le_bytes(word)
    }

    fn open(&self, access: Access, cache: Cache) -> Result<Arc<Session>, String> {
        let address = ADDRESS.parse().unwrap();
        let opened = open(self.0.path(), address, access, cache);
        let opened = opened.map(|(session, _)| Arc::new(session));
        opened.map_err(|error| error.to_string())
    }

    /// Opens the device as a program does.
    pub(crate) fn open_for_writing(&self) -> Opened {
        let address = ADDRESS.parse().unwrap();
        open_sysfs(self.folder(), address, Cache::Same, Access::ReadWrite).unwrap()
    }

    /// Returns the folder of all devices.
    pub(crate) fn folder(&self) -> &Path {
        self.0.path()
    }

    /// Makes the file for mappings that are write-combining.
    pub(crate) fn permit_write_combining(&self) {
        std::fs::hard_link(self.path("resource2"), self.path("resource2_wc")).unwrap();
    }

    /// Takes the lock under which programs change the page, as another program.
    pub(crate) fn lock(&self) -> impl Drop + use<> {
        let locks = Locks::new(Arc::new(self.region()), PAGE, PathBuf::new());
        locks.lock().unwrap()
    }

    /// Answers all questions, as a broker. Returns their number.
    pub(crate) fn answer(&self) -> u64 {
        let asked = self.load(PAGE + presence::ASKED);
        self.store(BROKER_PAGE + presence::ANSWERS + 8, asked);
        asked
    }

    fn writer(&self) -> Arc<Session> {
        self.open(Access::ReadWrite, Cache::Same).unwrap()
    }

    /// Claims the producer of the first channel.
    pub(crate) fn claim(&self) -> Claim {
        self.writer().claim(0, End::Producer).unwrap()
    }

    /// Takes the device as a driver does.
    pub(crate) fn begin_as_driver(&self) {
        self.store(PAGE, self.load(PAGE) + 2);
    }

    /// Maps the superblock for reading.
    pub(crate) fn superblock(&self) -> RingRegion {
        let file = self.region();
        let page = Mapping::map(&file, PAGE_SIZE as usize, Access::ReadOnly);
        page.unwrap().region()
    }

    /// Takes the region away, as a VM does that goes back to a snapshot.
    pub(crate) fn lose_region(&self) {
        self.region()
            .write_all_at(&vec![0; SIZE as usize], 0)
            .unwrap();
    }

    /// Returns whether the region has zeros alone.
    pub(crate) fn is_zero(&self) -> bool {
        let region = std::fs::read(self.path("resource2")).unwrap();
        region.iter().all(|byte| *byte == 0)
    }

    fn holder(&self, channel: usize, end: End) -> u64 {
        self.load(PAGE + presence::holder(channel, end))
    }
}

/// Returns a layout with two slots and a reserve. Channels go from slot 1 to the host.
fn layout(names: &[&str]) -> Layout {
    let layout = Layout::new(SIZE, 2, 3, SIZE / 2, 0, &[]).unwrap();
    let mut layout = layout.with_reserve(FIRST_FREE, SIZE / 4).unwrap();
    layout.identity.name = BrokerName::new("test").unwrap();
    for name in names {
        let channel = Channel {
            name: Name::new(name).unwrap(),
            producer: 1,
            consumer: 2,
            vector: 1,
            policy: Policy::Wait,
            offset: layout.room().0,
            capacity: 4096,
        };
        layout.append(channel).unwrap();
    }
    layout
}

const HOST: u32 = 2 << 16;

#[test]
fn epoch_lasts_from_first_to_last_session() {
    let fake = Fake::new();
    let epoch = || fake.load(PAGE);
    // What a driver that was killed with its VM may have left.
    fake.store(PAGE, 7);
    fake.store(PAGE + presence::holder(1, End::Producer), 5 << 32 | 6);
    let first = fake.writer();
    assert_eq!((epoch(), fake.holder(1, End::Producer)), (9, 0));
    assert_eq!(fake.load(PAGE + presence::ADDRESS), 0x3_8000_0000);
    assert_eq!(fake.rung(), HOST);
    let second = fake.writer();
    let reader = fake.open(Access::ReadOnly, Cache::Same).unwrap();
    drop(first);
    assert_eq!(epoch(), 9, "another session is there");
    assert_eq!(reader.info().unwrap().epoch, 9);
    drop(second);
    assert_eq!(
        (epoch(), fake.rung()),
        (10, HOST),
        "a reader begins and ends nothing"
    );
    drop(fake.writer());
    assert_eq!(epoch(), 12);
}

/// Others take an end whose driver's epoch is even (`docs/protocol.md`, section 3), so the mapping
/// comes first.
#[test]
fn epoch_ends_after_mapping() {
    let fake = Fake::new();
    let opened = fake.open_for_writing();
    let region = opened.mapping.region();
    let claim = opened.session.claim(0, End::Producer).unwrap();
    drop((opened, claim));
    assert_eq!(fake.load(PAGE) % 2, 1, "the region can be written");
    region.store(FIRST_FREE, 1);
    assert_eq!(fake.rung(), HOST, "the end is free");
    drop(region);
    assert_eq!((fake.load(PAGE) % 2, fake.rung()), (0, HOST));
}

#[test]
fn forked_process_ends_epoch_after_mapping() {
    let fake = Fake::new();
    let opened = fake.open_for_writing();
    let pipes = [(); 2].map(|()| std::io::pipe().unwrap());
    let [(mut told, mut tell), (mut heard, mut answer)] = pipes;
    // SAFETY: the forked process only uses the device and the pipes, and no other thread of this
    // process has a lock that these need.
    if unsafe { libc::fork() } == 0 {
        let claim = opened.session.claim(0, End::Producer).unwrap();
        let mut step = || {
            answer.write_all(b"x").unwrap();
            told.read_exact(&mut [0]).unwrap();
        };
        step();
        drop(claim);
        step();
        drop(opened);
        step();
        std::process::exit(0);
    }
    let mut hear = || heard.read_exact(&mut [0]).unwrap();
    hear();
    assert_ne!(fake.holder(0, End::Producer), 0);
    drop(opened);
    tell.write_all(b"x").unwrap();
    hear();
    let after = (fake.holder(0, End::Producer), fake.load(PAGE) % 2);
    assert_eq!(after, (0, 1), "the child has the mapping");
    tell.write_all(b"x").unwrap();
    hear();
    assert_eq!(fake.load(PAGE) % 2, 0);
    tell.write_all(b"x").unwrap();
}

#[test]
fn claim_by_locks_is_exclusive() {
    let fake = Fake::new();
    let sessions = [fake.writer(), fake.writer()];
    let claim = sessions[0].claim(0, End::Producer).unwrap();
    let word = fake.holder(0, End::Producer);
    assert_eq!(word as u32, std::process::id());
    assert!(word >> 32 != 0);
    assert_eq!(fake.rung(), HOST);
    for session in &sessions {
        let refused = session.claim(0, End::Producer).unwrap_err();
        assert!(matches!(refused, ClaimFault::Held), "{refused:?}");
        let elsewhere = session.claim(0, End::Consumer).unwrap_err();
        assert!(matches!(elsewhere, ClaimFault::NotHere), "{elsewhere:?}");
        let unknown = session.claim(2, End::Producer).unwrap_err();
        assert!(matches!(unknown, ClaimFault::NotHere), "{unknown:?}");
    }
    let other = sessions[1].claim(1, End::Producer).unwrap();
    drop(claim);
    assert_eq!((fake.holder(0, End::Producer), fake.rung()), (0, HOST));
    let again = sessions[1].claim(0, End::Producer).unwrap();
    assert_ne!(
        fake.holder(0, End::Producer),
        word,
        "each claim has its number"
    );
    // Ends outlive their device.
    drop(sessions);
    assert_eq!(fake.load(PAGE) % 2, 1);
    drop((other, again));
    assert_eq!(fake.load(PAGE) % 2, 0);
}

#[test]
fn sweep_removes_holder_without_lock() {
    let fake = Fake::new();
    let session = fake.writer();
    let claim = session.claim(0, End::Producer).unwrap();
    let held = fake.holder(0, End::Producer);
    // A process that was killed.
    fake.store(PAGE + presence::holder(1, End::Producer), 5 << 32 | 6);
    fake.store(PAGE + presence::holder(40, End::Consumer), 5 << 32 | 6);
    fake.rung();
    session.state().swept = None;
    session.sweep();
    assert_eq!(fake.holder(1, End::Producer), 0);
    assert_eq!(fake.holder(40, End::Consumer), 0);
    assert_eq!(fake.holder(0, End::Producer), held);
    assert_eq!(fake.rung(), HOST);
    // A second sweep follows after a while.
    fake.store(PAGE + presence::holder(1, End::Producer), 5 << 32 | 6);
    session.sweep();
    assert_ne!(fake.holder(1, End::Producer), 0);
    // A claim looks at once.
    let next = fake.writer().claim(1, End::Producer).unwrap();
    assert_eq!(fake.holder(1, End::Producer) as u32, std::process::id());
    drop((claim, next));
}

#[test]
fn other_epoch_ends_session() {
    let fake = Fake::new();
    let session = fake.writer();
    let claim = session.claim(0, End::Producer).unwrap();
    assert_eq!(session.wait(Some(Duration::ZERO)), Ok(false));
    // A driver takes the device.
    fake.store(PAGE, 3);
    fake.store(PAGE + presence::holder(0, End::Producer), 5 << 32 | 6);
    assert_eq!(session.wait(None), Ok(true));
    assert_eq!(session.ask(), Err(Errno::NODEV));
    let error = session.info().unwrap_err();
    assert_eq!(error.kind(), crate::ErrorKind::Gone);
    // It changes nothing of the driver's.
    drop((claim, session));
    assert_eq!(
        (fake.load(PAGE), fake.holder(0, End::Producer)),
        (3, 5 << 32 | 6)
    );
}

#[test]
fn session_reports_lost_region() {
    let fake = Fake::new();
    let session = fake.writer();
    session.info().unwrap();
    fake.lose_region();
    for error in [session.info().unwrap_err(), session.refresh().unwrap_err()] {
        assert!(matches!(error, DeviceError::Lost { .. }), "{error}");
    }
    let refused = session.claim(0, End::Producer).unwrap_err();
    let is_lost = matches!(refused, ClaimFault::Device(DeviceError::Lost { .. }));
    assert!(is_lost, "{refused:?}");
    assert_eq!(session.wait(Some(Duration::ZERO)), Ok(false), "not gone");
    assert!(session.ask().is_err());
    session.sweep();
    drop(session);
    assert!(fake.is_zero());
}

#[test]
fn questions_of_all_sessions_are_counted() {
    let fake = Fake::new();
    let sessions = [fake.writer(), fake.writer()];
    fake.rung();
    assert_eq!((sessions[0].ask(), fake.rung()), (Ok(1), HOST));
    assert_eq!((sessions[1].ask(), fake.rung()), (Ok(2), HOST));
    assert_eq!(fake.load(PAGE + presence::ASKED), 2);
    let reader = fake.open(Access::ReadOnly, Cache::Same).unwrap();
    assert_eq!(reader.ask(), Err(Errno::BADF));
    assert!(reader.again(Access::ReadWrite).unwrap().ask().is_ok());
}

#[test]
fn session_takes_only_valid_new_channels() {
    let fake = Fake::new();
    let session = fake.writer();
    // Entries that the session has, and all else of the page, are not read again.
    fake.publish(&layout(&["forged", "down", "new"]));
    assert!(session.refresh().unwrap());
    let names = session.layout();
    let names: Vec<_> = names
        .channels()
        .iter()
        .map(|it| it.name.to_string())
        .collect();
    assert_eq!(names, ["up", "down", "new"]);
    fake.store(table_count(), 60);
    assert!(!session.refresh().unwrap());
    fake.store(table_count(), 1);
    assert!(!session.refresh().unwrap());
    assert_eq!(session.layout().channels().len(), 3);
}

fn table_count() -> u64 {
    barlink_protocol::wire::layout::TABLE_COUNT
}

#[test]
fn refuses_devices_that_are_not_barlinks() {
    let open = |change: &dyn Fn(&Fake)| {
        let fake = Fake::new();
        change(&fake);
        fake.open(Access::ReadWrite, Cache::Same).unwrap_err()
    };
    for (expected, change) in [
        (
            "no PCI device 0000:01:00.0: `lspci",
            &(|fake: &Fake| std::fs::remove_dir_all(fake.path("")).unwrap()) as &dyn Fn(&Fake),
        ),
        (
            "device over vhost-user works with the driver only",
            &|fake: &Fake| fake.write("device", b"0x1046\n"),
        ),
        ("is 1af4:1041, not 1af4:1110: `lspci", &|fake: &Fake| {
            fake.write("device", b"0x1041\n");
        }),
        (
            "driver barlink has PCI device 0000:01:00.0: use its node, /dev/barlinkN",
            &|fake: &Fake| symlink("../../drivers/barlink", fake.path("driver")).unwrap(),
        ),
        (
            "use vfio:0000:01:00.0, or take the device from it (echo 0000:01:00.0 >/sys/bus/pci/drivers/vfio-pci/unbind)",
            &|fake: &Fake| symlink("../../drivers/vfio-pci", fake.path("driver")).unwrap(),
        ),
        ("cannot be used", &|fake: &Fake| fake.store(0, 0)),
        ("its ID is 1, of 1 slots", &|fake: &Fake| {
            fake.publish(&Layout::new(SIZE, 1, 1, SIZE / 2, 0, &[]).unwrap());
        }),
        ("BAR 2 is missing", &|fake: &Fake| {
            fake.write("resource", b"0xf0 0xff 0x0\n");
        }),
        (
            // The file accepts the 1, and the device stays off.
            "`echo 1 >/sys/bus/pci/devices/0000:01:00.0/enable` as root",
            &|fake: &Fake| fake.write("config", &[0; 6]),
        ),
    ] {
        let error = open(change);
        assert!(error.contains(expected), "{error}, not {expected}");
    }
}

#[test]
fn sessions_share_one_cache_mode() {
    let fake = Fake::new();
    fake.permit_write_combining();
    let refused = |access, cache| fake.open(access, cache).unwrap_err();
    let error = refused(Access::ReadWrite, Cache::WriteBack);
    assert!(
        error.contains("cannot be mapped write-back: without the driver"),
        "{error}"
    );
    let asked = |session: &Session| session.info().unwrap().asked;
    let combining = CacheMode::WriteCombining as u32;
    let first = fake.open(Access::ReadWrite, Cache::WriteCombining).unwrap();
    assert_eq!(asked(&first), combining);
    assert_eq!(fake.load(PAGE + presence::CACHE) >> 8, u64::from(combining));
    assert_eq!(asked(&fake.writer()), combining);
    let error = refused(Access::ReadWrite, Cache::Noncached);
    assert!(
        error.contains("another process has it mapped write-combining"),
        "{error}"
    );
    let reader = fake.open(Access::ReadOnly, Cache::Noncached).unwrap();
    assert_eq!(asked(&reader), combining, "a reader follows");
    drop((first, reader));
    assert_eq!(asked(&fake.writer()), CacheMode::UncachedMinus as u32);
}

#[test]
fn driver_decides_interface_to_candidates() {
    let fake = Fake::new();
    let found = || {
        let found = folder::candidates(fake.0.path()).into_iter();
        found.map(|(_, way)| way).collect::<Vec<_>>()
    };
    std::fs::create_dir(fake.0.path().join("0000:02:00.0")).unwrap();
    std::fs::create_dir(fake.0.path().join("other")).unwrap();
    assert_eq!(found(), [Way::Sysfs]);
    for (driver, ways) in [("vfio-pci", &[Way::Vfio][..]), ("barlink", &[])] {
        symlink(format!("../../drivers/{driver}"), fake.path("driver")).unwrap();
        assert_eq!(found(), ways);
        std::fs::remove_file(fake.path("driver")).unwrap();
    }
}
