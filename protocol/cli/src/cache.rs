// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The report of cache modes that both programs print.

use barlink_protocol::CacheState;
use serde::Serialize;

/// Maximum length of a line, in columns: 80 less the label before it.
const WIDTH: usize = 66;

/// The cache mode of a guest's mappings.
#[derive(Clone, Debug, Serialize)]
pub struct Cache {
    /// The requested mode; `null` while nothing is mapped.
    pub asked: Option<&'static str>,
    /// The mode that the guest's kernel granted; `null` while no page is mapped.
    pub granted: Option<&'static str>,
    /// The reason why the two modes differ; `null` if they do not.
    pub cause: Option<String>,
    /// The remedy, as a text for the user.
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
    /// Returns the report, in lines that fit into a terminal of 80 columns. It is empty while
    /// nothing is mapped.
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
        lines.extend(wrap(self.cure.unwrap_or_default()));
        lines
    }
}

/// Wraps a text into lines that fit into a terminal of 80 columns, behind a label.
pub fn wrap(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + word.len() < WIDTH => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use barlink_protocol::wire::uapi::Info;

    use super::*;

    #[test]
    fn cure_wraps_into_short_lines() {
        let info = Info {
            asked: 6,
            granted: 1,
            region_address: 0xfd00_0000,
            ..Info::default()
        };
        let cache = Cache::from(CacheState::of(&info));
        let lines = cache.lines();
        assert_eq!(lines[0], "asked write-back, granted uncached-minus");
        assert_eq!(Some(&lines[1]), cache.cause.as_ref());
        assert_eq!(Some(lines[2..].join(" ").as_str()), cache.cure);
        assert!(lines.iter().all(|line| line.len() <= WIDTH), "{lines:#?}");
        let nothing = Cache::from(CacheState::of(&Info::default()));
        assert!(nothing.lines().is_empty());
    }
}
