// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the errors of commands: each takes one line, and names its cause.

use std::process::Stdio;

use crate::support::*;

#[test]
fn poke_and_peek_reject_offsets_outside_window() {
    let broker = Broker::start(&["--size", "1M"]);
    works(&mut broker.app(&["poke", "hello", "--at", "3"]));
    assert_eq!(
        works(&mut broker.app(&["peek", "--raw", "--at", "3", "--length", "5"])),
        "hello"
    );
    assert!(works(&mut broker.app(&["peek", "--length", "16"])).contains("00 00 00 68"));
    let magic = works(&mut broker.app(&["peek", "--region", "--raw", "--length", "7"]));
    assert_eq!(magic, "barlink");
    fails(
        &mut broker.app(&["peek", "--at", "0xfffff0"]),
        1,
        &["0xfffff0 is not in the raw window", "a smaller --at"],
    );
    fails(
        &mut broker.app(&["poke", "x", "--region", "--at", "1M"]),
        1,
        &[
            "1 bytes at 0x100000 do not fit into the region, which has 0 bytes from there on: use no more",
        ],
    );
    fails(
        &mut broker.app(&["poke", "x", "--region"]),
        1,
        &[
            "the first 8.00 KiB of a region describe it",
            "--at 8192 or more",
        ],
    );
    // `poke` reads no more of its input than there is room for.
    let mut endless = std::process::Command::new("yes")
        .stdout(Stdio::piped())
        .start();
    let input = endless.stdout.take().unwrap();
    fails(
        broker.app(&["poke"]).stdin(input),
        1,
        &["do not fit into the raw window"],
    );
    wait(&mut endless);
}

#[test]
fn commands_reject_missing_ends_slots_and_windows() {
    // These channels leave no room for a raw window.
    let channels = ["a=up,64K", "b=down,32K", "c=up,8K"];
    let channels = channels.iter().flat_map(|channel| ["--channel", channel]);
    let broker = Broker::start(
        &["--size", "128K"]
            .into_iter()
            .chain(channels)
            .collect::<Vec<_>>(),
    );
    fails(
        &mut broker.app(&["recv", "--channel", "b"]),
        1,
        &[
            "the consumer of channel `b` is slot 0's VM",
            "use it there with barlink-guest",
        ],
    );
    fails(
        &mut broker.app(&["peek"]),
        1,
        &["no raw window", "a larger --size"],
    );
    fails(
        &mut broker.app(&["qemu-args", "--slot", "1"]),
        1,
        &["no slot 1", "last slot is 0", "with --slot"],
    );
}

#[test]
fn error_takes_one_line_whatever_the_name() {
    let broker = Broker::start(&[]);
    for (args, part) in [
        (&["tail", "a\nb"][..], "`a\\nb`"),
        (&["recv", "-o", "/no\x1b[2J/file"], "/no\\u{1b}[2J/file"),
        (&["send", "/no\r/file"], "/no\\r/file"),
        (&["recv", "--timeout", "a\rb"], "`a\\rb`"),
    ] {
        let output = run(&mut broker.app(args));
        assert!(!output.status.success());
        let errors = String::from_utf8(output.stderr).unwrap();
        let is_line = errors.ends_with('\n') && errors.matches(char::is_control).count() == 1;
        assert!(is_line && errors.contains(part), "{errors:?}");
    }
}

#[test]
fn tip_for_negative_value_names_its_option() {
    fails(
        &mut barlink(["tail", "up", "--count", "-1"]),
        2,
        &["unexpected argument '-1' found; tip: to pass '-1' as a value, use '--count=-1'"],
    );
    fails(
        &mut barlink(["serve", "--size", "-1"]),
        2,
        &["unexpected argument '-1' found; tip: to pass '-1' as a value, use '--size=-1'"],
    );
    fails(
        &mut barlink(["tail", "up", "--count=-1"]),
        2,
        &["invalid value '-1'"],
    );
}
