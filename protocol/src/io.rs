// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The errors of system calls. Besides them this crate takes only vectors from `std`.

extern crate std;

pub(crate) use std::io::{Error, ErrorKind, Result};
