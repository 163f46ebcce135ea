// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The host, as a check uses it. What the host cannot do, ends the check there.

use std::io::{Write, stdin, stdout};

use anyhow::{Context, Result, bail, ensure};
use barlink_protocol::wire::layout::{End, PAGE_WORDS, presence};
use barlink_protocol::wire::uapi::Claim;

use crate::ask::{Answer, Region, Request};
use crate::binding::open;

/// How long a ring may take to the host, in milliseconds.
const PATIENCE: u16 = 60_000;

fn ask(request: &Request) -> Result<Answer> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    let mut output = stdout().lock();
    output.write_all(&line)?;
    output.flush()?;
    let mut answer = String::new();
    stdin().read_line(&mut answer)?;
    serde_json::from_str(&answer).with_context(|| format!("the host answers {answer:?}"))
}

fn request(request: &Request) -> Result<()> {
    match ask(request)? {
        Answer::Done => Ok(()),
        other => bail!("the host answers {other:?} to {request:?}"),
    }
}

/// Words of a region, as the host sees them.
fn words(region: Region, offset: u64, count: usize) -> Result<Vec<u64>> {
    let asked = Request::Load {
        region,
        offset,
        count,
    };
    match ask(&asked)? {
        Answer::Words(words) if words.len() == count => Ok(words),
        other => bail!("the host answers {other:?} to {asked:?}"),
    }
}

/// A word of a region, as the host sees it.
pub(crate) fn word(region: Region, offset: u64) -> Result<u64> {
    Ok(words(region, offset, 1)?[0])
}

/// A page of a region, as the host sees it.
pub(crate) fn page(region: Region, offset: u64) -> Result<[u64; PAGE_WORDS]> {
    let words = words(region, offset, PAGE_WORDS)?;
    words.try_into().ok().context("no whole page")
}

/// Writes a word of a region on the host.
pub(crate) fn set_word(region: Region, offset: u64, word: u64) -> Result<()> {
    set_words(region, offset, &[word])
}

/// Writes words of a region on the host.
pub(crate) fn set_words(region: Region, offset: u64, words: &[u64]) -> Result<()> {
    request(&Request::Store {
        region,
        offset,
        words: words.to_vec(),
    })
}

/// The epoch in the driver's page.
pub(crate) fn epoch(region: Region) -> Result<u64> {
    word(region, region.driver_page() + presence::EPOCH)
}

/// Offset of the holder word of an end, in the driver's page.
pub(crate) fn holder_offset(region: Region, end: Claim) -> u64 {
    let which = End::from_number(end.end).expect("an end");
    region.driver_page() + presence::holder(end.channel as usize, which)
}

/// The holder word of an end, in the driver's page: the claim's number and the process.
pub(crate) fn holder(region: Region, end: Claim) -> Result<(u32, u32)> {
    let word = word(region, holder_offset(region, end))?;
    Ok(((word >> 32) as u32, word as u32))
}

/// Rings a vector of the VM.
pub(crate) fn ring(region: Region, vector: u32) -> Result<()> {
    ring_times(region, vector, 1)
}

/// Rings a vector of the VM twice, and waits until the driver has told all files of the first ring: the driver handles the
/// second interrupt of a vector when the first one has ended.
pub(crate) fn ring_through(region: Region, vector: u32) -> Result<()> {
    let witness = open(region)?;
    for _ in 0..2 {
        ring(region, vector)?;
        let fired = witness.next_interrupts(1);
        let fired = fired.with_context(|| format!("vector {vector} of {region:?} fires"))?;
        ensure!(fired == [vector], "{fired:?} fired, and not {vector}");
    }
    Ok(())
}

/// Rings a vector of the VM so often at once.
pub(crate) fn ring_times(region: Region, vector: u32, times: u64) -> Result<()> {
    request(&Request::Ring {
        region,
        vector,
        times,
    })
}

/// Rings each vector of the VM once.
pub(crate) fn ring_all(region: Region) -> Result<()> {
    request(&Request::RingAll { region })
}

/// Reads, for each vector of another peer, the rings since the last reading.
pub(crate) fn all_rings(region: Region, peer: u32) -> Result<Vec<u64>> {
    let asked = Request::AllRings { region, peer };
    match ask(&asked)? {
        Answer::Counts(counts) => Ok(counts),
        other => bail!("the host answers {other:?} to {asked:?}"),
    }
}

/// How often a vector of another peer was rung and that was not yet counted.
pub(crate) fn rings(region: Region, peer: u32, vector: u32) -> Result<u64> {
    count_rings(region, peer, vector, 0)
}

/// Rings a vector of the VM so often, one by one, as fast as the host can, and writes a word right before the last time.
pub(crate) fn burst(region: Region, vector: u32, times: u64, offset: u64, word: u64) -> Result<()> {
    request(&Request::Burst {
        region,
        vector,
        times,
        offset,
        word,
    })
}

/// Waits until a vector of another peer was rung as often as `least`, and counts.
pub(crate) fn wait_for_so_many(region: Region, peer: u32, vector: u32, least: u64) -> Result<u64> {
    let mut count = 0;
    while count < least {
        count += wait_for_rings(region, peer, vector)?;
    }
    Ok(count)
}

/// Waits until a vector of another peer is rung, and counts.
pub(crate) fn wait_for_rings(region: Region, peer: u32, vector: u32) -> Result<u64> {
    let count = count_rings(region, peer, vector, PATIENCE)?;
    ensure!(
        count > 0,
        "vector {vector} of peer {peer} of {region:?} is not rung"
    );
    Ok(count)
}

fn count_rings(region: Region, peer: u32, vector: u32, patience: u16) -> Result<u64> {
    let asked = Request::Rings {
        region,
        peer,
        vector,
        patience,
    };
    match ask(&asked)? {
        Answer::Count(count) => Ok(count),
        other => bail!("the host answers {other:?} to {asked:?}"),
    }
}

/// Lets the host answer each ring of one of its vectors, until [`calm`].
pub(crate) fn echo(region: Region, vector: u32) -> Result<()> {
    request(&Request::Echo { region, vector })
}

/// Lets the host ring all vectors of a device as fast as it can, until [`calm`].
pub(crate) fn storm(region: Region) -> Result<()> {
    request(&Request::Storm { region })
}

/// Lets the host press a key of the VM over and over, until [`calm`].
pub(crate) fn press() -> Result<()> {
    request(&Request::Press)
}

/// Ends what [`echo`], [`storm`] or [`press`] began.
pub(crate) fn calm() -> Result<()> {
    request(&Request::Calm)
}

/// Stops the broker of a region.
pub(crate) fn pause(region: Region) -> Result<()> {
    request(&Request::Pause { region })
}

/// Has it go on after so many milliseconds, whatever becomes of the guest meanwhile.
pub(crate) fn go_on(region: Region, after: u16) -> Result<()> {
    request(&Request::GoOn { region, after })
}

/// Has the VM woken once its machine sleeps, which it has to do next.
pub(crate) fn wake() -> Result<()> {
    request(&Request::Wake)
}

/// Whether devices can be pulled out of the VM.
pub(crate) fn unplugs() -> Result<bool> {
    let asked = Request::Unplugs;
    match ask(&asked)? {
        Answer::Is(it) => Ok(it),
        other => bail!("the host answers {other:?} to {asked:?}"),
    }
}

/// Plugs in the device of a region, which the guest finds some time later.
pub(crate) fn plug(region: Region) -> Result<()> {
    request(&Request::Plug { region })
}

/// Has the guest let go of that device, and pulls it out.
pub(crate) fn unplug(region: Region) -> Result<()> {
    request(&Request::Unplug { region })
}

/// Shows a figure.
pub(crate) fn show(figure: String) -> Result<()> {
    request(&Request::Show { figure })
}
