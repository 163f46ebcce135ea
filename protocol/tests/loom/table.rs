// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The channel table grows while a reader takes its entries. The reader never sees a part of an
//! entry, and never loses one that it has.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use barlink_protocol::region::ModelFence;
use barlink_protocol::table;
use barlink_protocol::wire::layout::{
    Channel, ENTRY_WORDS, FIRST_FREE, Layout, Name, PAGE_SIZE, Policy,
};
use loom::thread;

use crate::model::{Words, model_of, region_of};

/// Returns the words of a table that the model uses: the count, and then three entries.
fn table() -> Words {
    region_of(1 + 3 * ENTRY_WORDS)
}

fn channel(number: u64) -> Channel {
    Channel {
        name: Name::new(["a", "b", "c"][number as usize]).unwrap(),
        producer: 0,
        consumer: 1,
        vector: 0,
        policy: Policy::Wait,
        offset: FIRST_FREE + number * 2 * PAGE_SIZE,
        capacity: PAGE_SIZE,
    }
}

/// Returns a layout with the first channel, and with room for two more.
fn layout() -> Layout {
    let end = channel(0).end();
    let layout = Layout::new(1 << 16, 1, 1, FIRST_FREE + 10 * PAGE_SIZE, 0, &[channel(0)]);
    layout.unwrap().with_reserve(end, 4 * PAGE_SIZE).unwrap()
}

/// Adds two channels while a reader takes entries twice. Returns the number of channels that the
/// reader has.
fn take_beside_broker(region: &Words) -> usize {
    table::publish(region, &layout(), 0);
    let its_region = region.clone();
    let broker = thread::spawn(move || {
        let mut layout = layout();
        for number in [1, 2] {
            layout.append(channel(number)).unwrap();
            table::publish(&its_region, &layout, number as usize);
        }
    });
    let mut taken = layout();
    for _ in 0..2 {
        let before = taken.clone();
        let found = table::extend(region, &mut taken);
        assert_eq!(found, Ok(()), "an entry is not whole");
        assert!(taken.extends(&before));
        let expected: Vec<_> = (0..taken.channels().len() as u64).map(channel).collect();
        assert_eq!(taken.channels(), expected, "an entry is not whole");
    }
    broker.join().unwrap();
    taken.channels().len()
}

#[test]
fn reader_takes_only_whole_entries() {
    static SEEN: [AtomicUsize; 4] = [const { AtomicUsize::new(0) }; 4];
    model_of(3, || {
        SEEN[take_beside_broker(&table())].fetch_add(1, Relaxed);
    });
    let seen = [1, 2, 3].map(|count| SEEN[count].load(Relaxed));
    assert!(!seen.contains(&0), "{seen:?}");
}

#[test]
#[should_panic(expected = "an entry is not whole")]
fn count_needs_its_order() {
    model_of(3, || {
        take_beside_broker(&table().without(ModelFence::Count));
    });
}
