// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What one run measures.

use anyhow::{Result, ensure};

use super::case::{Case, Way};
use super::idle;
use super::trip::Trip;
use barlink_vm::broker::Transport;

/// Each in the order in which it is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Streams.
    pub streams: Vec<Case>,
    /// Round trips.
    pub trips: Vec<Trip>,
    /// Pairs of ends that sleep; none for the pair on the host.
    pub sleepers: Vec<Option<Transport>>,
}

impl Plan {
    /// Streams with records of some sizes and round trips within the host with others, of these what has one of the texts in its
    /// name, if there are any.
    pub fn new(sizes: &[u64], trip_sizes: &[u64], only: &[String]) -> Result<Self> {
        let wanted = |name: String| only.is_empty() || only.iter().any(|text| name.contains(text));
        let (mut streams, mut trips) = (Case::all(sizes), Trip::all(trip_sizes));
        streams.retain(|case| wanted(case.to_string()));
        trips.retain(|trip| wanted(trip.to_string()));
        let sleepers = idle::all().filter(|transport| wanted(idle::name(*transport)));
        let plan = Self {
            streams,
            trips,
            sleepers: sleepers.collect(),
        };
        ensure!(
            !plan.streams.is_empty() || !plan.trips.is_empty() || !plan.sleepers.is_empty(),
            "nothing has {} in its name (--only)",
            only.join(" or ")
        );
        Ok(plan)
    }

    /// The ways that it goes, each once.
    pub fn ways(&self) -> Vec<Way> {
        let streams = self.streams.iter().map(|case| case.way);
        let mut ways = Vec::new();
        for way in streams.chain(self.trips.iter().map(|trip| trip.way())) {
            if !ways.contains(&way) {
                ways.push(way);
            }
        }
        ways
    }
}
