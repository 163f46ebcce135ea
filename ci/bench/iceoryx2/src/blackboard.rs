// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The newest value of a sender that never pauses, by a blackboard of iceoryx2. The type of a value
//! is fixed when the program is compiled, so there are two sizes.

use anyhow::{Result, anyhow, bail};
use barlink_bench_load::{Measured, Newest, word};
use iceoryx2::prelude::*;

/// The key of the only value.
const KEY: u64 = 0;
/// Words of the two sizes.
const SMALL: usize = 8;
const LARGE: usize = 8192;

/// Writes values until the standard input of this process ends. Each is built in an array and
/// copied, because a value in place needs unsafe code.
pub fn renew(node: &Node<ipc::Service>, service: &str, record_size: usize) -> Result<Measured> {
    match record_size / 8 {
        SMALL => renew_words::<SMALL>(node, service),
        LARGE => renew_words::<LARGE>(node, service),
        _ => bail!("no blackboard has values of {record_size} bytes"),
    }
}

/// Reads the newest value again and again for some milliseconds, and adds up its words.
pub fn newest(
    node: &Node<ipc::Service>,
    service: &str,
    record_size: usize,
    time: u64,
) -> Result<Newest> {
    match record_size / 8 {
        SMALL => newest_of_words::<SMALL>(node, service, time),
        LARGE => newest_of_words::<LARGE>(node, service, time),
        _ => bail!("no blackboard has values of {record_size} bytes"),
    }
}

fn name(service: &str) -> Result<ServiceName> {
    ServiceName::new(service).map_err(|error| anyhow!("{service}: {error:?}"))
}

fn renew_words<const WORDS: usize>(node: &Node<ipc::Service>, service: &str) -> Result<Measured> {
    let blackboard = node
        .service_builder(&name(service)?)
        .blackboard_creator::<u64>()
        .add(KEY, [0_u64; WORDS])
        .create()
        .map_err(|error| anyhow!("{service} cannot be created: {error}"))?;
    let writer = blackboard.writer_builder().create();
    let writer = writer.map_err(|error| anyhow!("{service} has no writer: {error}"))?;
    let entry = writer.entry::<[u64; WORDS]>(&KEY);
    let entry = entry.map_err(|error| anyhow!("{service} has no value: {error}"))?;
    let mut value = [0; WORDS];
    barlink_bench_load::renew(size_of_val(&value), |number| {
        for (place, part) in value.iter_mut().enumerate() {
            *part = word(place).wrapping_add(number);
        }
        entry.update_with_copy(value);
        Ok(())
    })
}

fn newest_of_words<const WORDS: usize>(
    node: &Node<ipc::Service>,
    service: &str,
    time: u64,
) -> Result<Newest> {
    let blackboard = node
        .service_builder(&name(service)?)
        .blackboard_opener::<u64>()
        .open()
        .map_err(|error| anyhow!("{service} cannot be opened: {error}"))?;
    let reader = blackboard.reader_builder().create();
    let reader = reader.map_err(|error| anyhow!("{service} has no reader: {error}"))?;
    let entry = reader.entry::<[u64; WORDS]>(&KEY);
    let entry = entry.map_err(|error| anyhow!("{service} has no value: {error}"))?;
    barlink_bench_load::newest(8 * WORDS, time, || {
        let value = entry.get();
        let sum = value.iter().copied().fold(0, u64::wrapping_add);
        Ok(Some([value[0], sum]))
    })
}
