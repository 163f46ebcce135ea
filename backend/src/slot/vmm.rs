// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The process of a slot's VMM, which can live on after its connection has ended. Then its guest
//! may still write to the region, and its kernel may still take the slot's interrupts.

use std::fmt::{self, Display, Formatter};

use rustix::event::{PollFd, PollFlags};
use rustix::time::Timespec;

use crate::persistence::Stored;

/// The process that connected a VM to a slot.
#[derive(Clone)]
pub struct Vmm {
    pub(super) pid: i32,
    process: Option<Stored>,
}

impl Vmm {
    /// Describes a process by its ID, 0 for one outside this PID namespace, and by a descriptor
    /// that is readable once it has ended. No descriptor means that the kernel cannot name the
    /// process.
    pub fn new(pid: i32, process: Option<Stored>) -> Self {
        Vmm { pid, process }
    }

    /// Returns its process ID, 0 for a process outside this PID namespace.
    pub fn pid(&self) -> u32 {
        self.pid.unsigned_abs()
    }

    /// Returns the descriptor of the process.
    pub(super) fn process(&self) -> Option<&Stored> {
        self.process.as_ref()
    }

    /// Returns whether the process lives. The result is `None` if the kernel cannot name it.
    pub fn lives(&self) -> Option<bool> {
        let process = self.process.as_ref()?;
        let mut polled = [PollFd::new(process, PollFlags::IN)];
        let now = Timespec::default();
        let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, Some(&now)));
        // If `poll` fails, the process may still live.
        Some(ready != Ok(1))
    }

    /// Returns whether `other` is this process, which lives. So no other process has its ID. The ID
    /// can be 0 for one of the two only: a predecessor that emptied the slot during a hand-over has
    /// removed the stored ID, and its successor has the descriptor already.
    pub(super) fn is_same(&self, other: &Vmm) -> bool {
        match (self.number(), other.number()) {
            (Some(number), Some(other)) => number == other,
            _ => self.pid != 0 && self.pid == other.pid,
        }
    }

    /// Returns the number of the process that is never used again. The kernel has one since Linux
    /// 6.9: the inode of all descriptors of the process, in a file system of their own.
    fn number(&self) -> Option<u64> {
        /// `PID_FS_MAGIC` (`include/uapi/linux/magic.h`).
        const PID_FS: u64 = 0x5049_4446;
        let process = self.process.as_ref()?;
        let kind = rustix::fs::fstatfs(process).ok()?.f_type;
        // CAST: the type of this field differs between machines.
        let is_unique = kind as u64 == PID_FS;
        is_unique
            .then(|| rustix::fs::fstat(process).ok().map(|stat| stat.st_ino))
            .flatten()
    }
}

/// Names a VMM's process, and says how it is ended. The ID 0 stands for a process outside this PID
/// namespace.
fn named(pid: u32) -> [String; 2] {
    match pid {
        0 => [
            "the process (outside this PID namespace)".to_owned(),
            "end that process".to_owned(),
        ],
        pid => [
            format!("process {pid}"),
            format!("end that process (kill {pid})"),
        ],
    }
}

/// The reason why a VM cannot have a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// A VM has it.
    Connected,
    /// The process of the former VM lives.
    Former {
        /// Process ID of the VMM.
        pid: u32,
    },
    /// The kernel consumes the rings for the slot: an earlier device left its interrupts there.
    Consumed {
        /// The process ID of the former VM, if its process is known to live.
        pid: Option<u32>,
    },
}

impl Display for Taken {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Taken::Connected => f.write_str("the slot is taken"),
            Taken::Former { pid } => {
                let [process, end] = named(*pid);
                write!(
                    f,
                    "the slot is taken: its former VM has left, but {process} of that VM lives, and can still write to the region and take the slot's interrupts: {end}"
                )
            }
            Taken::Consumed { pid: None } => f.write_str(
                "the slot is taken: a device that was here went with its interrupts enabled, so the kernel (KVM) still consumes the slot's interrupts for a VM whose process the broker does not know: end that VM",
            ),
            Taken::Consumed { pid: Some(pid) } => {
                let [process, end] = named(*pid);
                write!(
                    f,
                    "the slot is taken: the device that {process} had here went with its interrupts enabled, so the kernel (KVM) still consumes the slot's interrupts: {end}, and start its VM again"
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::sync::Arc;

    use rustix::process::{
        Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process, pidfd_open, waitid,
    };

    use super::*;

    #[test]
    fn process_lives_until_it_ends() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_child(&child);
        let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let vmm = Vmm::new(pid.as_raw_nonzero().get(), Some(Arc::new(process)));
        assert_eq!(vmm.lives(), Some(true));
        kill_process(pid, Signal::STOP).unwrap();
        waitid(WaitId::Pid(pid), WaitIdOptions::STOPPED).unwrap();
        assert_eq!(vmm.lives(), Some(true), "a stopped process lives");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(vmm.lives(), Some(false));
        assert_eq!(Vmm::new(7, None).lives(), None);
    }

    #[test]
    fn foreign_process_is_never_same() {
        let vmm = |pid| Vmm::new(pid, None);
        assert!(vmm(7).is_same(&vmm(7)));
        assert!(!vmm(7).is_same(&vmm(8)));
        assert!(!vmm(0).is_same(&vmm(0)), "the ID 0 names no process");
        let of = |pid| Some(Arc::new(pidfd_open(pid, PidfdFlags::empty()).unwrap()) as Stored);
        let own = rustix::process::getpid();
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let hidden = |pid| Vmm::new(0, of(pid));
        // Before Linux 6.9 the kernel has no number for a process.
        if hidden(own).number().is_some() {
            assert!(hidden(own).is_same(&hidden(own)));
            let named = Vmm::new(own.as_raw_nonzero().get(), of(own));
            assert!(hidden(own).is_same(&named) && named.is_same(&hidden(own)));
        }
        assert!(!hidden(own).is_same(&hidden(Pid::from_child(&child))));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn hidden_process_has_no_kill_command() {
        let text = Taken::Former { pid: 0 }.to_string();
        assert!(
            !text.contains("kill") && !text.contains("process 0"),
            "{text}"
        );
        let text = Taken::Former { pid: 7 }.to_string();
        assert!(text.ends_with("end that process (kill 7)"), "{text}");
    }
}
