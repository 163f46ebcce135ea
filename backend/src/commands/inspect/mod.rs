// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command `barlink inspect`: one snapshot as JSON or text, or a live view.

mod live;
mod snapshot;
mod view;

use std::io::{IsTerminal, stdin, stdout};

use anyhow::Result;
use barlink::Access;
use barlink_cli::standard::print;

use crate::args::Inspect;
use snapshot::Snapshot;

pub fn inspect(args: &Inspect) -> Result<()> {
    let attachment = super::attach(&args.which, Access::ReadOnly)?;
    let text = if args.json {
        serde_json::to_string_pretty(&Snapshot::take(&attachment)?)?
    } else if args.once || !stdout().is_terminal() || !stdin().is_terminal() {
        view::text(&Snapshot::take(&attachment)?)
    } else {
        return live::run(&attachment);
    };
    print(format!("{}\n", text.trim_end()))
}
