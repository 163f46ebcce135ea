// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Requests of a check to the host, as functions. A failure on the host ends the check there.

use std::io::{Write, stdin, stdout};

use anyhow::{Context, Result, bail, ensure};
use barlink_protocol::wire::layout::{End, PAGE_WORDS, presence};
use barlink_protocol::wire::uapi::Claim;

use crate::ask::{Answer, Region, Request};
use crate::binding::open;

/// Timeout of the wait for a ring that is on its way to the host, in milliseconds.
const TIMEOUT: u16 = 60_000;

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

/// Reads `count` words of a region on the host, from an offset in bytes.
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

/// Reads a word of a region on the host.
pub(crate) fn word(region: Region, offset: u64) -> Result<u64> {
    Ok(words(region, offset, 1)?[0])
}

/// Reads a page of a region on the host.
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

/// Reads the epoch from the driver's page.
pub(crate) fn epoch(region: Region) -> Result<u64> {
    word(region, region.driver_page() + presence::EPOCH)
}

/// Returns the offset of an end's holder word in the driver's page, in bytes.
pub(crate) fn holder_offset(region: Region, end: Claim) -> u64 {
    let which = End::from_number(end.end).expect("an end");
    region.driver_page() + presence::holder(end.channel as usize, which)
}

/// Reads the holder word of an end from the driver's page. Returns the claim's number and the
/// process ID.
pub(crate) fn holder(region: Region, end: Claim) -> Result<(u32, u32)> {
    let word = word(region, holder_offset(region, end))?;
    Ok(((word >> 32) as u32, word as u32))
}

/// Rings a vector of the VM.
pub(crate) fn ring(region: Region, vector: u32) -> Result<()> {
    ring_times(region, vector, 1)
}

/// Rings a vector of the VM twice, and waits for both interrupts. When the second interrupt
/// arrives, the driver has reported the first one to all files, because it handles the interrupts
/// of a vector one after the other.
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

/// Rings a vector of the VM `times` times at once.
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

/// Returns for each vector of another peer the number of rings since the last such call.
pub(crate) fn all_rings(region: Region, peer: u32) -> Result<Vec<u64>> {
    let asked = Request::AllRings { region, peer };
    match ask(&asked)? {
        Answer::Counts(counts) => Ok(counts),
        other => bail!("the host answers {other:?} to {asked:?}"),
    }
}

/// Returns the number of rings of another peer's vector that were not yet counted.
pub(crate) fn rings(region: Region, peer: u32, vector: u32) -> Result<u64> {
    count_rings(region, peer, vector, 0)
}

/// Rings a vector of the VM `times` times, one by one, as fast as the host can, and writes a word
/// right before the last ring.
pub(crate) fn burst(region: Region, vector: u32, times: u64, offset: u64, word: u64) -> Result<()> {
    request(&Request::Burst {
        region,
        vector,
        times,
        offset,
        word,
    })
}

/// Waits until a vector of another peer was rung at least `least` times, and returns the number.
pub(crate) fn wait_for_so_many(region: Region, peer: u32, vector: u32, least: u64) -> Result<u64> {
    let mut count = 0;
    while count < least {
        count += wait_for_rings(region, peer, vector)?;
    }
    Ok(count)
}

/// Waits until a vector of another peer was rung, and returns how often.
pub(crate) fn wait_for_rings(region: Region, peer: u32, vector: u32) -> Result<u64> {
    let count = count_rings(region, peer, vector, TIMEOUT)?;
    ensure!(
        count > 0,
        "vector {vector} of peer {peer} of {region:?} is not rung"
    );
    Ok(count)
}

fn count_rings(region: Region, peer: u32, vector: u32, timeout: u16) -> Result<u64> {
    let asked = Request::Rings {
        region,
        peer,
        vector,
        timeout,
    };
    match ask(&asked)? {
        Answer::Count(count) => Ok(count),
        other => bail!("the host answers {other:?} to {asked:?}"),
    }
}

/// Makes the host answer each ring of one of its vectors, until [`calm`].
pub(crate) fn echo(region: Region, vector: u32) -> Result<()> {
    request(&Request::Echo { region, vector })
}

/// Makes the host ring all vectors of a device as fast as it can, until [`calm`].
pub(crate) fn storm(region: Region) -> Result<()> {
    request(&Request::Storm { region })
}

/// Makes the host press a key of the VM again and again, until [`calm`].
pub(crate) fn press() -> Result<()> {
    request(&Request::Press)
}

/// Ends [`echo`], [`storm`] or [`press`].
pub(crate) fn calm() -> Result<()> {
    request(&Request::Calm)
}

/// Stops the broker of a region.
pub(crate) fn pause(region: Region) -> Result<()> {
    request(&Request::Pause { region })
}

/// Makes the host continue the stopped broker of a region after `after` milliseconds, even if the
/// guest is stopped by then.
pub(crate) fn go_on(region: Region, after: u16) -> Result<()> {
    request(&Request::GoOn { region, after })
}

/// Makes the host wake the VM once it is suspended. The check must suspend the VM next.
pub(crate) fn wake() -> Result<()> {
    request(&Request::Wake)
}

/// Returns whether devices can be unplugged from the VM.
pub(crate) fn unplugs() -> Result<bool> {
    let asked = Request::Unplugs;
    match ask(&asked)? {
        Answer::Is(it) => Ok(it),
        other => bail!("the host answers {other:?} to {asked:?}"),
    }
}

/// Plugs in the device of a region. The guest finds the device some time later.
pub(crate) fn plug(region: Region) -> Result<()> {
    request(&Request::Plug { region })
}

/// Asks the guest to release the device of a region, and unplugs the device.
pub(crate) fn unplug(region: Region) -> Result<()> {
    request(&Request::Unplug { region })
}

/// Shows a measured figure in the test's output.
pub(crate) fn show(figure: String) -> Result<()> {
    request(&Request::Show { figure })
}
