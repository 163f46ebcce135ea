// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The parts `crash-…`: numbered records flow both ways between a guest and the host. Each round
//! does one fault, all kinds in turn, and counts lost and repeated records.
//!
//! The ends are `barlink-crash-load`. They note their progress in the region's raw window. The
//! notes outlive processes, guest and QEMU, and the harness finds losses from them. The notes also
//! tell what woke each end. A new end wakes up by a timer until the first ring has reached it,
//! which would hide missing rings. So a round is over only once rings have woken every end. From
//! then on only rings wake an end, and a lost ring shows as a stream that stands still.
//!
//! A third channel drops. Two further channels, one from each side, overwrite. Their producers are
//! killed, too, and those of the latter skip numbers at times. The newest record of these must be
//! there while its producer is dead.
//!
//! Each channel has a tap, a process on the host that is never killed. The records that it has
//! received and missed must be those that were sent, and the records that it counts as dropped
//! those that were dropped or skipped. Further taps are killed.
//!
//! Channels are reset by force. Records name their generation, so that no record of a former one
//! counts as delivered. Records that were in the channel at the reset are counted as discarded.
//! Channels are added, and must carry records at once.
//!
//! Over vfio-user the broker forwards every ring. So over vfio-user the broker is also killed and
//! replaced while the guest rings without a pause. QEMU may wait for an answer in vain only if the
//! broker was killed.
//!
//! | file | its one job |
//! |---|---|
//! | `fault.rs` | the kinds of fault |
//! | `scene.rs` | the broker, the VM, the eight ends and the taps, and waiting for them |
//! | `inflict.rs` | causing a fault, and the recovery after it |
//! | `channels.rs` | the faults of taps and channels |
//! | `worker.rs` | one end or tap: a process on the host or in the guest |
//! | `watch.rs` | the notes and counters, as the host reads them |
//! | `report.rs` | the table of results |

mod channels;
mod fault;
mod inflict;
mod report;
mod scene;
mod watch;
mod worker;

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use barlink_crash_load::Random;

pub use self::fault::Fault;
pub use self::report::Report;
use self::scene::Scene;
use barlink_sandbox::builds::Artifacts;
use barlink_vm::broker::Transport;

/// Longest time for which the streams flow undisturbed before a fault.
const CALM: Duration = Duration::from_millis(400);

/// Returns the kinds of fault over a transport whose names contain a text, or all kinds without a
/// text. An error if there is none.
pub fn chosen(transport: Transport, only: Option<&str>) -> Result<Vec<Fault>> {
    let mut faults = Fault::all(transport);
    let Some(only) = only else {
        return Ok(faults);
    };
    let known: Vec<_> = faults.iter().map(|fault| format!("\n  {fault}")).collect();
    let is_meant = |fault: &Fault| fault.to_string().contains(only);
    faults.retain(is_meant);
    if faults.is_empty()
        && let Some((fault, why)) = Fault::left_out(transport)
            .into_iter()
            .find(|(fault, _)| is_meant(fault))
    {
        bail!(
            "`{fault}` (--fault) is not done over {transport}, since {why}: choose the part of another transport"
        );
    }
    ensure!(
        !faults.is_empty(),
        "no kind of fault over {transport} has `{only}` in its name (--fault): choose from{}",
        known.concat()
    );
    Ok(faults)
}

/// Runs this many rounds, with progress on standard error. The report contains the failures.
pub fn crash(
    artifacts: &Artifacts,
    transport: Transport,
    faults: &[Fault],
    rounds: usize,
    seed: u64,
) -> Result<Report> {
    let release = &artifacts.tools.release;
    eprintln!("{rounds} rounds over {transport} with seed {seed}, kernel {release}");
    let mut report = Report::new(transport, seed, rounds, faults);
    let mut random = Random::new(seed);
    for (managed, faults) in plan(faults, rounds, &mut random) {
        if faults.is_empty() {
            continue;
        }
        let start = Instant::now();
        let mut scene = Scene::set(artifacts, transport, random.next(), managed)?;
        let outcome = play(&mut scene, &mut report, &faults, &mut random);
        if outcome.is_err() {
            eprintln!("{}", scene.evidence());
        }
        report.end(outcome, scene.watch(), start.elapsed());
        if !report.is_good() {
            break;
        }
    }
    Ok(report)
}

/// Assigns faults to rounds: those with a managed broker, and those with a broker that is not
/// managed.
fn plan(faults: &[Fault], rounds: usize, random: &mut Random) -> [(bool, Vec<Fault>); 2] {
    let mut plan = [(true, Vec::new()), (false, Vec::new())];
    let mut next = Vec::new();
    for _ in 0..rounds {
        if next.is_empty() {
            next = shuffled(faults, random);
        }
        let Some(fault) = next.pop() else { break };
        let managed = fault.needs_manager();
        let managed = managed.unwrap_or_else(|| random.below(2) == 0);
        plan[usize::from(!managed)].1.push(fault);
    }
    plan
}

fn play(
    scene: &mut Scene<'_>,
    report: &mut Report,
    faults: &[Fault],
    random: &mut Random,
) -> Result<()> {
    scene.wait_until_all_flow().context("at the beginning")?;
    for &fault in faults {
        let prepared = scene.prepare(fault);
        prepared.with_context(|| format!("before the fault, {fault}"))?;
        scene
            .wait_until_all_are_woken()
            .context("before the fault")?;
        thread::sleep(CALM.mul_f64(random.below(1000) as f64 / 1000.0));
        let before = scene.watch().counts();
        let recovery = scene.inflict(fault);
        let recovery = recovery.and_then(|time| {
            scene.wait_until_all_are_woken()?;
            scene.wait_until_taps_follow()?;
            scene.check_kernel()?;
            scene.check_answers(fault)?;
            Ok(time)
        });
        let counts = scene.watch().counts() - before;
        let round = report.add(fault, recovery.as_ref().ok().copied(), counts);
        let recovery = recovery.with_context(|| fault.to_string())?;
        ensure!(
            fault.again().contains(&counts.again),
            "{fault}: {} records came again",
            counts.again
        );
        let seconds = recovery.as_secs_f64();
        eprintln!("round {round}: {fault}: {seconds:.3} s");
    }
    scene.finish().context("at the end")
}

/// Returns these kinds, each once, in a random order.
fn shuffled(faults: &[Fault], random: &mut Random) -> Vec<Fault> {
    let mut faults = faults.to_vec();
    for last in (1..faults.len()).rev() {
        faults.swap(last, random.below(last as u64 + 1) as usize);
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chooses_faults_by_partial_name() {
        let chosen = |transport, only| chosen(transport, Some(only));
        let all = Fault::all(Transport::Ivshmem).len();
        assert_eq!(super::chosen(Transport::Ivshmem, None).unwrap().len(), all);
        let broker = chosen(Transport::Ivshmem, "broker killed").unwrap();
        assert!(broker.contains(&Fault::BrokerKilled) && broker.len() < all);
        let unknown = chosen(Transport::Ivshmem, "wrong").unwrap_err().to_string();
        // The error is one line, and one line for each kind.
        assert_eq!(unknown.lines().count(), 1 + all, "{unknown}");
        assert!(unknown.lines().all(|line| line.len() < 100), "{unknown}");
        let left_out = chosen(Transport::VfioUser, "unplugged").unwrap_err();
        let left_out = left_out.to_string();
        assert!(left_out.contains("QEMU 11.1 ends"), "{left_out}");
        assert_eq!(left_out.lines().count(), 1);
    }
}
