// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command `barlink serve`.

use std::io::{self, ErrorKind, pipe};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use barlink::control::client::ControlError;
use barlink_broker::broker::{
    self, Broker, BrokerError, CheckError, Checked, Config, Exit, Listener, Policy, Predecessor,
};
use barlink_broker::persistence;
use barlink_broker::transport::{Ivshmem, Transport, VfioUser, VhostUser};
use barlink_cli::standard::print;
use indicatif::BinaryBytes;
use log::{info, warn};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Resource, geteuid};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::Misuse;
use super::sweeper::Sweeper;
use crate::args::{Serve, TransportKind};

pub fn serve(args: Serve) -> Result<()> {
    if args.check {
        return check(args);
    }
    let needed = descriptors(&args);
    // A broker that has given up its rights cannot ask for them.
    let limits = Limits::of_this_process();
    run(args).map_err(|error| with_cure(error, needed, &limits))
}

/// The limits of a process that errors name.
struct Limits {
    files: String,
    address_space: String,
    file_size: String,
    processes: String,
}

impl Limits {
    fn of_this_process() -> Self {
        let limit = |resource| {
            let limit = rustix::process::getrlimit(resource).current;
            limit.map_or("no limit".to_owned(), |limit| limit.to_string())
        };
        Limits {
            files: limit(Resource::Nofile),
            address_space: limit(Resource::As),
            file_size: limit(Resource::Fsize),
            processes: limit(Resource::Nproc),
        }
    }
}

/// Descriptors of a broker beside its eventfds: its own, and those of host apps and sessions.
const OTHER_DESCRIPTORS: u64 = 640;

/// Returns how many descriptors a broker with these arguments needs.
fn descriptors(args: &Serve) -> u64 {
    let slots = args.sockets.0.len() as u64;
    let reserve = args.reserve.unwrap_or_default();
    let channels = match args.channel.len() as u64 {
        0 => 2 * slots,
        channels => channels,
    };
    let vectors = match u64::from(args.vectors) {
        0 => channels + 1,
        vectors => vectors,
    };
    (slots + 1) * (vectors + u64::from(reserve.vectors)) + OTHER_DESCRIPTORS
}

/// Adds to an error what to do about a limit of the process.
fn with_cure(error: anyhow::Error, needed: u64, limits: &Limits) -> anyhow::Error {
    let system = error.chain().find_map(|cause| {
        let error: &io::Error = cause.downcast_ref()?;
        error.raw_os_error()
    });
    match system {
        Some(libc::EMFILE) => error.context(format!(
            "the limit on open files, {}, is too low: raise it to {needed} (`ulimit -n {needed}`; LimitNOFILE= in a unit)",
            limits.files
        )),
        Some(libc::ENOMEM) => error.context(format!(
            "the memory does not suffice, or the limit on address space, {}, is too low: take a smaller --size, or raise the limit (`ulimit -v`; LimitAS= in a unit)",
            limits.address_space
        )),
        Some(libc::EFBIG) => error.context(format!(
            "the limit on the size of files, {} bytes, is lower than --size: raise it (`ulimit -f unlimited`; LimitFSIZE= in a unit)",
            limits.file_size
        )),
        Some(libc::EAGAIN) => error.context(format!(
            "no further thread or process is permitted to this user or service, whose limit is {}, or there is no memory for its stack: raise the limit (`ulimit -u`, `ulimit -v`; LimitNPROC=, TasksMax= and LimitAS= in a unit)",
            limits.processes
        )),
        Some(libc::ENFILE) => error.context(
            "the machine has as many open files as it permits: raise the limit (`sysctl fs.file-max`)",
        ),
        _ => error,
    }
}

fn run(args: Serve) -> Result<()> {
    let inherited = persistence::inherited()
        .context("cannot take the descriptors that the service manager stored")?;
    let replace = args.replace;
    let named = [
        &args.allow_user,
        &args.allow_group,
        &args.allow_reader,
        &args.allow_reader_group,
    ];
    let admits_others = named.iter().any(|names| !names.is_empty());
    let has_run_folder = args.which.control.is_none();
    let config = config(args)?;
    if has_run_folder && let Some(folder) = config.control.parent() {
        prepare(folder, admits_others)?;
    }
    // The signal handlers are registered before the sockets exist, so that a program that sees a
    // socket can already stop the broker in an orderly way.
    let (stop, stopper) = pipe().context("cannot make a pipe")?;
    // A shell without job control starts `barlink serve &` with SIGINT ignored, because a Ctrl-C is
    // not for a program in the background.
    let signals = [SIGINT, SIGTERM].into_iter();
    for signal in signals.filter(|signal| !barlink_cli::was_ignored(*signal)) {
        let stopper = stopper
            .try_clone()
            .context("cannot duplicate a descriptor")?;
        signal_hook::low_level::pipe::register(signal, stopper).context("cannot handle signals")?;
    }
    // A VM cannot use another broker, so this one outlives its terminal. The log then has no
    // reader.
    signal_hook::flag::register(SIGHUP, Arc::default()).context("cannot handle signals")?;
    let mut predecessor = None;
    // Descriptors from a service manager belong to a predecessor that has ended.
    let inheritance = if replace && inherited.is_empty() {
        let asked = Predecessor::ask(&config.control);
        if let Err(
            ControlError::NoBrokerToReplace { path } | ControlError::NotASocket { path, .. },
        ) = &asked
        {
            // A broker can listen there although its socket has lost its file.
            Listener::check_reachable(path).map_err(BrokerError::from)?;
        }
        let mut asked = asked?;
        let inheritance = std::mem::take(&mut asked.inheritance);
        predecessor = Some(asked);
        inheritance
    } else {
        inherited
    };
    let broker = Broker::new(config, inheritance)?;
    if let Some(predecessor) = predecessor {
        predecessor.retire()?;
    }
    let state = broker.state();
    for slot in &state.slots {
        info!(
            "slot {}: waiting for a VM at {} ({})",
            slot.id(),
            slot.socket().display(),
            slot.transport()
        );
    }
    let mut slots = state.slots.iter();
    if slots.any(|slot| slot.transport() == VhostUser::NAME) {
        warn!(
            "vhost-user is experimental, as is QEMU's side of it: when this broker ends, QEMU exits at once if no driver runs the device, otherwise when the guest next reads the device's configuration"
        );
    }
    let layout = state.region.layout();
    let names: Vec<_> = layout
        .channels()
        .iter()
        .map(|channel| channel.name.to_string())
        .collect();
    info!(
        "serving {} with {} to host apps at {}; `barlink qemu-args` prints the arguments for QEMU",
        BinaryBytes(layout.region_size),
        names.join(", "),
        broker.control_path().display(),
    );
    state.descriptors.ready();
    // A service's successor listens at the same sockets.
    let sweeper = match persistence::is_managed() {
        true => None,
        false => Sweeper::start(&broker.files())
            .inspect_err(|error| warn!("the files of the sockets will stay: {error}"))
            .ok(),
    };
    let exit = broker.run(&stop.into());
    match exit {
        Ok(Exit::HandedOver) => {
            info!("stopped: the successor serves now");
            return Ok(());
        }
        Ok(Exit::Stopped) => info!("stopped"),
        Err(_) => (),
    }
    if sweeper.is_some_and(|sweeper| !sweeper.sweep()) {
        warn!("the files of the sockets could not be removed: the next broker removes them");
    }
    exit?;
    Ok(())
}

/// Checks the arguments, and whether they fit the broker that runs.
fn check(args: Serve) -> Result<()> {
    let makes_run_folder = args.which.control.is_none();
    let config = config(args)?;
    let control = config.control.display();
    let found = broker::check(&config, makes_run_folder).map_err(|error| match error {
        CheckError::Broker(error) => anyhow::Error::new(error),
        CheckError::Running(error) => anyhow::Error::new(*error),
    })?;
    let found = match found {
        Checked::Fits(pid) => format!(
            "fit the running broker at {control} (process {pid}): its successor keeps the region"
        ),
        Checked::NotServed => format!("are valid; no broker runs at {control}"),
    };
    print(format!("the arguments {found}\n"))
}

/// Returns the configuration that the arguments describe.
fn config(args: Serve) -> Result<Config> {
    let control = super::control_socket(&args.which)?;
    let numbers = |names: &[String], file| -> Result<Vec<u32>> {
        names.iter().map(|name| number(name, file)).collect()
    };
    let users = numbers(&args.allow_user, "passwd")?;
    let groups = numbers(&args.allow_group, "group")?;
    let readers = numbers(&args.allow_reader, "passwd")?;
    let reader_groups = numbers(&args.allow_reader_group, "group")?;
    let sees_memory = |(kind, _): &(TransportKind, _)| *kind == TransportKind::VfioUser;
    ensure!(
        !args.guest_memory || args.sockets.0.iter().any(sees_memory),
        Misuse(
            "--guest-memory has no effect without vfio-user, the only transport that can read guest memory: add --vfio-user SOCKET"
        )
    );
    let ivshmem: Arc<dyn Transport> = Arc::new(Ivshmem);
    let vfio_user: Arc<dyn Transport> = Arc::new(VfioUser {
        guest_memory: args.guest_memory,
    });
    let vhost_user: Arc<dyn Transport> = Arc::new(VhostUser);
    let transport = |kind| match kind {
        TransportKind::Ivshmem => Arc::clone(&ivshmem),
        TransportKind::VfioUser => Arc::clone(&vfio_user),
        TransportKind::VhostUser => Arc::clone(&vhost_user),
    };
    Ok(Config {
        size: args.size,
        vectors: args.vectors,
        channels: args.channel,
        reserve: args.reserve.unwrap_or_default(),
        slots: args
            .sockets
            .0
            .into_iter()
            .map(|(kind, path)| (transport(kind), path))
            .collect(),
        control,
        policy: Policy::new(users, groups).with_readers(readers, reader_groups),
    })
}

/// Creates the run folder if it does not exist. Other users can never list it, and can enter it
/// only if the broker admits other users.
fn prepare(folder: &Path, admits_others: bool) -> Result<()> {
    let failed = || {
        format!(
            "cannot prepare the run folder {}: name a socket in another folder with --control",
            folder.display()
        )
    };
    if let Some(parent) = folder.parent().filter(|parent| !parent.exists()) {
        bail!(
            "XDG_RUNTIME_DIR is {}, which does not exist: log in so that the system makes it (as root, `loginctl enable-linger USER` keeps it), set the variable to a folder that exists, or name a socket with --control",
            parent.display()
        );
    }
    if let Some(owner) = folder.parent().and_then(foreign_owner) {
        bail!(
            "XDG_RUNTIME_DIR is the folder of user {owner}: set the variable to a folder of this user, or name a socket with --control"
        );
    }
    match std::fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => (),
        made => made.with_context(failed)?,
    }
    // Another user may be able to exchange the folder, so that the one that is opened is examined
    // and changed.
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let unusable = |mode| {
        format!(
            "this user cannot use the run folder {} with its mode {:03o}, perhaps of a umask: run `chmod 700` on it",
            folder.display(),
            mode & 0o777
        )
    };
    let opened = match rustix::fs::open(folder, flags, Mode::empty()) {
        Err(Errno::ACCESS)
            if folder
                .metadata()
                .is_ok_and(|it| it.uid() == geteuid().as_raw()) =>
        {
            bail!(unusable(folder.metadata()?.mode()))
        }
        opened => opened.with_context(failed)?,
    };
    let found = rustix::fs::fstat(&opened).with_context(failed)?;
    ensure!(
        found.st_uid == geteuid().as_raw(),
        "{}: it belongs to user {}",
        failed(),
        found.st_uid
    );
    ensure!(
        geteuid().is_root() || found.st_mode & 0o700 == 0o700,
        unusable(found.st_mode)
    );
    if admits_others {
        let mode = Mode::from_raw_mode(found.st_mode & 0o7777) | Mode::from_raw_mode(0o011);
        rustix::fs::fchmod(&opened, mode).with_context(failed)?;
    }
    Ok(())
}

/// Returns the owner of a run folder that is neither this user's nor root's.
fn foreign_owner(folder: &Path) -> Option<u32> {
    let owner = folder.metadata().ok()?.uid();
    (owner != geteuid().as_raw() && owner != 0).then_some(owner)
}

/// Returns the number of a user or group. `name` is the number itself, or a name in `/etc/passwd`
/// or `/etc/group`.
fn number(name: &str, database: &str) -> Result<u32> {
    // The greatest number means no user and no group (`chown(2)`).
    if let Ok(number) = name.parse()
        && number != u32::MAX
    {
        return Ok(number);
    }
    let path = format!("/etc/{database}");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let mut lines = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let line = lines.find(|fields| fields.first() == Some(&name));
    line.and_then(|fields| fields.get(2)?.parse().ok())
        .ok_or_else(|| anyhow!("no `{name}` in {path}: use a name from that file, or a number"))
}
