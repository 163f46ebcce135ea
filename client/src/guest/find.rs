// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Finding the device of a region by the name of its broker.

use std::path::{Path, PathBuf};

use barlink_protocol::wire::layout::BrokerName;

use crate::guest::error::DeviceError;

/// Folder of the device nodes.
const DEVICES: &str = "/dev";

/// Returns whether a program means the name of a broker and not the path of a device: a name has no
/// `/`.
pub(crate) fn name(device: &Path) -> Option<&str> {
    device.to_str().filter(|text| !text.contains('/'))
}

/// Finds the device of the region whose broker has this name. `ask` asks the driver of a device for
/// the name. Works without udev, whose links in `/dev/barlink/by-name` lead to the same devices.
pub(crate) fn find(
    name: &str,
    ask: impl Fn(&Path) -> Result<BrokerName, DeviceError>,
) -> Result<PathBuf, DeviceError> {
    let answers = nodes_in(Path::new(DEVICES))
        .into_iter()
        .map(|node| (ask(&node), node));
    choose(name, answers)
}

/// Finds the device of a name and opens it, until the device that was opened has the name: the
/// numbers of the nodes can change between the two steps.
pub(crate) fn open<T>(
    tries: u32,
    find: impl Fn() -> Result<PathBuf, DeviceError>,
    open: impl Fn(&Path) -> Result<T, DeviceError>,
    is_named: impl Fn(&T) -> bool,
) -> Result<T, DeviceError> {
    let mut number = 0;
    loop {
        let path = find()?;
        number += 1;
        let is_last = number == tries;
        match open(&path) {
            Ok(device) if is_named(&device) => return Ok(device),
            Ok(_) if is_last => return Err(DeviceError::Replaced { path }),
            Err(DeviceError::NoDevice { .. }) if !is_last => (),
            Err(error) => return Err(error),
            Ok(_) => (),
        }
    }
}

/// Lists the devices of this VM by their paths, `/dev/barlink0` and so on, in the order of their
/// numbers. A device without its driver has no such path.
///
/// ```no_run
/// use barlink::guest;
///
/// for node in guest::nodes() {
///     let device = guest::open(&node)?;
///     println!("{}: {}", node.display(), device.identity().name);
/// }
/// # Ok::<(), barlink::Error>(())
/// ```
pub fn nodes() -> Vec<PathBuf> {
    nodes_in(Path::new(DEVICES))
}

/// Lists the device nodes in a folder, in the order of their numbers.
fn nodes_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut numbers: Vec<u32> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            name.to_str()?.strip_prefix("barlink")?.parse().ok()
        })
        .collect();
    numbers.sort_unstable();
    let nodes = numbers.into_iter();
    nodes
        .map(|number| folder.join(format!("barlink{number}")))
        .collect()
}

/// Chooses the device whose driver gave this name. If there is none, the error of a device that
/// could not be asked comes first, because it could be the one.
fn choose(
    name: &str,
    answers: impl Iterator<Item = (Result<BrokerName, DeviceError>, PathBuf)>,
) -> Result<PathBuf, DeviceError> {
    let (mut found, mut others, mut failed) = (Vec::new(), Vec::new(), None);
    for (answer, node) in answers {
        match answer {
            Ok(other) if other.as_str() == name => found.push(node),
            Ok(other) => others.push(other.to_string()),
            // A device that has gone since its node was listed cannot be opened anyway.
            Err(DeviceError::NoDevice { .. }) => (),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    match (found.len(), failed) {
        (1, _) => Ok(found.swap_remove(0)),
        (0, Some(error)) => Err(error),
        (0, None) => Err(DeviceError::NoName {
            name: name.to_owned(),
            others,
        }),
        _ => Err(DeviceError::SameName {
            name: name.to_owned(),
            devices: found,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Access;

    fn chosen(name: &str, answers: &[(&str, Option<&str>)]) -> Result<PathBuf, String> {
        let answers = answers.iter().map(|(node, answer)| {
            let node = PathBuf::from(node);
            let denied = || DeviceError::Permission {
                path: node.clone(),
                access: Access::ReadOnly,
            };
            let answer = answer.map(|name| BrokerName::new(name).unwrap());
            (answer.ok_or_else(denied), node)
        });
        choose(name, answers).map_err(|error| error.to_string())
    }

    #[test]
    fn only_text_without_slash_is_name() {
        assert_eq!(name(Path::new("vm1")), Some("vm1"));
        for path in ["/dev/barlink0", "./barlink0", "dev/barlink0"] {
            assert_eq!(name(Path::new(path)), None);
        }
    }

    #[test]
    fn nodes_come_in_order_of_numbers() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["barlink10", "barlink2", "barlink", "barlink-x", "null"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let expected = ["barlink2", "barlink10"].map(|name| folder.path().join(name));
        assert_eq!(nodes_in(folder.path()), expected);
        assert!(nodes_in(Path::new("/does/not/exist")).is_empty());
    }

    #[test]
    fn name_selects_one_device() {
        let devices = [("/0", Some("b")), ("/1", None), ("/2", Some("a"))];
        assert_eq!(chosen("a", &devices), Ok("/2".into()));
        assert_eq!(chosen("b", &devices), Ok("/0".into()));
        // The device that could not be asked may be the one.
        let error = chosen("c", &devices).unwrap_err();
        assert!(error.contains("no permission to open /1"), "{error}");
    }

    /// The numbers of the nodes change while a program looks.
    #[test]
    fn opens_no_device_of_another_name() {
        const TRIES: u32 = 4;
        let opened = |right: u32| {
            let tries = std::cell::Cell::new(0);
            let find = || Ok(PathBuf::from("/dev/barlink0"));
            let open_next = |path: &Path| {
                tries.set(tries.get() + 1);
                let path = path.to_owned();
                match tries.get() {
                    1 => Err(DeviceError::NoDevice { path }),
                    tries => Ok(tries == right),
                }
            };
            let device = open(TRIES, find, open_next, |is_right| *is_right);
            (device.map_err(|error| error.to_string()), tries.get())
        };
        assert_eq!(opened(2), (Ok(true), 2));
        assert_eq!(opened(TRIES), (Ok(true), TRIES));
        let (other, tries) = opened(TRIES + 1);
        let error = other.unwrap_err();
        assert!(
            error.contains("/dev/barlink0 is another device by now"),
            "{error}"
        );
        assert_eq!(tries, TRIES);
    }

    #[test]
    fn unknown_name_lists_known_names() {
        let error = chosen("c", &[("/0", Some("b")), ("/1", Some("a"))]).unwrap_err();
        assert_eq!(
            error,
            "no barlink device of a broker named `c`: there are those of `b`, `a`"
        );
        let error = chosen("c", &[]).unwrap_err();
        assert!(error.contains("this VM has no barlink device"), "{error}");
    }

    #[test]
    fn name_of_two_devices_is_refused() {
        let error = chosen("a", &[("/0", Some("a")), ("/1", Some("a"))]).unwrap_err();
        assert_eq!(
            error,
            "the broker of /0 and of /1 is named `a`: name the device by its path"
        );
    }
}
