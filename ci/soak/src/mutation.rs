// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The parts `mutations-…`: faults in the code itself. Each fault is written into a copy of the
//! tree. The part that it changes is built from the copy, and the tests that must find it run with
//! that part.

mod copy;

use anyhow::{Result, ensure};
use barlink_driver_checks::tier::{self, Tier};
use barlink_sandbox::builds::{Artifacts, Part};
use barlink_sandbox::nextest::{Nextest, Report};

use self::copy::Copied;

/// The nextest profile of the tests: that of `cargo xtask test`, which must find every fault.
const PROFILE: &str = "default";

/// A fault in the code.
#[derive(Debug)]
pub struct Mutation {
    /// Name of the fault, without spaces.
    pub name: &'static str,
    /// The behaviour of the code that has the fault.
    pub about: &'static str,
    /// Estimated time on two cores in seconds, if nothing is built yet.
    pub seconds: u64,
    /// The file that is changed.
    file: &'static str,
    /// The code that is replaced. It occurs once in the file.
    from: &'static str,
    /// The code in its place.
    to: &'static str,
    /// The part that is built from the changed copy.
    part: Changed,
    /// The tests that must fail: the ID of the binary, and the name of the test.
    found_by: &'static [(&'static str, &'static str)],
    /// A test that the fault does not affect. It must pass, because a build in which nothing works
    /// would otherwise count as a success.
    untouched: (&'static str, &'static str),
}

/// The program or module that a fault changes.
#[derive(Clone, Copy, Debug)]
enum Changed {
    /// The host's program.
    Host,
    /// The guest's program.
    Guest,
    /// The module.
    Driver,
    /// The protocol, whose own tests run in the copy.
    Protocol,
    /// The protocol, whose models run in the copy.
    Models,
}

/// The package whose tests run in the copy.
const PROTOCOL: &str = "barlink-protocol";

/// IDs of test binaries.
const DRIVER: &str = "barlink-vm-tests::driver";
const TRANSPORTS: &str = "barlink-vm-tests::transports";
const CHANNELS: &str = "barlink-protocol::channels";
const LOOM: &str = "barlink-protocol::loom";

/// All mutations.
pub const ALL: [Mutation; 16] = [
    Mutation {
        name: "host-does-not-ring",
        about: "a host app does not ring the guest",
        seconds: 240,
        file: "client/src/host/events.rs",
        from: "self.other.ring().map_err(",
        to: "self.other.try_clone().map(drop).map_err(",
        part: Changed::Host,
        found_by: &[(TRANSPORTS, "ivshmem::idle::idle_ends_sleep_until_rung")],
        untouched: (
            TRANSPORTS,
            "ivshmem::channels::interrupted_host_app_leaves_the_vm_alone",
        ),
    },
    Mutation {
        name: "guest-does-not-ring",
        about: "a guest program does not ring the host",
        seconds: 150,
        file: "client/src/guest/events.rs",
        from: "calls::ring(file, self.other).map_err(",
        to: "Ok(()).map_err(",
        part: Changed::Guest,
        found_by: &[(TRANSPORTS, "ivshmem::idle::idle_ends_sleep_until_rung")],
        untouched: (
            TRANSPORTS,
            "ivshmem::channels::interrupted_host_app_leaves_the_vm_alone",
        ),
    },
    Mutation {
        name: "driver-keeps-claims",
        about: "the driver keeps the claim of a process that is dead",
        seconds: 60,
        file: "guest-driver/file.rs",
        from: "    opened.device.release(opened.id);\n",
        to: "    if opened.device.is_gone() {\n        opened.device.release(opened.id);\n    }\n",
        part: Changed::Driver,
        found_by: &[
            (DRIVER, "ivshmem::driver::claims"),
            (DRIVER, "ivshmem::driver::presence"),
        ],
        untouched: (DRIVER, "ivshmem::driver::doorbells"),
    },
    Mutation {
        name: "removal-does-not-zap",
        about: "the driver leaves the mappings of a device that is removed",
        seconds: 60,
        file: "guest-driver/device.rs",
        from: "        self.mappings.zap();\n",
        // Without a mention the method would be dead code, which does not build.
        to: "        let _ = Mappings::zap;\n",
        part: Changed::Driver,
        found_by: &[(DRIVER, "ivshmem::driver::removal")],
        untouched: (DRIVER, "ivshmem::driver::doorbells"),
    },
    Mutation {
        name: "buffer-is-not-freed",
        about: "the driver does not free the memory of a DMA buffer",
        seconds: 60,
        file: "guest-driver/coherent.rs",
        from: "        unsafe {\n            bindings::dma_free_attrs(",
        to: "        unsafe {\n            if self.size > 0 {\n                return;\n            }\n            bindings::dma_free_attrs(",
        part: Changed::Driver,
        found_by: &[(DRIVER, "ivshmem::driver::buffer")],
        untouched: (DRIVER, "ivshmem::driver::doorbells"),
    },
    Mutation {
        name: "consumer-starts-at-end",
        about: "a consumer that attaches skips the records that were committed before",
        seconds: 100,
        file: "protocol/src/consumer.rs",
        from: "let read = region.load(base + channel::READ);",
        to: "let read = region.load(base + channel::WRITTEN);",
        part: Changed::Protocol,
        found_by: &[
            (CHANNELS, "ring::successor_receives_unreleased_record_again"),
            (CHANNELS, "ring::ring_is_queue_over_wraps_and_crashes"),
        ],
        untouched: (
            CHANNELS,
            "ring::largest_record_goes_through_at_every_offset",
        ),
    },
    Mutation {
        name: "release-lags-behind",
        about: "a release publishes the cursor behind the record before",
        seconds: 100,
        file: "protocol/src/consumer.rs",
        from: "self.region.release(self.base + channel::READ, self.passed);",
        to: "self.region.release(self.base + channel::READ, self.read);",
        part: Changed::Protocol,
        found_by: &[
            (CHANNELS, "ring::successor_receives_unreleased_record_again"),
            (CHANNELS, "ring::ring_is_queue_over_wraps_and_crashes"),
        ],
        untouched: (CHANNELS, "ring::commit_clears_bytes_behind_payload"),
    },
    Mutation {
        name: "limit-without-fence",
        about: "a producer's limit has no fence behind it",
        seconds: 100,
        file: "protocol/src/producer.rs",
        from: "        self.region.fence_limit();\n",
        // Without a mention the method would be dead code.
        to: "        let _ = Region::<M>::fence_limit;\n",
        part: Changed::Models,
        found_by: &[
            (LOOM, "ring::limit_precedes_overwriting_bytes"),
            (LOOM, "ring::limit_ahead_of_records_precedes_their_bytes"),
            (
                LOOM,
                "reset::reset_beside_overwriting_producer_repeats_no_record",
            ),
            (LOOM, "reset::stale_producer_spoils_no_new_record"),
            (LOOM, "reset::reset_begins_above_busy_producer"),
        ],
        untouched: (LOOM, "ring::successor_of_consumer_misses_no_record"),
    },
    Mutation {
        name: "note-behind-cursor",
        about: "a commit stores the cursor before the cursor of its note",
        seconds: 100,
        file: "protocol/src/producer.rs",
        from: "region.store(note, self.staged);",
        to: "region.release(*base + channel::WRITTEN, self.staged);\n\
             region.store(note, self.staged);",
        part: Changed::Protocol,
        found_by: &[
            (CHANNELS, "crash::killed_end_leaves_whole_call_or_nothing"),
            (
                CHANNELS,
                "overwrite::newest_record_outlives_killed_producer",
            ),
        ],
        untouched: (CHANNELS, "ring::commit_clears_bytes_behind_payload"),
    },
    Mutation {
        name: "note-in-same-place",
        about: "each commit writes over the note of the commit before",
        seconds: 100,
        file: "protocol/src/producer.rs",
        from: "        self.older_note = 1 - self.older_note;\n",
        to: "",
        part: Changed::Protocol,
        found_by: &[
            (CHANNELS, "crash::killed_end_leaves_whole_call_or_nothing"),
            (
                CHANNELS,
                "overwrite::newest_record_outlives_killed_producer",
            ),
        ],
        untouched: (CHANNELS, "ring::commit_clears_bytes_behind_payload"),
    },
    Mutation {
        name: "reset-goes-back",
        about: "a reset begins at a cursor that former ends may have passed",
        seconds: 100,
        file: "protocol/src/state.rs",
        from: ".base_above(base, age, &[written, limit, read]);",
        to: ".base_above(base, age, &[written, limit, read].map(|_| 0));",
        part: Changed::Protocol,
        found_by: &[
            (CHANNELS, "reset::reset_begins_above_all_cursors"),
            (CHANNELS, "crash::killed_reset_blocks_ends_until_repeated"),
        ],
        untouched: (CHANNELS, "ring::commit_clears_bytes_behind_payload"),
    },
    Mutation {
        name: "end-ignores-reset",
        about: "a producer does not look for a reset behind its commit",
        seconds: 100,
        file: "protocol/src/producer.rs",
        from: "self.region.load(self.base + channel::GENERATION) != self.generation",
        to: "self.region.load(self.base + channel::GENERATION) < self.generation",
        part: Changed::Protocol,
        found_by: &[
            (CHANNELS, "reset::waiting_ends_report_reset"),
            (CHANNELS, "reset::refused_reset_detaches_end_for_good"),
        ],
        untouched: (CHANNELS, "ring::commit_clears_bytes_behind_payload"),
    },
    Mutation {
        name: "count-before-entry",
        about: "the count of the channel table is stored before the entry",
        seconds: 100,
        file: "protocol/src/table.rs",
        from: "    for (index, channel) in layout.channels().iter().enumerate().skip(from) {\n",
        to: "    region.release_count(TABLE_COUNT, layout.channels().len() as u64);\n    for (index, channel) in layout.channels().iter().enumerate().skip(from) {\n",
        part: Changed::Models,
        found_by: &[(LOOM, "table::reader_takes_only_whole_entries")],
        untouched: (LOOM, "ring::successor_of_consumer_misses_no_record"),
    },
    Mutation {
        name: "newest-is-overwritten",
        about: "staged records of an `overwrite` channel take more than a quarter of it",
        seconds: 100,
        file: "protocol/src/producer.rs",
        from: "if end - self.written > quarter {",
        to: "if end - self.written > 4 * quarter {",
        part: Changed::Protocol,
        found_by: &[
            (
                CHANNELS,
                "overwrite::newest_record_outlives_killed_producer",
            ),
            (
                CHANNELS,
                "overwrite::staged_records_publish_themselves_at_quarter",
            ),
        ],
        untouched: (CHANNELS, "ring::commit_clears_bytes_behind_payload"),
    },
    Mutation {
        name: "tap-ignores-limit",
        about: "a tap returns copies that were written over meanwhile",
        seconds: 100,
        file: "protocol/src/tap.rs",
        from: "cursor < limit && limit <= end && self",
        to: "cursor < limit && limit <= end.max(limit) && self",
        part: Changed::Protocol,
        found_by: &[
            (CHANNELS, "tap::stopped_tap_copies_no_torn_record"),
            (CHANNELS, "counts::counts_add_up_in_overwriting_channel"),
        ],
        untouched: (CHANNELS, "ring::commit_clears_bytes_behind_payload"),
    },
    Mutation {
        name: "first-number-is-lost",
        about: "a producer that takes up a channel forgets its first sequence number",
        seconds: 100,
        file: "protocol/src/producer.rs",
        from: "let first = region.load(base + channel::FIRST);",
        to: "let first = region.load(base + channel::FIRST).min(0);",
        part: Changed::Protocol,
        found_by: &[
            (CHANNELS, "numbers::first_number_is_fixed_by_first_record"),
            (CHANNELS, "crash::ends_die_at_store_of_every_word"),
        ],
        untouched: (CHANNELS, "ring::commit_clears_bytes_behind_payload"),
    },
];

/// Runs the tests of a mutation. Returns the number of tests that found it, as text.
///
/// # Errors
///
/// A test does not find it, the code to change is not there any more, or the changed code does not
/// work at all.
pub fn run(mutation: &Mutation, nextest: &Nextest, artifacts: &Artifacts) -> Result<String> {
    let copied = Copied::new()?;
    copied.replace(mutation.file, mutation.from, mutation.to)?;
    let report = test(mutation, &copied, nextest, artifacts)?;
    judge(mutation, &report)
}

/// Builds the part that is changed, and runs the tests.
fn test(
    mutation: &Mutation,
    copied: &Copied,
    nextest: &Nextest,
    artifacts: &Artifacts,
) -> Result<Report> {
    let copy = copied.tree();
    let filter = filter(mutation);
    eprintln!("building with the fault in {} ...", mutation.file);
    let part = match mutation.part {
        Changed::Host => Part::Host(copy.host_program("barlink-broker")?),
        Changed::Guest => Part::Guest(copy.guest_program("barlink-guest")?),
        Changed::Driver => Part::Driver(copy.driver(&artifacts.tools)?),
        Changed::Protocol => {
            return nextest.run_in(copy, PROTOCOL, &["channels"], None, &filter, PROFILE);
        }
        Changed::Models => {
            return nextest.run_in(copy, PROTOCOL, &["loom"], Some("loom"), &filter, PROFILE);
        }
    };
    let artifacts = artifacts.with(part, &copied.folder().join("vm"))?;
    let mut command = nextest.command(PROFILE);
    // Failures are expected, so nextest does not show their output.
    command.args(["--failure-output=never", "--filterset", &filter]);
    command.envs(artifacts.environment()?);
    command.env(tier::VARIABLE, Tier::Test.to_string());
    nextest.run(&mut command, PROFILE)
}

/// Returns the expression of cargo-nextest that chooses the tests of a mutation.
fn filter(mutation: &Mutation) -> String {
    let tests = mutation.found_by.iter().chain([&mutation.untouched]);
    let terms = tests.map(|(binary, test)| format!("(binary_id(={binary}) & test(={test}))"));
    terms.collect::<Vec<_>>().join(" | ")
}

/// Checks that each test failed or passed as it must. Returns the number of tests that failed, as
/// text.
fn judge(mutation: &Mutation, report: &Report) -> Result<String> {
    let name = mutation.name;
    let failed = |(binary, test): &(&str, &str)| -> Result<bool> {
        let test = format!("{binary} {test}");
        let mut times = report.times.iter();
        let ran = times.any(|(_, ran)| *ran == test);
        ensure!(ran, "mutation {name}: there is no test {test}");
        Ok(report.failing.contains(&test))
    };
    let (_, untouched) = mutation.untouched;
    ensure!(
        !failed(&mutation.untouched)?,
        "mutation {name} breaks {untouched}, which has nothing to do with it: nothing works"
    );
    for test in mutation.found_by {
        ensure!(failed(test)?, "mutation {name} is not found by {}", test.1);
    }
    Ok(match mutation.found_by.len() {
        1 => "1 test found it".to_owned(),
        many => format!("{many} tests found it"),
    })
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    /// Returns a report in which these tests failed and all others of a mutation passed.
    fn report(mutation: &Mutation, failing: &[(&str, &str)]) -> Report {
        let name = |(binary, test): &(&str, &str)| format!("{binary} {test}");
        let all = mutation.found_by.iter().chain([&mutation.untouched]);
        let times: Vec<_> = all.map(|test| (1.0, name(test))).collect();
        Report {
            passed: times.len() - failing.len(),
            failed: failing.len(),
            skipped: 0,
            failing: failing.iter().map(name).collect(),
            times,
        }
    }

    #[test]
    fn all_mutations_fit_the_code() -> Result<()> {
        for mutation in &ALL {
            copy::changed(mutation.file, mutation.from, mutation.to).context(mutation.name)?;
        }
        Ok(())
    }

    #[test]
    fn mutation_is_found_by_named_tests_only() {
        for mutation in &ALL {
            let judged = |failing: &[_]| judge(mutation, &report(mutation, failing));
            assert!(judged(mutation.found_by).is_ok());
            assert!(judged(&mutation.found_by[1..]).is_err());
            let all = [mutation.found_by, &[mutation.untouched]].concat();
            assert!(judged(&all).is_err());
            let mut none = report(mutation, mutation.found_by);
            none.times.clear();
            assert!(judge(mutation, &none).is_err());
        }
    }
}
