// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The check of the table in `docs/driver.md` that says which system calls can use the region as
//! their memory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use barlink_protocol::wire::layout::PAGE_SIZE as PAGE;
use rustix::fs::{MemfdFlags, OFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::process::Pid;

use crate::ask::{RAW, Region};
use crate::binding::open;
use crate::calls::{self, Mapping};
use crate::process::{Child, Parent, child, memory_of};

/// The document with the table, and the table's first line.
const DOCUMENT: &str = include_str!("../../../../docs/driver.md");
const TITLE: &str = "| call, with the region as its memory | in the guest | on the host |";

/// A mapping, and the file that it maps.
struct Mapped<'a> {
    map: &'a Mapping,
    file: &'a dyn AsFd,
    fuse: &'a FuseFile,
}

impl Mapped<'_> {
    /// Opens a file of the FUSE file system whose calls bypass the page cache by `O_DIRECT`.
    fn direct(&self) -> std::io::Result<File> {
        self.fuse.open(OFlags::DIRECT)
    }

    /// Opens a file of the FUSE file system that has no page cache.
    fn uncached(&self) -> std::io::Result<File> {
        self.fuse.open(OFlags::empty())
    }
}

type Call = fn(&Mapped<'_>) -> Result<(), Error>;

/// An error of a system call. Other errors end the check.
struct Error(Errno);

impl From<Errno> for Error {
    fn from(error: Errno) -> Self {
        Error(error)
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Error(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

/// The rows of the table by their names, and the calls of each. All calls of a row have one result.
const ROWS: &[(&str, &[Call])] = &[
    ("`read`, `recv` into it", &[read, receive]),
    ("`write`, `send` from it", &[write, send]),
    (
        "`read`, `write` of a file opened with `O_DIRECT`",
        &[
            |mapped| Ok(mapped.map.read_from(mapped.direct()?.as_fd())?),
            |mapped| Ok(mapped.map.write_to(mapped.direct()?.as_fd())?),
        ],
    ),
    (
        "`read`, `write` of a file on virtiofs without a page cache",
        &[
            |mapped| Ok(mapped.map.read_from(mapped.uncached()?.as_fd())?),
            |mapped| Ok(mapped.map.write_to(mapped.uncached()?.as_fd())?),
        ],
    ),
    (
        "`splice`, `sendfile` of the mapped file",
        &[
            |mapped| {
                let (_read, write) = rustix::pipe::pipe()?;
                Ok(calls::splice(mapped.file.as_fd(), write.as_fd())?)
            },
            |mapped| {
                let (here, _there) = UnixStream::pair()?;
                Ok(calls::send_file(mapped.file.as_fd(), here.as_fd())?)
            },
        ],
    ),
    (
        "`vmsplice`",
        &[|mapped| {
            let (_read, write) = rustix::pipe::pipe()?;
            Ok(mapped.map.splice_to(write.as_fd())?)
        }],
    ),
    (
        "`io_uring` with registered buffers",
        &[|mapped| Ok(mapped.map.register_with_io_uring()?)],
    ),
    (
        "`process_vm_readv`, `process_vm_writev` by another process",
        &[
            |mapped| by_another(mapped, |map, owner| Ok(map.read_of(owner)?)),
            |mapped| by_another(mapped, |map, owner| Ok(map.write_of(owner)?)),
        ],
    ),
    (
        "`ptrace`, `/proc/PID/mem` by a debugger",
        &[
            |mapped| by_another(mapped, |map, owner| Ok(map.trace(owner)?)),
            |mapped| {
                by_another(mapped, |map, owner| {
                    let memory = memory_of(owner.as_raw_pid().unsigned_abs());
                    let memory = memory.map_err(|_| Errno::ACCESS)?;
                    let mut word = [0; 8];
                    memory.read_exact_at(&mut word, map.address())?;
                    Ok(memory.write_all_at(&word, map.address())?)
                })
            },
        ],
    ),
    (
        "`futex` between processes",
        &[|mapped| Ok(mapped.map.wait_at(false)?)],
    ),
    (
        "`futex` with `FUTEX_PRIVATE_FLAG`",
        &[|mapped| Ok(mapped.map.wait_at(true)?)],
    ),
    ("`msync`", &[|mapped| Ok(mapped.map.sync()?)]),
    (
        "`madvise` with `MADV_POPULATE_WRITE`",
        &[|mapped| Ok(mapped.map.advise(Advice::LinuxPopulateWrite)?)],
    ),
    (
        "`madvise` with `MADV_DONTNEED`",
        &[|mapped| Ok(mapped.map.advise(Advice::LinuxDontNeed)?)],
    ),
    (
        "`madvise` with `MADV_DONTFORK`",
        &[|mapped| Ok(mapped.map.advise(Advice::LinuxDontFork)?)],
    ),
    (
        "`madvise` with `MADV_DOFORK`",
        &[|mapped| Ok(mapped.map.advise(Advice::LinuxDoFork)?)],
    ),
    // This call is the last, because the kernel drops no pages that are locked.
    ("`mlock`", &[|mapped| Ok(mapped.map.lock()?)]),
];

fn read(mapped: &Mapped<'_>) -> Result<(), Error> {
    Ok(mapped.map.read_from(File::open("/dev/zero")?.as_fd())?)
}

fn write(mapped: &Mapped<'_>) -> Result<(), Error> {
    let (_read, write) = rustix::pipe::pipe()?;
    Ok(mapped.map.write_to(write.as_fd())?)
}

fn receive(mapped: &Mapped<'_>) -> Result<(), Error> {
    let (here, mut there) = UnixStream::pair()?;
    there.write_all(b"bytes")?;
    Ok(mapped.map.receive_from(here.as_fd())?)
}

fn send(mapped: &Mapped<'_>) -> Result<(), Error> {
    let (here, _there) = UnixStream::pair()?;
    Ok(mapped.map.send_to(here.as_fd())?)
}

/// Calls a function with the ID of another process that has the same mapping.
fn by_another(
    mapped: &Mapped<'_>,
    call: impl Fn(&Mapping, Pid) -> Result<(), Error>,
) -> Result<(), Error> {
    let other = child(Parent::wait).map_err(|_| Errno::CHILD)?;
    call(mapped.map, other.pid())
}

/// A file of a FUSE file system, as virtiofs is one. A child process serves it.
struct FuseFile {
    server: Option<Child>,
}

impl FuseFile {
    const PATH: &str = "/tmp/fuse-file";
    const PLACE: &std::ffi::CStr = c"/tmp/fuse-file";

    fn new() -> Result<Self> {
        fs::write(Self::PATH, [])?;
        let line = File::options().read(true).write(true).open("/dev/fuse")?;
        calls::mount_fuse_file(line.as_fd(), Self::PLACE).context("cannot mount")?;
        let server = child(|_| serve(&line))?;
        Ok(Self {
            server: Some(server),
        })
    }

    fn open(&self, flags: OFlags) -> std::io::Result<File> {
        let flags = flags.bits().cast_signed();
        let mut options = File::options();
        options.read(true).write(true).custom_flags(flags);
        options.open(Self::PATH)
    }

    /// Unmounts the file, by which the server ends.
    fn end(mut self) -> Result<()> {
        calls::unmount(Self::PLACE)?;
        self.server.take().context("ended twice")?.succeeds()
    }
}

impl Drop for FuseFile {
    fn drop(&mut self) {
        if self.server.is_some() {
            // The check has failed already.
            let _ = calls::unmount(Self::PLACE);
        }
    }
}

/// Answers the requests for a file of zeros that takes any bytes (`include/uapi/linux/fuse.h`).
fn serve(mut line: &File) -> Result<()> {
    const LARGEST: u32 = 64 << 10;
    const ENOSYS: i32 = -38;
    let mut request = vec![0; 2 * LARGEST as usize];
    loop {
        let length = match line.read(&mut request) {
            Ok(length) => length,
            Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => {
                return Ok(());
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("no request"),
        };
        ensure!(length >= 40, "a request of {length} bytes");
        let word = |offset: usize| -> Result<u32> {
            let bytes = request[..length].get(offset..offset + 4);
            Ok(u32::from_ne_bytes(
                bytes.context("a short request")?.try_into()?,
            ))
        };
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let answer: Result<Vec<u8>, i32> = match word(4)? {
            // FORGET, INTERRUPT and BATCH_FORGET have no answer.
            2 | 36 | 42 => continue,
            // GETATTR: valid for no time; a file of mode 0600 and a MiB with one link.
            3 => {
                let mut attributes = vec![0; 26];
                (attributes[4], attributes[6]) = (1, 1 << 20);
                (attributes[19], attributes[20], attributes[24]) = (0o100_600, 1, 4096);
                Ok(words(&attributes))
            }
            // OPEN: FOPEN_DIRECT_IO unless the file is opened with O_DIRECT.
            14 => {
                let direct = OFlags::from_bits_retain(word(40)?).contains(OFlags::DIRECT);
                Ok(words(&[0, 0, u32::from(!direct), 0]))
            }
            15 => Ok(vec![0; word(56)?.min(LARGEST) as usize]),
            16 => Ok(words(&[word(56)?, 0])),
            18 => Ok(Vec::new()),
            // INIT: version 7.31, and the largest write.
            26 => {
                let mut init = vec![0; 16];
                (init[0], init[1], init[5]) = (7, 31, LARGEST);
                Ok(words(&init))
            }
            _ => Err(ENOSYS),
        };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(error) => (error, Vec::new()),
        };
        let mut bytes = (16 + body.len() as u32).to_ne_bytes().to_vec();
        bytes.extend(error.to_ne_bytes());
        bytes.extend(&request[8..16]);
        bytes.extend(body);
        match line.write(&bytes) {
            Ok(_) => (),
            // The request was given up meanwhile.
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => (),
            Err(error) => return Err(error).context("cannot answer"),
        }
    }
}

/// Returns the rows of the table: the results in the guest and on the host, by call.
fn documented() -> Result<BTreeMap<&'static str, [&'static str; 2]>> {
    let rows = DOCUMENT.lines().skip_while(|line| *line != TITLE).skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        let &[call, guest, host] = cells.as_slice() else {
            anyhow::bail!("not three cells: {row}");
        };
        Ok((call, [guest, host]))
    })
    .collect()
}

fn outcome(result: &Result<(), Error>) -> String {
    match result {
        Ok(()) => "works".to_owned(),
        Err(Error(Errno::FAULT)) => "EFAULT".to_owned(),
        Err(Error(Errno::INVAL)) => "EINVAL".to_owned(),
        Err(Error(other)) => format!("{other:?}"),
    }
}

pub(super) fn system_calls_use_region_as_documented() -> Result<()> {
    let rows = documented()?;
    let device = open(Region::Main)?;
    // The host's region is a memfd, and so is this one.
    let memory: OwnedFd = rustix::fs::memfd_create("region", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&memory, 4 * PAGE)?;
    let maps = [
        device.map(RAW, 4 * PAGE)?,
        Mapping::new(
            memory.as_fd(),
            0,
            4 * PAGE,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
        )?,
    ];
    for map in &maps {
        // The child has the mapping, and all processes see its writes.
        child(|_| {
            map.write(8, 4711);
            Ok(())
        })?
        .succeeds()?;
        assert_eq!(map.read(8), 4711);
    }
    let fuse = FuseFile::new()?;
    let files: [&dyn AsFd; 2] = [&device, &memory];
    let mut found = BTreeMap::new();
    for (name, calls) in ROWS {
        let results = [0, 1].map(|side| {
            let mapped = Mapped {
                map: &maps[side],
                file: files[side],
                fuse: &fuse,
            };
            let mut results: Vec<_> = calls.iter().map(|call| outcome(&call(&mapped))).collect();
            results.dedup();
            results.join(", ")
        });
        found.insert(*name, results);
    }
    fuse.end()?;
    let rows: BTreeMap<_, _> = rows
        .into_iter()
        .map(|(call, results)| (call, results.map(str::to_owned)))
        .collect();
    assert_eq!(found, rows);
    Ok(())
}
