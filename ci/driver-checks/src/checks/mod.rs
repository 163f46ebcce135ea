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
        smallest_free_number_is_taken;
    "mmap", mmap:
        stores_cross_both_ways
        mappings_are_noncached_and_say_so
        mmap_refuses_the_drivers_page
        mmap_refuses_what_is_private_executable_or_outside
        read_only_file_gets_read_only_mappings
        mappings_survive_fork_split_and_move
        mappings_are_not_taken_for_the_kernels_memory;
    "cache", cache:
        each_cache_mode_is_granted_and_told
        one_cache_mode_holds_while_a_mapping_lives
        wishes_that_make_no_sense_are_refused
        pages_are_mapped_when_they_are_touched
        large_pages_are_mapped_when_they_are_touched
        large_page_is_not_mapped_over_a_page_of_another_mode
        pages_that_were_not_touched_yet_are_gone_with_the_device;
    "buffer", buffer:
        buffers_of_other_sizes_and_for_readers_are_refused
        buffer_is_one_a_device_and_zeroed
        buffer_is_mapped_as_the_region_is
        buffer_ends_with_its_last_descriptor_and_mapping
        buffers_leave_nothing_behind
        unbind_takes_the_buffer_from_every_process
        memory_of_buffers_is_free_after_unbind_whoever_has_them
        unbind_races_buffers;
    "claims", claims:
        claims_are_exclusive_and_end_with_their_file
        foreign_and_unknown_ends_are_refused
        claim_ends_when_its_process_is_killed;
    "presence", presence:
        epoch_is_new_at_every_probe
        holder_words_follow_the_claims
        unbind_clears_the_driver_page;
    "doorbells", doorbells:
        doorbells_reach_the_host
        all_256_vectors_fire
        doorbells_wait_for_a_slow_broker_and_nobody_waits_with_them
        doorbells_are_read_before_the_device_is_given_back
        interrupts_in_lock_step_are_never_lost
        device_without_vectors_says_so;
    "interrupts", interrupts:
        read_gives_what_fired_once
        read_waits_and_a_signal_ends_it
        last_interrupt_of_a_burst_is_always_delivered
        interrupts_are_counted_under_a_clear_name
        interrupts_are_counted_for_each_file
        claims_narrow_what_a_file_hears
        epoll_hears_of_vectors_claimed_later;
    "signals", signals:
        eventfds_are_written_for_their_vectors
        what_is_no_eventfd_is_refused
        eventfd_tells_that_the_device_goes;
    "hostile", hostile:
        hostile_superblocks_are_declined
        superblock_is_read_once
        hostile_driver_page_changes_nothing;
    "removal", removal:
        unbind_reaches_every_sleeper_and_mapping
        file_of_a_removed_device_stays_dead
        removed_and_rescanned
        hot_plugged_device_comes_and_goes;
    "races", races:
        unbind_races_mmap_and_fork
        unbind_races_claims_and_doorbells
        interrupt_storm_races_open_claim_and_close
        reset_of_a_virtio_device_races_unbind_and_unload;
    "rounds", rounds:
        device_comes_and_goes_under_its_users;
    "sleep", sleep:
        system_suspends_to_idle_under_its_users
        device_that_was_reset_is_gone_after_a_suspend_and_comes_back
        suspend_leaves_files_and_mappings_as_they_are
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
        system_suspends_to_memory_under_its_users;
};

/// Names of the checks whose VM needs the devices of all regions. The VM of other checks has the
/// device of [`Region::Main`](crate::Region::Main) alone. Its setup is a second shorter, and half
/// of that is due to the 256 vectors of [`Region::Bus`](crate::Region::Bus).
pub const WITH_ALL_DEVICES: &[&str] = &[
    "nodes_are_numbered_and_private_to_root",
    "foreign_memory_is_declined",
    "info_describes_each_device",
    "devices_are_independent",
    "smallest_free_number_is_taken",
    "stores_cross_both_ways",
    "mmap_refuses_the_drivers_page",
    "one_cache_mode_holds_while_a_mapping_lives",
    "buffers_of_other_sizes_and_for_readers_are_refused",
    "buffer_is_one_a_device_and_zeroed",
    "foreign_and_unknown_ends_are_refused",
    "holder_words_follow_the_claims",
    "doorbells_reach_the_host",
    "all_256_vectors_fire",
    "doorbells_wait_for_a_slow_broker_and_nobody_waits_with_them",
    "doorbells_are_read_before_the_device_is_given_back",
    "device_without_vectors_says_so",
    "what_is_no_eventfd_is_refused",
    "removed_and_rescanned",
    "hot_plugged_device_comes_and_goes",
    "reset_of_a_virtio_device_races_unbind_and_unload",
    "module_stays_while_it_is_used",
    "module_is_loaded_and_unloaded",
    "memory_of_a_device_is_small",
];

/// Names of the checks that only unplug a device from the running VM. QEMU 11.1 ends itself when a
/// vfio-user device with MSI-X is unplugged, whichever server it has, so these checks do not run
/// over vfio-user. The test `device_of_vfio_user_is_plugged_in_and_not_out` shows that such a
/// device can at least be plugged in.
pub const UNPLUGGING: &[&str] = &["hot_plugged_device_comes_and_goes"];

/// Names of the checks that need a machine which can suspend to ACPI's S3 any number of times. With
/// SeaBIOS 1.17 a q35 machine can do so once (`docs/driver.md`, section 8).
pub const SLEEPING: &[&str] = &["system_suspends_to_memory_under_its_users"];

/// Names of the checks that ring while the broker is stopped. They do not run over vfio-user, where
/// each doorbell is a message to the broker and QEMU waits 5 s for the reply.
pub const PAUSING: &[&str] = &[
    "doorbells_wait_for_a_slow_broker_and_nobody_waits_with_them",
    "doorbells_are_read_before_the_device_is_given_back",
];

/// Names of the checks that also run in a VM with an IOMMU. They cover everything that passes
/// through the IOMMU, namely DMA and interrupts, and devices whose IOMMU mappings come and go with
/// them.
pub const BEHIND_AN_IOMMU: &[&str] = &[
    "stores_cross_both_ways",
    "buffers_of_other_sizes_and_for_readers_are_refused",
    "buffer_is_one_a_device_and_zeroed",
    "buffer_is_mapped_as_the_region_is",
    "buffer_ends_with_its_last_descriptor_and_mapping",
    "buffers_leave_nothing_behind",
    "unbind_takes_the_buffer_from_every_process",
    "memory_of_buffers_is_free_after_unbind_whoever_has_them",
    "unbind_races_buffers",
    "all_256_vectors_fire",
    "last_interrupt_of_a_burst_is_always_delivered",
    "removed_and_rescanned",
    "hot_plugged_device_comes_and_goes",
    "suspend_leaves_files_and_mappings_as_they_are",
    "kernel_log_stays_clean",
];
