// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The channel table grows while a reader takes its entries. The reader never sees a part of an
//! entry, and never loses one that it has.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use barlink_protocol::wire::layout::{
    Channel, ENTRY_WORDS, FIRST_FREE, Layout, Name, PAGE_SIZE, Policy, TABLE_COUNT, table_entry,
};
use barlink_protocol::{AtomicU64, Ordering, table};
use loom::thread;

use crate::model::model_of;

/// The words of the table that the model uses: the count, and then three entries.
#[derive(Clone)]
struct Table(Arc<[AtomicU64]>);

impl Table {
    fn word(&self, offset: u64) -> &AtomicU64 {
        match offset {
            TABLE_COUNT => &self.0[0],
            entry => &self.0[1 + ((entry - table_entry(0)) / 8) as usize],
        }
    }

    fn publish(&self, layout: &Layout, from: usize) {
        let store = |offset, word| self.word(offset).store(word, Ordering::Relaxed);
        let release = |offset, word| self.word(offset).store(word, Ordering::Release);
        table::publish_by(layout, from, store, release);
    }

    /// Takes entries as the driver does.
    fn extend(&self, layout: &mut Layout) {
        let count = self.word(TABLE_COUNT).load(Ordering::Acquire);
        let load = |word| self.word(8 * word as u64).load(Ordering::Relaxed);
        layout.take_entries(count, load).unwrap();
    }
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

#[test]
fn reader_takes_only_whole_entries() {
    static SEEN: [AtomicUsize; 4] = [const { AtomicUsize::new(0) }; 4];
    model_of(3, || {
        let words = 0..1 + 3 * ENTRY_WORDS;
        let table = Table(words.map(|_| AtomicU64::new(0)).collect());
        table.publish(&layout(), 0);
        let broker = table.clone();
        let broker = thread::spawn(move || {
            let mut layout = layout();
            for number in [1, 2] {
                layout.append(channel(number)).unwrap();
                broker.publish(&layout, number as usize);
            }
        });
        let mut taken = layout();
        for _ in 0..2 {
            let before = taken.clone();
            table.extend(&mut taken);
            assert!(taken.extends(&before));
            let expected: Vec<_> = (0..taken.channels().len() as u64).map(channel).collect();
            assert_eq!(taken.channels(), expected);
        }
        SEEN[taken.channels().len()].fetch_add(1, Relaxed);
        broker.join().unwrap();
    });
    let seen = [1, 2, 3].map(|count| SEEN[count].load(Relaxed));
    assert!(!seen.contains(&0), "{seen:?}");
}
