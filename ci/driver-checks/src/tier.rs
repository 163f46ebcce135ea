// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tiers of tests, which choose the number of rounds of a loop. `cargo xtask test` shows each
//! behaviour a few times, `cargo xtask soak` repeats it.

use std::fmt;

/// Name of the environment variable that holds a test's tier, on the host and in the guest.
pub const VARIABLE: &str = "BARLINK_TIER";

/// The tier of a test run.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Tier {
    /// The tier of `cargo xtask test`.
    #[default]
    Test,
    /// The tier of `cargo xtask soak`.
    Soak,
}

impl Tier {
    /// Returns the tier of this process: [`Tier::Soak`] if [`VARIABLE`] is `soak`, else
    /// [`Tier::Test`].
    pub fn current() -> Self {
        match std::env::var_os(VARIABLE) {
            Some(name) if name == "soak" => Self::Soak,
            _ => Self::Test,
        }
    }

    /// Returns `test` or `soak`, the number of rounds of a loop in this tier.
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
