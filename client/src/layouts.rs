// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The layout of a region, which gets more channels while the region is in use.

use std::sync::OnceLock;

use barlink_protocol::wire::layout::Layout;

/// The layouts of a region: the first one, and a newer one for each time that channels were added.
/// References to older layouts stay valid.
#[derive(Debug)]
pub struct Layouts {
    layout: Layout,
    newer: OnceLock<Box<Layouts>>,
}

impl Layouts {
    /// Begins with a layout.
    pub fn new(layout: Layout) -> Self {
        Layouts {
            layout,
            newer: OnceLock::new(),
        }
    }

    fn last(&self) -> &Self {
        let mut last = self;
        while let Some(newer) = last.newer.get() {
            last = newer;
        }
        last
    }

    /// Returns the newest layout.
    pub fn latest(&self) -> &Layout {
        &self.last().layout
    }

    /// Adds a layout. Returns false if it is not the newest one with more channels, or an older
    /// one, so that it describes another region.
    pub fn extend(&self, layout: Layout) -> bool {
        let mut next = Box::new(Self::new(layout));
        loop {
            let last = self.last();
            if last.layout.extends(&next.layout) {
                return true;
            }
            if !next.layout.extends(&last.layout) {
                return false;
            }
            match last.newer.set(next) {
                Ok(()) => return true,
                // Another thread has added one meanwhile.
                Err(back) => next = back,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use barlink_protocol::wire::layout::{Channel, FIRST_FREE, Identity, Instance, Name, Policy};

    use super::*;

    fn layout(channels: usize) -> Layout {
        let layout = Layout::new(1 << 20, 1, 1, 1 << 19, 0, &[]).unwrap();
        let mut layout = layout.with_reserve(FIRST_FREE, 1 << 16).unwrap();
        for name in ["a", "b", "c"].into_iter().take(channels) {
            let channel = Channel {
                name: Name::new(name).unwrap(),
                producer: 0,
                consumer: 1,
                vector: 0,
                policy: Policy::Wait,
                offset: layout.room().0,
                capacity: 4096,
            };
            layout.append(channel).unwrap();
        }
        layout
    }

    #[test]
    fn older_references_outlive_new_layouts() {
        let layouts = Layouts::new(layout(0));
        let first = layouts.latest();
        assert!(layouts.extend(layout(2)));
        assert!(layouts.extend(layout(1)) && layouts.extend(layout(2)));
        assert_eq!(layouts.latest(), &layout(2));
        assert!(layouts.extend(layout(3)));
        assert_eq!((first, layouts.latest()), (&layout(0), &layout(3)));
        let identity = Identity {
            instance: Instance::new([1; 16]),
            ..Identity::EMPTY
        };
        assert!(!layouts.extend(layout(3).with_identity(identity)));
    }
}
