// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The errors of system calls. They are all that this crate takes from `std`.

extern crate std;

pub(crate) use std::io::{Error, ErrorKind, Result};
