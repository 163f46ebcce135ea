// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Gives up the rights that a broker does not need once it listens: all of the file system but the removal of its own
//! sockets, all of the network, and signals to others (Landlock, `landlock(7)`). A kernel without Landlock, or with an
//! older one, gives up what it can.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// The rights that are known here; what a kernel does not know of them it does not take away.
const KNOWN: ABI = ABI::V6;

/// Confines the calling thread and those that it starts. Files can still be removed from these folders. Gives whether
/// anything was given up.
pub fn confine<'a>(folders: impl IntoIterator<Item = &'a Path>) -> Result<bool, RulesetError> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::Signal)?
        .create()?;
    for folder in folders {
        // A folder that is gone has nothing to be removed.
        if let Ok(folder) = PathFd::new(folder) {
            rules = rules.add_rule(PathBeneath::new(folder, AccessFs::RemoveFile))?;
        }
    }
    let done = rules.restrict_self()?;
    Ok(done.ruleset != RulesetStatus::NotEnforced)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confined_thread_removes_its_sockets_and_opens_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        std::fs::write(&socket, b"").unwrap();
        // The rest of this process keeps its rights.
        let thread = std::thread::spawn(move || {
            if !confine([folder.path()]).unwrap() {
                eprintln!("this kernel has no Landlock: what a thread gives up is not looked at");
                return folder;
            }
            std::fs::read("/etc/passwd").unwrap_err();
            std::fs::write(&socket, b"changed").unwrap_err();
            std::net::TcpListener::bind("127.0.0.1:0").unwrap_err();
            std::fs::remove_file(&socket).unwrap();
            folder
        });
        drop(thread.join().unwrap());
        std::fs::read("/etc/passwd").unwrap();
    }
}
