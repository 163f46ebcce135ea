// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The list of parts.

use std::time::Duration;

use anyhow::Result;
use barlink_vm::broker::Transport;

use crate::fuzz;
use crate::mutation::{self, Mutation};

/// A part, which can be run by itself.
#[derive(Clone, Debug)]
pub struct Part {
    /// Name of the part, without spaces.
    pub name: String,
    /// A short description.
    pub about: String,
    /// Estimated time on two cores without KVM, with the builds that it needs.
    pub estimate: Duration,
    /// The work of the part.
    pub work: Work,
}

/// The kinds of work.
#[derive(Clone, Debug)]
pub enum Work {
    /// Runs tests in the depth of [`Tier::Soak`](barlink_driver_checks::tier::Tier::Soak), chosen
    /// by an expression of cargo-nextest.
    Tests(String),
    /// Causes faults while records flow.
    Crash(Transport),
    /// Fuzzes a target.
    Fuzz(String),
    /// Runs the demo with the QEMU of the host's distribution.
    Distribution,
    /// Runs the tests that must find a fault in the code.
    Mutation(&'static Mutation),
}

/// The long loops of the driver's checks: the name of the part, the check, a description, and the
/// longest time in seconds.
const LOOPS: [(&str, &str, &str, u64); 7] = [
    (
        "comings",
        "device_goes_and_returns_while_used",
        "100 times each way, a device goes and comes back",
        150,
    ),
    (
        "idle-suspends",
        "system_suspends_to_idle_while_used",
        "100 suspends to idle",
        120,
    ),
    (
        "suspends",
        "system_suspends_to_memory_while_used",
        "100 suspends to memory",
        150,
    ),
    (
        "interrupts",
        "interrupts_in_lock_step_are_never_lost",
        "100,000 doorbells and interrupts in lock step",
        120,
    ),
    (
        "mappings",
        "mappings_leave_nothing_behind",
        "1,000 files, mapped and closed",
        60,
    ),
    (
        "buffers",
        "buffers_leave_nothing_behind",
        "200 DMA buffers of 4 MiB",
        60,
    ),
    (
        "loads",
        "module_is_loaded_and_unloaded",
        "25 times the module is loaded",
        60,
    ),
];

/// Returns all parts.
///
/// # Errors
///
/// The folder of the fuzz targets cannot be read.
pub fn all() -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    let mut add = |name: String, about: &str, seconds: u64, work: Work| {
        parts.push(Part {
            name,
            about: about.to_owned(),
            estimate: Duration::from_secs(seconds),
            work,
        });
    };
    for transport in Transport::ALL {
        let module = transport.name().replace('-', "_");
        for (name, check, about, seconds) in LOOPS {
            let filter = format!("binary(driver) & test(={module}::driver::{check})");
            add(
                format!("{name}-{transport}"),
                about,
                seconds,
                Work::Tests(filter),
            );
        }
        let loops = LOOPS.map(|(_, check, ..)| format!("test(={module}::driver::{check})"));
        add(
            format!("driver-{transport}"),
            "all other checks of the driver, each in a VM of its own, with an IOMMU, too",
            420,
            Work::Tests(format!(
                "binary(driver) & test(/^{module}::/) & not ({})",
                loops.join(" | ")
            )),
        );
        add(
            format!("crash-{transport}"),
            "faults of all kinds while records flow: none is lost, none comes twice",
            540,
            Work::Crash(transport),
        );
    }
    for (name, about, seconds, filter) in [
        (
            "boots",
            "guests that boot with a BAR below 4 GiB, or one processor, over each transport",
            300,
            "binary(transports) & test(/cache::(each_cure|low_bar)|guest_with_few_cpus/)",
        ),
        (
            "bare",
            "the scenes with the bare guest in full depth, under KVM too where it runs",
            300,
            "binary(bare)",
        ),
        (
            "resets",
            "100 resets of guests under the users of their devices",
            540,
            "test(guests_survive_resets_with_devices_in_use)",
        ),
        (
            "host",
            "the tests of the ring, the broker and the programs in full depth: 10,000 host apps attach, every interleaving",
            420,
            "(package(barlink) | package(barlink-broker) | package(barlink-protocol)) & not test(latest_is_whole_under_fast_sender)",
        ),
        (
            "newest",
            "11 million times the newest record of a sender that never pauses: 99.9 % whole, none torn",
            240,
            "test(latest_is_whole_under_fast_sender)",
        ),
        (
            "packages",
            "the Debian packages on a clean Debian: installed, booted, upgraded, removed",
            560,
            "package(barlink-package) & kind(test) & not test(built_driver) & not test(udev_rules)",
        ),
        (
            "udev-rules",
            "the rules for guests without the driver on a clean Debian, by sysfs and by VFIO",
            180,
            "test(udev_rules_open_device_without_driver)",
        ),
        (
            "built-driver",
            "the package of the built driver on a clean Debian: installed, booted, replaced by dkms, and back",
            240,
            "test(built_driver_loads_on_clean_debian)",
        ),
        (
            "bench",
            "the bench in its short form, with all peers",
            540,
            "package(barlink-bench) & kind(test)",
        ),
    ] {
        add(
            name.to_owned(),
            about,
            seconds,
            Work::Tests(filter.to_owned()),
        );
    }
    add(
        "distribution-qemu".to_owned(),
        "the demo over ivshmem with the host's own QEMU, such as 7.2 of Debian 12",
        60,
        Work::Distribution,
    );
    for target in fuzz::targets()? {
        let about = format!("random inputs for {target}");
        add(format!("fuzz-{target}"), &about, 260, Work::Fuzz(target));
    }
    for mutation in &mutation::ALL {
        let about = format!(
            "a fault in the code, which tests must find: {}",
            mutation.about
        );
        let name = format!("mutations-{}", mutation.name);
        add(name, &about, mutation.seconds, Work::Mutation(mutation));
    }
    Ok(parts)
}
