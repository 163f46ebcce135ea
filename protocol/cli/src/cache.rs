// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How both programs tell of a cache mode.

use barlink_protocol::CacheState;
use serde::Serialize;

/// The cache mode of a guest's mappings.
#[derive(Clone, Debug, Serialize)]
pub struct Cache {
    /// Which was asked for; `null` while nothing is mapped.
    pub asked: Option<&'static str>,
    /// Which the guest's kernel granted; `null` while no page is mapped.
    pub granted: Option<&'static str>,
    /// Why the two differ, if they do.
    pub cause: Option<String>,
    /// What to do about it.
    pub cure: Option<&'static str>,
}

impl From<CacheState> for Cache {
    fn from(state: CacheState) -> Self {
        let shortfall = state.shortfall();
        Cache {
            asked: state.asked(),
            granted: state.granted(),
            cause: shortfall.map(|shortfall| shortfall.to_string()),
            cure: shortfall.map(|shortfall| shortfall.cure()),
        }
    }
}

impl Cache {
    /// What to print, in one to three lines; none while nothing is mapped.
    pub fn lines(&self) -> Vec<String> {
        if self.asked.is_none() && self.granted.is_none() {
            return Vec::new();
        }
        let name = |mode: Option<&'static str>| mode.unwrap_or("none");
        let mut lines = vec![format!(
            "asked {}, granted {}",
            name(self.asked),
            name(self.granted)
        )];
        lines.extend(self.cause.clone());
        lines.extend(self.cure.map(|cure| format!("cure: {cure}")));
        lines
    }
}
