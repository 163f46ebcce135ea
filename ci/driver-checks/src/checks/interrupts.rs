// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checks of `read`, `poll` and `epoll`: the interrupts that each open file receives.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use barlink_protocol::wire::layout::PAGE_SIZE as PAGE;
use barlink_protocol::wire::uapi::Eventfd;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;
use rustix::process::Signal;
use rustix::time::Timespec;

use crate::ask::{RAW, Region};
use crate::binding::{open, open_nonblocking, virtio};
use crate::calls::let_interrupt;
use crate::device::{DOWN, DOWN_VECTOR, Device, SOON, SPARE_VECTOR, UP, UP_VECTOR, fails};
use crate::host;
use crate::process::{Ended, child};
use crate::tier::rounds;

fn ring(vector: u32) -> Result<()> {
    host::ring(Region::Main, vector)
}

/// Rings a vector, and waits until the driver has reported it to all files.
fn ring_through(vector: u32) -> Result<()> {
    host::ring_through(Region::Main, vector)
}

pub(super) fn read_reports_each_fired_vector_once() -> Result<()> {
    let device = open_nonblocking(Region::Main)?;
    fails(device.interrupts(), Errno::AGAIN);
    assert!(!device.is_readable()?);
    host::ring_times(Region::Main, DOWN_VECTOR, 3)?;
    assert!(device.becomes_readable()?);
    ring_through(DOWN_VECTOR)?;
    ring_through(UP_VECTOR)?;
    assert!(device.is_readable()?);
    assert_eq!(device.interrupts()?, [UP_VECTOR, DOWN_VECTOR]);
    fails(device.interrupts(), Errno::AGAIN);
    assert!(!device.is_readable()?);
    // A buffer that is too short is refused, a buffer that is too long is filled in part.
    fails(rustix::io::read(&device, &mut [0; 31]), Errno::INVAL);
    fails(rustix::io::read(&device, &mut [0; 0]), Errno::INVAL);
    ring(SPARE_VECTOR)?;
    assert!(device.becomes_readable()?);
    assert_eq!(rustix::io::read(&device, &mut [0; 100])?, 32);
    // A failed `read` loses no interrupts.
    ring(SPARE_VECTOR)?;
    assert!(device.becomes_readable()?);
    fails(device.interrupts_to_nowhere(), Errno::FAULT);
    assert!(device.becomes_readable()?);
    assert_eq!(device.interrupts()?, [SPARE_VECTOR]);
    Ok(())
}

pub(super) fn read_waits_until_interrupt_or_signal() -> Result<()> {
    let device = open(Region::Main)?;
    let reader = || {
        child(|parent| {
            parent.send_ready()?;
            assert_eq!(device.interrupts()?, [DOWN_VECTOR]);
            Ok(())
        })
    };
    let waiting = reader()?;
    waiting.wait_asleep()?;
    ring(DOWN_VECTOR)?;
    waiting.succeeds()?;
    let polling = child(|parent| {
        parent.send_ready()?;
        assert!(device.becomes_readable()?);
        Ok(())
    })?;
    polling.wait_asleep()?;
    ring(DOWN_VECTOR)?;
    polling.succeeds()?;
    assert_eq!(device.next_interrupts(1)?, [DOWN_VECTOR]);
    // A sleeping reader can be killed. It sleeps on after a stop and continue. A signal with
    // a handler interrupts it.
    let killed = reader()?;
    killed.wait_asleep()?;
    killed.kill(Signal::KILL)?;
    assert_eq!(killed.wait()?, Ended::By(Signal::KILL));
    let stopped = reader()?;
    stopped.wait_asleep()?;
    stopped.kill(Signal::STOP)?;
    stopped.kill(Signal::CONT)?;
    ring(DOWN_VECTOR)?;
    stopped.succeeds()?;
    let interrupted = child(|parent| {
        let_interrupt(Signal::USR1)?;
        parent.send_ready()?;
        fails(device.interrupts(), Errno::INTR);
        Ok(())
    })?;
    interrupted.wait_asleep()?;
    interrupted.kill(Signal::USR1)?;
    interrupted.succeeds()
}

/// Checks `read`, `poll` and an eventfd at the same time.
pub(super) fn last_interrupt_of_burst_always_arrives() -> Result<()> {
    let rounds = rounds(40, 200);
    let device = open(Region::Main)?;
    // Starts a child that reports the number of each burst to the parent when it is woken after the
    // end of that burst.
    let listener = |wait: fn(&Device, &OwnedFd) -> Result<()>| {
        child(|parent| {
            let own = open(Region::Main)?;
            let notifier = eventfd(0, EventfdFlags::CLOEXEC)?;
            own.signal(Eventfd {
                vector: UP_VECTOR,
                descriptor: notifier.as_fd().as_raw_fd(),
            })?;
            let map = own.map(RAW, PAGE)?;
            parent.send_ready()?;
            let mut reported = 0;
            while reported < rounds {
                wait(&own, &notifier)?;
                // Number of the last burst that has ended.
                let ended = map.read(0);
                if ended > reported {
                    reported = ended;
                    parent.send(reported)?;
                }
            }
            Ok(())
        })
    };
    let listeners = [
        listener(|device, _| Ok(device.interrupts().map(drop)?))?,
        listener(|device, _| {
            ensure!(device.becomes_readable()?, "poll hears nothing");
            Ok(device.interrupts().map(drop)?)
        })?,
        listener(|_, notifier| Ok(rustix::io::read(notifier, &mut [0; 8]).map(drop)?))?,
    ];
    device.map(RAW, PAGE)?.write(0, 0);
    for listener in &listeners {
        listener.wait_ready()?;
    }
    for round in 1..=rounds {
        // Each burst has 1 to 500 rings and comes after 0 to 2 ms. Both are spread over the rounds.
        let times = (round * 7919) % 500 + 1;
        thread::sleep(Duration::from_micros(round * 104_729 % 2000));
        host::burst(Region::Main, UP_VECTOR, times, RAW, round)?;
        for listener in &listeners {
            assert_eq!(listener.receive()?, round, "the last of {times} is lost");
        }
    }
    for listener in listeners {
        listener.succeeds()?;
    }
    Ok(())
}

/// Counts the device's interrupts in `/proc/interrupts`. The lines of a PCI device have the address
/// of the PCI function and the driver's name. A virtio device has one line with its own name.
fn fired() -> Result<u64> {
    let virtio = virtio(Region::Main)?;
    let pci = Region::Main.facts().pci;
    let text = fs::read_to_string("/proc/interrupts")?;
    let is_ours = |line: &&str| match &virtio {
        Some(name) => line.split([' ', ',']).any(|word| word == name),
        None => line.contains(pci) && line.trim_end().ends_with("barlink"),
    };
    let lines: Vec<_> = text.lines().filter(is_ours).collect();
    let expected = match virtio {
        Some(_) => 1,
        None => Region::Main.facts().vectors as usize,
    };
    assert_eq!(lines.len(), expected, "{text}");
    let counts = lines.iter().flat_map(|line| {
        let fields = line.split_whitespace().skip(1);
        fields.map_while(|field| field.parse::<u64>().ok())
    });
    Ok(counts.sum())
}

pub(super) fn interrupts_are_counted_under_a_clear_name() -> Result<()> {
    let device = open(Region::Main)?;
    let before = fired()?;
    for _ in 0..20 {
        ring(UP_VECTOR)?;
        assert_eq!(device.next_interrupts(1)?, [UP_VECTOR]);
    }
    let after = fired()?;
    ensure!(after >= before + 20, "{before} before, {after} after");
    Ok(())
}

pub(super) fn interrupts_are_counted_for_each_file() -> Result<()> {
    let (first, second, third) = (
        open_nonblocking(Region::Main)?,
        open_nonblocking(Region::Main)?,
        open_nonblocking(Region::Main)?,
    );
    ring_through(UP_VECTOR)?;
    for file in [&first, &second, &third] {
        assert!(file.is_readable()?);
    }
    assert_eq!(first.interrupts()?, [UP_VECTOR]);
    fails(first.interrupts(), Errno::AGAIN);
    ring_through(SPARE_VECTOR)?;
    assert_eq!(first.interrupts()?, [SPARE_VECTOR]);
    assert_eq!(second.interrupts()?, [UP_VECTOR, SPARE_VECTOR]);
    // A file does not receive interrupts from before it was opened.
    let late = open_nonblocking(Region::Main)?;
    fails(late.interrupts(), Errno::AGAIN);
    assert_eq!(third.interrupts()?, [UP_VECTOR, SPARE_VECTOR]);
    // A file with claims receives vector 0 and the vectors of its channels. A file without claims
    // receives all vectors.
    first.claim(UP)?;
    for vector in 0..4 {
        ring_through(vector)?;
    }
    assert_eq!(first.interrupts()?, [0, UP_VECTOR]);
    assert_eq!(second.interrupts()?, [0, 1, 2, 3]);
    Ok(())
}

pub(super) fn claim_limits_vectors_of_its_file() -> Result<()> {
    let (up, down, all) = (
        open_nonblocking(Region::Main)?,
        open_nonblocking(Region::Main)?,
        open_nonblocking(Region::Main)?,
    );
    // A claim also removes pending interrupts of vectors that the file no longer receives.
    ring_through(SPARE_VECTOR)?;
    assert!(up.is_readable()?);
    up.claim(UP)?;
    fails(up.interrupts(), Errno::AGAIN);
    down.claim(DOWN)?;
    for vector in 1..4 {
        ring_through(vector)?;
    }
    assert_eq!(up.interrupts()?, [UP_VECTOR]);
    assert_eq!(down.interrupts()?, [DOWN_VECTOR]);
    assert_eq!(all.interrupts()?, [1, 2, 3]);
    ring_through(0)?;
    for file in [&up, &down, &all] {
        assert_eq!(file.interrupts()?, [0]);
    }
    // A refused claim does not change the vectors of a file.
    fails(all.claim(UP), Errno::BUSY);
    ring_through(SPARE_VECTOR)?;
    assert_eq!(all.interrupts()?, [SPARE_VECTOR]);
    assert!(!up.is_readable()?);
    // A file with two claims receives the vectors of both channels.
    drop(down);
    up.claim(DOWN)?;
    for vector in 1..4 {
        ring_through(vector)?;
    }
    assert_eq!(up.interrupts()?, [UP_VECTOR, DOWN_VECTOR]);
    Ok(())
}

pub(super) fn epoll_reports_vectors_claimed_later() -> Result<()> {
    let device = open_nonblocking(Region::Main)?;
    device.claim(UP)?;
    let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let (data, wanted) = (epoll::EventData::new_u64(0), epoll::EventFlags::IN);
    epoll::add(&set, &device, data, wanted)?;
    let now = Duration::ZERO;
    let count = |timeout| -> Result<usize> {
        let timeout = Timespec::try_from(timeout)?;
        let mut events = Vec::with_capacity(4);
        let space = rustix::buffer::spare_capacity(&mut events);
        Ok(epoll::wait(&set, space, Some(&timeout))?)
    };
    // A vector of another end is no event for the file.
    ring_through(DOWN_VECTOR)?;
    assert_eq!(count(now)?, 0);
    let sleeper = child(|parent| {
        parent.send_ready()?;
        assert_eq!(count(SOON)?, 1);
        Ok(())
    })?;
    sleeper.wait_asleep()?;
    device.claim(DOWN)?;
    ring(DOWN_VECTOR)?;
    sleeper.succeeds()?;
    assert_eq!(device.next_interrupts(1)?, [DOWN_VECTOR]);
    assert_eq!(count(now)?, 0);
    // Closing the file removes it from the epoll set.
    drop(device);
    assert_eq!(count(now)?, 0);
    Ok(())
}
