// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Folders that a service manager hides from a service, and folders whose files only the service
//! sees. A VM could not reach a socket in either of them.

use std::path::Path;

use crate::environment::variable;
use crate::persistence;

/// File in which the kernel lists the mounts of a process (`proc(5)`, "/proc/PID/mountinfo").
const MOUNTS: &str = "/proc/self/mountinfo";

/// Returns whether this process is a service, or a control process of one, such as a check before a
/// reload. A program that another service has started, such as a shell, is none: its VMs may see
/// the same folders.
pub fn is_service() -> bool {
    // Before systemd 248, only a service that sends notices is known to be one.
    let is_started = persistence::is_named_by_manager();
    is_started.unwrap_or_else(persistence::is_a_service) || is_control_process()
}

/// Returns whether this process is a control process of a service that runs.
pub fn is_control_process() -> bool {
    // The manager sets `MAINPID` for control processes only (`systemd.exec(5)`).
    variable("MAINPID").is_some()
}

/// Returns the setting of the unit that hides a path (`systemd.exec(5)`), if one does.
pub fn hiding_setting(path: &Path) -> Option<&'static str> {
    // Without the list, no mount is known to hide the path.
    setting_in(&std::fs::read_to_string(MOUNTS).ok()?, path)
}

fn setting_in(mounts: &str, path: &Path) -> Option<&'static str> {
    let mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(3);
        Some((fields.next()?, Path::new(fields.next()?)))
    });
    // The deepest mount hides the others. Of several at one place, the last one hides the others.
    let (root, _) = mounts
        .filter(|(_, point)| path.starts_with(point))
        .max_by_key(|(_, point)| point.components().count())?;
    match root {
        _ if root.contains("/systemd-private-") => Some("PrivateTmp="),
        _ if root.ends_with("/systemd/inaccessible/dir") => Some("ProtectHome="),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_setting_that_hides_path() {
        let mounts = "\
25 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
61 25 0:25 / /run rw,nosuid - tmpfs tmpfs rw
80 25 254:1 / /tmp rw - ext4 /dev/vda1 rw
90 25 0:25 /systemd/inaccessible/dir /home ro,nosuid - tmpfs tmpfs rw
91 25 0:25 /systemd/inaccessible/dir /run/user ro,nosuid - tmpfs tmpfs rw
92 25 254:1 /tmp/systemd-private-0f-barlink@vm1.service-XyZ/tmp /tmp rw - ext4 /dev/vda1 rw
";
        let setting = |path| setting_in(mounts, Path::new(path));
        assert_eq!(setting("/tmp/vm.sock"), Some("PrivateTmp="));
        assert_eq!(setting("/home/me/vm.sock"), Some("ProtectHome="));
        assert_eq!(setting("/run/user/1000/vm.sock"), Some("ProtectHome="));
        assert_eq!(setting("/run/barlink/vm.sock"), None);
        assert_eq!(setting("/tmpfs/vm.sock"), None);
    }
}
