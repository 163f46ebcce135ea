// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The variables of the environment that the program reads. `barlink --help` and `barlink serve
//! --help` list them.

use std::ffi::OsString;

/// Returns the value of a variable. A variable with an empty value counts as not set, as systemd
/// and shells take it.
pub fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Returns the value of a variable that is text. Other bytes count as not set.
pub fn text(name: &str) -> Option<String> {
    variable(name)?.into_string().ok()
}
