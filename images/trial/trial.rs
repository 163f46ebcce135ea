// SPDX-License-Identifier: GPL-2.0

//! The smallest module that needs the kernel crate. It links only if the Rust metadata fits the
//! kernel, because the names of the crate's symbols contain a hash of the crate.

use kernel::prelude::*;

module! {
    type: Trial,
    name: "trial",
    authors: ["barlink"],
    description: "Shows that the Rust metadata fits the kernel",
    license: "GPL",
}

struct Trial;

impl kernel::Module for Trial {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        pr_info!("loaded\n");
        Ok(Self)
    }
}
