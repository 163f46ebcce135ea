// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Lays out a region: turns the operator's choices into offsets.

mod choices;
mod error;

use std::path::Path;

use barlink_protocol::wire::layout::{
    self, BrokerName, Channel, FIRST_FREE, Layout, MAX_CHANNELS, MAX_SLOTS, MAX_VECTORS,
    MIN_CAPACITY, Name, PAGE_SIZE, Policy,
};

pub use self::choices::{ChannelPlan, Direction, Party, Reserve};
pub use self::error::PlanError;

/// Least bytes in the raw window, unless the operator chooses the channels.
const RAW_WINDOW: u64 = 64 << 10;

/// Returns the vector of a channel. Vector 0 is control. The channels share the others, or vector 0
/// if there is no other.
pub fn vector_of(index: usize, vectors: u32) -> u32 {
    match vectors {
        0 | 1 => 0,
        // CAST: a region has at most 60 channels.
        _ => 1 + index as u32 % (vectors - 1),
    }
}

/// Lays out a region for `slots` slots. `vectors` is 0 for one vector a channel and one for
/// control. Without channels, each slot has an `up` and a `down`, as large as fits.
pub fn plan(
    size: u64,
    slots: u32,
    vectors: u32,
    channels: &[ChannelPlan],
    reserve: Reserve,
) -> Result<Layout, PlanError> {
    if !(1..=MAX_SLOTS).contains(&slots) {
        return Err(PlanError::Slots(slots));
    }
    if !size.is_power_of_two() {
        let above = size.checked_next_power_of_two().unwrap_or(1 << 63);
        let possible =
            |size: &u64| *size > 0 && plan(*size, slots, vectors, channels, reserve).is_ok();
        let candidates: Vec<_> = [above / 2, above].into_iter().filter(possible).collect();
        if candidates.is_empty() {
            // Neither power of two beside the size is possible. The reason for that matters more
            // than that the size is no power of two, so it is the error.
            plan(above, slots, vectors, channels, reserve).map_err(|error| match error {
                PlanError::TooSmall { needed, .. } => PlanError::TooSmall { size, needed },
                PlanError::TooLarge { memory, .. } => PlanError::TooLarge { size, memory },
                error => error,
            })?;
        }
        return Err(PlanError::NotAPowerOfTwo { size, candidates });
    }
    let memory = rustix::system::sysinfo();
    let memory = memory.totalram.saturating_mul(u64::from(memory.mem_unit));
    if size > memory {
        return Err(PlanError::TooLarge { size, memory });
    }
    let too_small = |needed: u64| {
        let needed = needed.checked_next_power_of_two().unwrap_or(u64::MAX);
        match needed > memory {
            true => PlanError::ChannelsTooLarge { needed, memory },
            false => PlanError::TooSmall { size, needed },
        }
    };
    let chosen = if channels.is_empty() {
        default_channels(size, slots, reserve.bytes)?
    } else {
        channels.to_vec()
    };
    for (index, channel) in chosen.iter().enumerate() {
        if chosen[..index]
            .iter()
            .any(|other| other.name == channel.name)
        {
            return Err(PlanError::SameName(channel.name.to_string()));
        }
    }
    if chosen.len() > MAX_CHANNELS {
        return Err(PlanError::Channels(chosen.len()));
    }
    let wanted = match vectors {
        0 => chosen.len() as u32 + 1,
        given => given,
    };
    let reserved = reserve.vectors;
    let vectors = wanted.saturating_add(reserved);
    if vectors > MAX_VECTORS {
        return Err(PlanError::Vectors { wanted, reserved });
    }
    let mut next = FIRST_FREE;
    let mut entries = Vec::with_capacity(chosen.len());
    for (index, channel) in chosen.iter().enumerate() {
        let [producer, consumer] = channel.peers(slots)?;
        let entry = Channel {
            name: channel.name,
            producer,
            consumer,
            vector: vector_of(index, vectors),
            policy: channel.policy,
            offset: next,
            capacity: channel.capacity,
        };
        next = next
            .saturating_add(layout::channel::DATA)
            .saturating_add(channel.capacity);
        entries.push(entry);
    }
    let reserve_offset = if reserve.bytes > 0 { next } else { 0 };
    next = next.saturating_add(reserve.bytes);
    let end = size.saturating_sub(u64::from(slots) * PAGE_SIZE);
    if next > end {
        return Err(too_small(next.saturating_add(u64::from(slots) * PAGE_SIZE)));
    }
    Ok(
        Layout::new(size, slots, vectors, next, end - next, &entries)?
            .with_reserve(reserve_offset, reserve.bytes)?,
    )
}

/// Returns the name of a broker: that of its control socket's file without `.sock`, as
/// `barlink list` shows it. The broker has none if that is no name.
pub fn broker_name(control: &Path) -> BrokerName {
    let file = control.file_name().and_then(|file| file.to_str());
    let name = file.and_then(|file| file.strip_suffix(".sock"));
    name.and_then(BrokerName::new).unwrap_or_default()
}

/// Returns whether a running region is the one that a plan describes, whatever its identity is, and
/// whatever channels were added since.
pub fn fits(planned: &Layout, running: &Layout) -> bool {
    running.extends(&planned.clone().with_identity(running.identity))
}

/// Plans an `up` and a `down` for each slot (`up1`, `down1` for slot 1), of the largest size that
/// leaves a raw window.
fn default_channels(size: u64, slots: u32, reserve: u64) -> Result<Vec<ChannelPlan>, PlanError> {
    let fixed = FIRST_FREE + RAW_WINDOW + u64::from(slots) * PAGE_SIZE;
    let reserved = fixed.saturating_add(reserve);
    let share = size.saturating_sub(reserved) / (2 * u64::from(slots));
    let room = share.saturating_sub(layout::channel::DATA);
    if room < MIN_CAPACITY {
        let channels = 2 * u64::from(slots) * (layout::channel::DATA + MIN_CAPACITY);
        let needed = reserved.saturating_add(channels);
        return Err(PlanError::TooSmall {
            size,
            needed: needed.checked_next_power_of_two().unwrap_or(u64::MAX),
        });
    }
    let capacity = (room / 2 + 1).next_power_of_two();
    let channel = |name: &str, slot: u32, from, to| {
        let text = if slot == 0 {
            name.to_owned()
        } else {
            format!("{name}{slot}")
        };
        let name = Name::new(&text).unwrap_or_else(|| unreachable!("{text} is a name"));
        ChannelPlan {
            name,
            direction: Direction { from, to },
            capacity,
            policy: Policy::Wait,
        }
    };
    let pair = |slot| {
        [
            channel("up", slot, Party::Slot(slot), Party::Host),
            channel("down", slot, Party::Host, Party::Slot(slot)),
        ]
    };
    Ok((0..slots).flat_map(pair).collect())
}

#[cfg(test)]
mod tests {
    use barlink_protocol::wire::layout::NO_PEER;

    use super::*;

    fn plan(
        size: u64,
        slots: u32,
        vectors: u32,
        channels: &[ChannelPlan],
    ) -> Result<Layout, PlanError> {
        super::plan(size, slots, vectors, channels, Reserve::default())
    }

    #[test]
    fn reserve_lies_between_channels_and_window() {
        let reserve = "1M,4".parse().unwrap();
        let layout = super::plan(4 << 20, 1, 0, &[], reserve).unwrap();
        let last = layout.channels().last().unwrap();
        assert_eq!(layout.room(), (last.end(), 1 << 20));
        assert_eq!(layout.raw_offset, last.end() + (1 << 20));
        assert_eq!(layout.vectors, 3 + 4);
        let given = super::plan(4 << 20, 1, 2, &[], reserve).unwrap();
        assert_eq!(given.vectors, 2 + 4);
        // A running region fits its plan, also when channels were added to it. It fits no other
        // plan.
        let mut running = layout.clone();
        let name = Name::new("added").unwrap();
        let offset = layout.room().0;
        running
            .append(Channel {
                name,
                offset,
                capacity: MIN_CAPACITY,
                ..*last
            })
            .unwrap();
        assert!(fits(&layout, &running));
        assert!(!fits(&plan(4 << 20, 1, 7, &[]).unwrap(), &running));
        for text in ["", "1M,", "1M,x", "4K", "0", ",4", "x,4"] {
            assert!(text.parse::<Reserve>().is_err(), "{text}");
        }
        assert_eq!("8193".parse::<Reserve>().unwrap().bytes, 12 << 10);
        for reserve in ["4M", "8388608T"] {
            let reserve = reserve.parse().unwrap();
            let error = super::plan(4 << 20, 1, 0, &[], reserve).unwrap_err();
            assert!(error.to_string().contains("too small"), "{error}");
        }
    }

    #[test]
    fn default_channels_leave_a_raw_window() {
        for (size, slots) in [
            (128 << 10, 1),
            (1 << 20, 1),
            (64 << 20, 1),
            (64 << 20, 16),
            (1 << 30, 3),
        ] {
            let layout = plan(size, slots, 0, &[]).unwrap();
            let capacity = layout.channels()[0].capacity;
            assert!(layout.raw_size >= RAW_WINDOW);
            assert!(
                2 * u64::from(slots) * (2 * capacity + PAGE_SIZE) + RAW_WINDOW + FIRST_FREE
                    > size - 16 * PAGE_SIZE
            );
            assert_eq!(layout.vectors, 2 * slots + 1);
        }
        let names = plan(1 << 20, 2, 0, &[]).unwrap();
        assert_eq!(
            names
                .channels()
                .iter()
                .map(|c| c.name.to_string())
                .collect::<Vec<_>>(),
            ["up", "down", "up1", "down1"]
        );
    }

    #[test]
    fn control_socket_names_broker() {
        for (path, name) in [
            ("/run/user/1000/barlink/vm1.sock", "vm1"),
            ("My_VM-2.sock", "My_VM-2"),
            ("/tmp/vm1", ""),
            ("/tmp/vm 1.sock", ""),
            ("/tmp/.sock", ""),
        ] {
            assert_eq!(broker_name(Path::new(path)).as_str(), name, "{path}");
        }
    }

    #[test]
    fn channels_share_few_vectors() {
        let vectors = |vectors| -> Vec<u32> {
            plan(1 << 20, 2, vectors, &[])
                .unwrap()
                .channels()
                .iter()
                .map(|c| c.vector)
                .collect()
        };
        assert_eq!(vectors(0), [1, 2, 3, 4]);
        assert_eq!(vectors(3), [1, 2, 1, 2]);
        assert_eq!(vectors(1), [0, 0, 0, 0]);
    }

    #[test]
    fn rejects_sizes_of_no_bar() {
        assert_eq!(
            plan(100 << 20, 1, 0, &[]).unwrap_err().to_string(),
            "region size 100.00 MiB is not a power of two: take --size 64M or 128M"
        );
        for size in [0, 1, 1000, 4095] {
            assert!(plan(size, 1, 0, &[]).is_err(), "{size}");
        }
        assert_eq!(
            plan(4096, 1, 0, &[]),
            Err(PlanError::TooSmall {
                size: 4096,
                needed: 128 << 10
            })
        );
        // Powers of two and others: the error names the size and the machine's memory.
        for size in [1 << 62, 100 << 40, 3 << 61, u64::MAX] {
            let Err(PlanError::TooLarge {
                size: reported,
                memory,
            }) = plan(size, 1, 0, &[])
            else {
                panic!("{size}");
            };
            assert_eq!(reported, size);
            plan(1 << memory.ilog2(), 1, 0, &[]).unwrap();
        }
    }

    #[test]
    fn rejected_channel_size_names_nearest() {
        for (size, nearest) in [
            ("15M", "16M"),
            ("9M", "8M"),
            ("12M", "8M"),
            ("1K", "4K"),
            ("5000", "4K"),
            ("0", "4K"),
        ] {
            let error = format!("a=up,{size}").parse::<ChannelPlan>().unwrap_err();
            assert!(error.ends_with(&format!("take {nearest}")), "{error}");
        }
    }

    #[test]
    fn rejects_channels_that_do_not_fit() {
        let plan = |size, channel: &str| plan(size, 1, 0, &[channel.parse().unwrap()]);
        let error = plan(64 << 20, "a=up,64M").unwrap_err();
        assert_eq!(
            error.to_string(),
            "region size 64.00 MiB is too small for its channels: take --size 128M or more"
        );
        plan(128 << 20, "a=up,64M").unwrap();
        let error = plan(64 << 20, "a=up,8388608T").unwrap_err();
        assert!(
            matches!(error, PlanError::ChannelsTooLarge { .. }),
            "{error}"
        );
    }

    #[test]
    fn parses_or_rejects_channels() {
        let plan: ChannelPlan = "camera=up,4M,drop".parse().unwrap();
        assert_eq!((plan.capacity, plan.policy), (4 << 20, Policy::Drop));
        for text in ["camera=down,4M,overwrite", "camera=host-taps,4M,overwrite"] {
            let plan: ChannelPlan = text.parse().unwrap();
            assert_eq!(plan.policy, Policy::Overwrite);
            assert_eq!(plan.peers(1), Ok([1, NO_PEER]), "{text}");
        }
        assert_eq!("c=up,4M,wait".parse(), "c=up,4M".parse::<ChannelPlan>());
        assert_eq!(
            "1-0".parse(),
            Ok(Direction {
                from: Party::Slot(1),
                to: Party::Slot(0)
            })
        );
        for text in [
            "camera",
            "=up,4M",
            "Camera=up,4M",
            "c=side,4M",
            "c=up",
            "c=up,3M",
            "c=up,1K",
            "c=up,x",
            "c=up,4M,no",
            "c=0-host,4M,overwrite",
            "c=0-taps,4M",
            "c=0-taps,4M,drop",
            "c=taps-host,4M",
            "c=taps-taps,4M,overwrite",
        ] {
            assert!(text.parse::<ChannelPlan>().is_err(), "{text}");
        }
    }

    #[test]
    fn rejects_channel_of_missing_slot() {
        let error = plan(1 << 20, 1, 0, &["x=1-host,4K".parse().unwrap()]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "channel `x` is for slot 1, and the last one is 0: add a socket for each VM, or choose another slot"
        );
    }
}
