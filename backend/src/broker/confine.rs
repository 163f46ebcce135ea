// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Gives up the rights that a broker does not need once it listens, as far as the kernel supports
//! it.
//!
//! * Landlock (`landlock(7)`): the broker cannot open, create, remove or execute files, use TCP,
//!   send signals to other processes, or connect to abstract sockets.
//! * A filter of system calls (`seccomp(2)`), because Landlock has no right to examine files, to
//!   change their modes and owners, to create and connect sockets, or to use the rest of the
//!   kernel. The filter is a list of permitted calls. All others return ENOSYS: a C library or a
//!   crate that begins to use a new call expects this error from an older kernel, so the broker
//!   continues.
//!
//! The broker creates no socket later; the one to the service manager exists by then
//! (`persistence/manager.rs`). A broker with a slot for vhost-user creates loopback socket pairs to
//! its own daemons (`transport/vhost_user/loopback.rs`). So it may bind to a name that the kernel
//! chooses, and connect to a name as short as that. Landlock denies connections to sockets of other
//! processes.

use std::collections::BTreeMap;

use landlock::{
    ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetError, RulesetStatus, Scope,
};
use log::{info, warn};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Size, SeccompCmpOp as Compare, SeccompCondition,
    SeccompFilter, SeccompRule,
};

/// The version of Landlock whose rights are given up. An older kernel ignores those that it does
/// not have.
const KNOWN: ABI = ABI::V6;

/// Calls that the broker and its libraries may make with any arguments.
const CALLS: &[libc::c_long] = &[
    // Open descriptors.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_preadv2,
    libc::SYS_lseek,
    // Rings of eventfds.
    libc::SYS_io_submit,
    libc::SYS_io_getevents,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    // The processes of host apps, before Linux 6.5.
    libc::SYS_pidfd_open,
    libc::SYS_setsockopt,
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    // Memory that is not executable.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // Threads, time, and signals within the process.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The parts of a confinement that are in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confined {
    /// Landlock, as far as this kernel has it.
    pub landlock: bool,
    /// The filter of system calls.
    pub filter: bool,
}

/// Confines the calling thread and the threads that it starts, and logs failures. With `loopback`
/// the broker may create loopback socket pairs.
pub fn confine(loopback: bool) -> Confined {
    let landlock = restrict();
    match &landlock {
        Ok(true) => (),
        Ok(false) => info!("this kernel has no Landlock: the broker keeps its rights to files"),
        Err(error) => warn!("the broker keeps its rights to files: {error}"),
    }
    let filter = filter(loopback);
    if let Err(error) = &filter {
        warn!("the broker keeps its rights to system calls: {error}");
    }
    Confined {
        landlock: matches!(landlock, Ok(true)),
        filter: filter.is_ok(),
    }
}

/// Confines a thread that starts before the broker runs, such as the one that writes the log.
/// Ignores errors, because the same calls fail for the broker, which logs them.
pub fn confine_early_thread() {
    let _ = restrict();
    let _ = filter(false);
}

fn restrict() -> Result<bool, RulesetError> {
    let rules = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?;
    Ok(rules.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
}

/// Bytes of an address with which a socket asks the kernel for a name, and bytes of the address
/// that it gets (`unix(7)`, "Autobind feature").
const NO_ADDRESS: u64 = 2;
const OWN_ADDRESS: u64 = 8;

fn filter(loopback: bool) -> Result<(), seccompiler::Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        CALLS.iter().map(|&call| (call, Vec::new())).collect();
    let exec = u64::from(libc::PROT_EXEC.unsigned_abs());
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    let own = u64::from(std::process::id());
    let name = u64::from(libc::PR_SET_NAME.unsigned_abs());
    // Calls with a condition on one argument.
    let conditions = [
        (libc::SYS_mmap, 2, Compare::MaskedEq(exec), 0),
        (libc::SYS_mprotect, 2, Compare::MaskedEq(exec), 0),
        // `clone3` has its flags in memory, where the filter cannot see them. It is not on the
        // list, so the C library falls back to this call.
        (libc::SYS_clone, 0, Compare::MaskedEq(thread), thread),
        (libc::SYS_tgkill, 0, Compare::Eq, own),
        (libc::SYS_prctl, 0, Compare::Eq, name),
        // The standard library makes a descriptor blocking or non-blocking by this call.
        (libc::SYS_ioctl, 1, Compare::Eq, libc::FIONBIO),
    ];
    for (call, argument, compare, value) in conditions {
        let condition = SeccompCondition::new(argument, Size::Dword, compare, value)?;
        rules.insert(call, vec![SeccompRule::new(vec![condition])?]);
    }
    if loopback {
        let unix = u64::from(libc::AF_UNIX.unsigned_abs());
        let stream = u64::from((libc::SOCK_STREAM | libc::SOCK_CLOEXEC).unsigned_abs());
        let is = |argument, value| SeccompCondition::new(argument, Size::Dword, Compare::Eq, value);
        for (call, conditions) in [
            (libc::SYS_socket, vec![is(0, unix)?, is(1, stream)?]),
            (libc::SYS_bind, vec![is(2, NO_ADDRESS)?]),
            (libc::SYS_listen, vec![is(1, 0)?]),
            (libc::SYS_connect, vec![is(2, OWN_ADDRESS)?]),
        ] {
            rules.insert(call, vec![SeccompRule::new(conditions)?]);
        }
    }
    let unknown = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let here = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, unknown, SeccompAction::Allow, here)?;
    seccompiler::apply_filter(&BpfProgram::try_from(filter)?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
    use std::process::Command;

    use rustix::io::Errno;
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    use vm_memory::mmap::MmapRegionBuilder;

    use super::*;

    /// Runs a check on a confined thread. The rest of this process keeps its rights.
    fn on_a_thread(
        confine: impl FnOnce() -> bool + Send + 'static,
        check: impl FnOnce(&std::path::Path) + Send + 'static,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        std::fs::write(path.join("file"), b"").unwrap();
        let _listener = UnixListener::bind(path.join("socket")).unwrap();
        let confined = std::thread::spawn(move || {
            let done = confine();
            if done {
                check(&path);
            }
            done
        });
        if !confined.join().unwrap() {
            eprintln!("this kernel cannot do it: the check is skipped");
        }
        std::fs::read(folder.path().join("file")).unwrap();
    }

    #[test]
    fn landlock_denies_files() {
        on_a_thread(
            || restrict().unwrap(),
            |folder| {
                std::fs::read("/etc/passwd").unwrap_err();
                std::fs::write(folder.join("file"), b"changed").unwrap_err();
                std::fs::remove_file(folder.join("file")).unwrap_err();
                std::fs::remove_file(folder.join("socket")).unwrap_err();
                std::fs::create_dir(folder.join("folder")).unwrap_err();
                std::net::TcpListener::bind("127.0.0.1:0").unwrap_err();
                Command::new("/bin/true").status().unwrap_err();
                let parent = rustix::process::getppid().unwrap();
                let signal = rustix::process::test_kill_process(parent);
                assert!(signal == Err(Errno::PERM) || !scopes_signals());
            },
        );
    }

    #[test]
    fn filter_permits_loopback_and_no_other_socket() {
        on_a_thread(
            || filter(true).is_ok(),
            |folder| {
                for _ in 0..3 {
                    let (listener, mut ours) = crate::transport::open_loopback().unwrap();
                    let (mut accepted, _) = listener.accept().unwrap();
                    ours.write_all(b"ours").unwrap();
                    let mut bytes = [0; 4];
                    accepted.read_exact(&mut bytes).unwrap();
                    assert_eq!(&bytes, b"ours");
                }
                let socket = |family, kind| {
                    let flags = SocketFlags::CLOEXEC;
                    rustix::net::socket_with(family, kind, flags, None)
                };
                for (family, kind) in [
                    (AddressFamily::INET, SocketType::STREAM),
                    (AddressFamily::UNIX, SocketType::DGRAM),
                    (AddressFamily::UNIX, SocketType::SEQPACKET),
                    (AddressFamily::NETLINK, SocketType::RAW),
                ] {
                    assert_eq!(socket(family, kind).map(drop), Err(Errno::NOSYS));
                }
                let ours = socket(AddressFamily::UNIX, SocketType::STREAM).unwrap();
                let there = SocketAddrUnix::new(folder.join("socket")).unwrap();
                let connected = rustix::net::connect(&ours, &there);
                assert_eq!(connected, Err(Errno::NOSYS));
                let another = SocketAddrUnix::new(folder.join("another")).unwrap();
                assert_eq!(rustix::net::bind(&ours, &another), Err(Errno::NOSYS));
                assert_eq!(rustix::net::listen(&ours, 1), Err(Errno::NOSYS));
            },
        );
    }

    #[test]
    fn landlock_permits_loopback_and_no_other_socket() {
        let (others, _) = crate::transport::open_loopback().unwrap();
        let name = rustix::net::getsockname(&others).unwrap();
        let _ = others.accept().unwrap();
        on_a_thread(
            || restrict().unwrap(),
            move |_| {
                drop(crate::transport::open_loopback().unwrap());
                let (unix, stream) = (AddressFamily::UNIX, SocketType::STREAM);
                let ours = rustix::net::socket_with(unix, stream, SocketFlags::CLOEXEC, None);
                let connected = rustix::net::connect(ours.unwrap(), &name);
                assert!(connected == Err(Errno::PERM) || !scopes_signals());
            },
        );
    }

    /// Returns whether Landlock limits signals: since its version 6, which is in Linux 6.12.
    fn scopes_signals() -> bool {
        let release = rustix::system::uname();
        let release = release.release().to_str().unwrap();
        let mut numbers = release
            .split(['.', '-'])
            .map_while(|part| part.parse::<u32>().ok());
        (numbers.next(), numbers.next()) >= (Some(6), Some(12))
    }

    #[test]
    fn filter_denies_sockets_programs_and_modes() {
        on_a_thread(
            || filter(false).is_ok(),
            |folder| {
                let unknown = Some(libc::ENOSYS);
                let failed = |result: std::io::Result<()>| result.unwrap_err().raw_os_error();
                let connected = UnixStream::connect(folder.join("socket")).map(drop);
                assert_eq!(failed(connected), unknown);
                assert_eq!(failed(UnixDatagram::unbound().map(drop)), unknown);
                let sent = std::net::UdpSocket::bind("127.0.0.1:0").map(drop);
                assert_eq!(failed(sent), unknown);
                Command::new("/bin/true").status().unwrap_err();
                let mode = std::fs::Permissions::from_mode(0o777);
                let changed = std::fs::set_permissions(folder.join("file"), mode);
                assert_eq!(failed(changed), unknown);
                assert_eq!(failed(std::fs::metadata(folder).map(drop)), unknown);
                let parent = rustix::process::getppid().unwrap();
                let signal = rustix::process::test_kill_process(parent);
                assert_eq!(signal, Err(Errno::NOSYS));
                let memory = MmapRegionBuilder::<()>::new(4096)
                    .with_mmap_prot(libc::PROT_READ | libc::PROT_EXEC)
                    .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
                    .build();
                assert!(memory.is_err(), "{memory:?}");
                // The broker may not create loopback socket pairs, either.
                let own = crate::transport::open_loopback().map(drop);
                assert_eq!(own, Err(Errno::NOSYS));
                // A thread can still start.
                std::thread::spawn(|| vec![0; 1 << 20]).join().unwrap();
            },
        );
    }
}
