// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The cases that one run measures.

use anyhow::{Result, ensure};

use super::case::{Case, Way};
use super::idle;
use super::newest::Look;
use super::readers::Readers;
use super::steps;
use super::trip::Trip;
use barlink_vm::broker::Transport;

/// A plan. Each list is in the order of the measurements.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Streams.
    pub streams: Vec<Case>,
    /// Streams to several readers.
    pub readers: Vec<Readers>,
    /// Looks at the newest value.
    pub newest: Vec<Look>,
    /// Whether the steps of a record are measured.
    pub steps: bool,
    /// Round trips.
    pub trips: Vec<Trip>,
    /// The pairs of ends that sleep, each by its transport; `None` for the pair on the host.
    pub sleepers: Vec<Option<Transport>>,
}

impl Plan {
    /// Plans streams with records of `sizes`, round trips within the host with records of
    /// `trip_sizes`, other round trips, and ends that sleep. With texts in `only`, the plan has
    /// only cases with one of them in their names. An error if no case is left.
    pub fn new(sizes: &[u64], trip_sizes: &[u64], only: &[String]) -> Result<Self> {
        let wanted = |name: String| only.is_empty() || only.iter().any(|text| name.contains(text));
        let (mut streams, mut trips) = (Case::all(sizes), Trip::all(trip_sizes));
        let mut readers = Readers::all(sizes);
        let mut newest = Look::all(sizes);
        readers.retain(|readers| wanted(readers.to_string()));
        newest.retain(|look| wanted(look.to_string()));
        streams.retain(|case| wanted(case.to_string()));
        trips.retain(|trip| wanted(trip.to_string()));
        let sleepers = idle::all().filter(|transport| wanted(idle::name(*transport)));
        let plan = Self {
            streams,
            readers,
            newest,
            steps: wanted(steps::NAME.to_owned()),
            trips,
            sleepers: sleepers.collect(),
        };
        ensure!(
            !plan.streams.is_empty()
                || !plan.readers.is_empty()
                || !plan.newest.is_empty()
                || plan.steps
                || !plan.trips.is_empty()
                || !plan.sleepers.is_empty(),
            "nothing has {} in its name (--only)",
            only.join(" or ")
        );
        Ok(plan)
    }

    /// Returns the ways of all cases, each once.
    pub fn ways(&self) -> Vec<Way> {
        let streams = self.streams.iter().map(|case| case.way);
        let streams = streams.chain(self.readers.iter().map(|case| case.way));
        let streams = streams.chain(self.newest.iter().map(|look| look.way));
        let mut ways = Vec::new();
        for way in streams.chain(self.trips.iter().map(|trip| trip.way())) {
            if !ways.contains(&way) {
                ways.push(way);
            }
        }
        ways
    }
}
