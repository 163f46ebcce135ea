// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How deep a loop goes: `cargo xtask test` shows each behaviour a few times, `cargo xtask soak`
//! repeats it.

use std::fmt;

/// The environment variable that says which tier a test runs in, on the host and in the guest.
pub const VARIABLE: &str = "BARLINK_TIER";

/// How deep tests go.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Tier {
    /// As `cargo xtask test` runs them.
    #[default]
    Test,
    /// As `cargo xtask soak` runs them.
    Soak,
}

impl Tier {
    /// The tier of this process: [`VARIABLE`] holds `soak`, or it is [`Tier::Test`].
    pub fn current() -> Self {
        match std::env::var_os(VARIABLE) {
            Some(name) if name == "soak" => Self::Soak,
            _ => Self::Test,
        }
    }

    /// The rounds of a loop in this tier.
    pub fn rounds<T>(self, test: T, soak: T) -> T {
        match self {
            Self::Test => test,
            Self::Soak => soak,
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.rounds("test", "soak"))
    }
}

/// Chooses a loop's number of rounds: `test` under `cargo xtask test`, `soak` under `cargo xtask
/// soak`.
pub fn rounds<T>(test: T, soak: T) -> T {
    Tier::current().rounds(test, soak)
}
