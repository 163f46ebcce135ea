// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The checks, by topic. After each check the driver is loaded, and no file of it is open.

mod buffer;
mod cache;
mod claims;
mod cost;
mod devices;
mod doorbells;
mod hostile;
mod interrupts;
mod life;
mod mmap;
mod presence;
mod races;
mod removal;
mod rounds;
mod signals;
mod sleep;
mod system_calls;
mod table;

use anyhow::Result;

/// A check. It fails by an error or a panic.
pub type Check = fn() -> Result<()>;

/// A topic: its name, and its checks by name.
pub type Topic = (&'static str, &'static [(&'static str, Check)]);

macro_rules! checks {
    ($($title:literal, $topic:ident: $($name:ident)*;)*) => {
        &[$(($title, &[$((stringify!($name), $topic::$name)),*])),*]
    };
}

/// All checks by topic, in the order in which they should run: simple ones first.
pub const TOPICS: &[Topic] = checks! {
    "devices", devices:
        nodes_are_numbered_and_private_to_root
        foreign_memory_is_declined
        info_describes_each_device
        devices_are_independent
        unknown_calls_are_refused
        device_takes_smallest_free_number;
    "mmap", mmap:
        stores_cross_both_ways
        default_mappings_are_noncached
        first_pages_cannot_be_written
        mmap_refuses_the_drivers_page
        mmap_refuses_private_executable_or_outside_ranges
        read_only_file_gets_read_only_mappings
        mappings_survive_fork_split_and_move
        mappings_survive_calls_meant_for_memory
        debuggers_read_and_write_mappings
        unbind_races_debuggers;
    "system_calls", system_calls:
        system_calls_use_region_as_documented;
    "cache", cache:
        driver_grants_and_reports_each_cache_mode
        mapping_fixes_cache_mode_of_region
        driver_rejects_invalid_map_options
        pages_are_mapped_on_fault
        large_pages_are_mapped_on_fault
        large_pages_keep_mode_beside_eager_mappings
        readers_follow_cache_mode_of_writers
        faults_after_unbind_raise_sigbus;
    "buffer", buffer:
        driver_refuses_invalid_or_read_only_buffers
        device_has_one_zeroed_buffer
        buffer_mappings_follow_rules_of_region
        debuggers_read_and_write_buffers
        buffer_ends_with_its_last_user
        buffers_leave_nothing_behind
        unbind_takes_the_buffer_from_every_process
        unbind_frees_memory_of_held_buffers
        unbind_races_buffers;
    "claims", claims:
        claim_is_exclusive_until_file_closes
        foreign_and_unknown_ends_are_refused
        claim_ends_when_its_process_is_killed
        claim_outlives_child_and_names_living_holder;
    "presence", presence:
        epoch_is_new_at_every_probe
        holder_words_follow_the_claims
        unbind_clears_the_driver_page
        questions_are_counted_and_need_writing;
    "doorbells", doorbells:
        doorbells_reach_the_host
        all_256_vectors_fire
        doorbells_survive_stopped_broker_without_blocking
        unbind_waits_until_doorbells_are_read
        interrupts_in_lock_step_are_never_lost
        device_without_vectors_rejects_reads;
    "interrupts", interrupts:
        read_reports_each_fired_vector_once
        read_waits_until_interrupt_or_signal
        last_interrupt_of_burst_always_arrives
        interrupts_are_counted_under_a_clear_name
        interrupts_are_counted_for_each_file
        claim_limits_vectors_of_its_file
        epoll_reports_vectors_claimed_later;
    "signals", signals:
        eventfds_are_written_for_their_vectors
        driver_refuses_invalid_eventfds
        eventfd_signals_removal_of_device;
    "hostile", hostile:
        hostile_superblocks_are_declined
        superblock_is_read_once
        hostile_driver_page_changes_nothing;
    "table", table:
        driver_takes_only_valid_new_channels
        channels_are_taken_in_each_cache_mode;
    "removal", removal:
        unbind_reaches_every_sleeper_and_mapping
        file_of_a_removed_device_stays_dead
        device_returns_after_remove_and_rescan
        hot_plugged_device_comes_and_goes;
    "races", races:
        unbind_races_mmap_and_fork
        unbind_races_claims_and_doorbells
        interrupt_storm_races_open_claim_and_close
        virtio_reset_races_unbind_and_unload;
    "rounds", rounds:
        device_goes_and_returns_while_used;
    "sleep", sleep:
        system_suspends_to_idle_while_used
        reset_device_stays_gone_after_suspend
        suspend_preserves_files_and_mappings
        hibernation_is_refused;
    "life", life:
        module_stays_while_it_is_used
        module_is_loaded_and_unloaded
        kernel_log_stays_clean;
    "cost", cost:
        memory_of_a_device_is_small
        mappings_leave_nothing_behind
        mapping_64_mib_takes_a_moment;
    "sleep_in_s3", sleep:
        system_suspends_to_memory_while_used;
};

/// Names of the checks whose VM needs the devices of all regions. The VM of other checks has the
/// device of [`Region::Main`](crate::Region::Main) alone. Its setup is a second shorter, and half
/// of that is due to the 256 vectors of [`Region::Bus`](crate::Region::Bus).
pub const WITH_ALL_DEVICES: &[&str] = &[
    "nodes_are_numbered_and_private_to_root",
    "foreign_memory_is_declined",
    "info_describes_each_device",
    "devices_are_independent",
    "device_takes_smallest_free_number",
    "stores_cross_both_ways",
    "mmap_refuses_the_drivers_page",
    "mapping_fixes_cache_mode_of_region",
    "driver_refuses_invalid_or_read_only_buffers",
    "device_has_one_zeroed_buffer",
    "foreign_and_unknown_ends_are_refused",
    "holder_words_follow_the_claims",
    "doorbells_reach_the_host",
    "all_256_vectors_fire",
    "doorbells_survive_stopped_broker_without_blocking",
    "unbind_waits_until_doorbells_are_read",
    "device_without_vectors_rejects_reads",
    "driver_refuses_invalid_eventfds",
    "device_returns_after_remove_and_rescan",
    "hot_plugged_device_comes_and_goes",
    "virtio_reset_races_unbind_and_unload",
    "module_stays_while_it_is_used",
    "module_is_loaded_and_unloaded",
    "memory_of_a_device_is_small",
];

/// Names of the checks that only unplug a device from the running VM. QEMU 11.1 ends itself when a
/// vfio-user device with MSI-X is unplugged, whichever server it has, so these checks do not run
/// over vfio-user. The test `vfio_user_device_allows_plugging_not_unplugging` shows that such a
/// device can at least be plugged in.
pub const UNPLUGGING: &[&str] = &["hot_plugged_device_comes_and_goes"];

/// Names of the checks that need a machine which can suspend to ACPI's S3 any number of times. With
/// SeaBIOS 1.17 a q35 machine can do so once (`docs/driver.md`, section 8).
pub const SLEEPING: &[&str] = &["system_suspends_to_memory_while_used"];

/// Names of the checks that ring while the broker is stopped. They do not run over vfio-user, where
/// each doorbell is a message to the broker and QEMU waits 5 s for the reply.
pub const PAUSING: &[&str] = &[
    "doorbells_survive_stopped_broker_without_blocking",
    "unbind_waits_until_doorbells_are_read",
];

/// Names of the checks that also run in a VM with an IOMMU. They cover everything that passes
/// through the IOMMU, namely DMA and interrupts, and devices whose IOMMU mappings come and go with
/// them.
pub const BEHIND_AN_IOMMU: &[&str] = &[
    "stores_cross_both_ways",
    "driver_refuses_invalid_or_read_only_buffers",
    "device_has_one_zeroed_buffer",
    "buffer_mappings_follow_rules_of_region",
    "debuggers_read_and_write_buffers",
    "buffer_ends_with_its_last_user",
    "buffers_leave_nothing_behind",
    "unbind_takes_the_buffer_from_every_process",
    "unbind_frees_memory_of_held_buffers",
    "unbind_races_buffers",
    "all_256_vectors_fire",
    "last_interrupt_of_burst_always_arrives",
    "device_returns_after_remove_and_rescan",
    "hot_plugged_device_comes_and_goes",
    "suspend_preserves_files_and_mappings",
    "kernel_log_stays_clean",
];
