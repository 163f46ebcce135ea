// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of `barlink inspect` in a terminal: its screen and its keys.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use barlink::Stamp;
use barlink_protocol::Producer;
use barlink_protocol::cursor::{Clock, Kind};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal};
use rustix::termios::{Action, tcflow};

use crate::support::*;
use crate::terminal::*;

#[test]
fn live_view_shows_channels_and_bytes() {
    let broker = Broker::start(&[
        "--size",
        "1M",
        "--channel",
        "camera=host-host,64K",
        "--channel",
        "other=up,64K,drop",
    ]);
    let attachment = broker.attach();
    let mut sender = attachment.sender("camera").unwrap();
    works(&mut broker.app(&["poke", "something to see"]));
    let mut terminal = Terminal::start(broker.app(&["inspect"]), LARGE);
    terminal.wait_for("region 1.00 MiB");
    terminal.wait_for("something to see");
    terminal.wait_for("no VM, no driver");
    terminal.wait_for(&format!("host, {}", std::process::id()));
    for _ in 0..20 {
        sender.send(Kind::DATA, &[0x5a; 1000]).unwrap();
    }
    terminal.wait_for("31.2 %");
    // The other record is a guest's, so its time says nothing here.
    let layout = attachment.layout();
    let mut guest = Producer::attach(attachment.region().ring().clone(), &layout.channels()[1]);
    let record = guest.as_mut().unwrap().reserve(0).unwrap();
    let _ = record.commit(Kind::DATA, 0, 1).unwrap();
    terminal.wait_for("≥1 s");
    // Shows the superblock first, then the first records.
    terminal.press(b"\x1b[H");
    terminal.wait_for("62 61 72 6c");
    terminal.press(b"\t\t\t");
    terminal.wait_for("channel camera, records");
    terminal.press(b"\x1b[B\x1b[B\x1b[A\x1b[6~\x1b[5~");
    terminal.wait_for("5a 5a 5a 5a");
    terminal.press(b"q");
    terminal.ends();
}

#[test]
fn inspect_tells_age_by_own_clock_only() {
    let broker = Broker::start(&[
        "--size",
        "1M",
        "--channel",
        "own=host-host,64K",
        "--channel",
        "other=host-host,64K",
        "--channel",
        "guest=up,64K",
    ]);
    let attachment = broker.attach();
    let ages = || {
        let text = works(&mut broker.app(&["inspect", "--json"]));
        let state: serde_json::Value = serde_json::from_str(&text).unwrap();
        [0, 1, 2].map(|channel| state["channels"][channel]["age"].as_f64())
    };
    assert_eq!(ages(), [None; 3]);
    let mut own = attachment.sender("own").unwrap();
    let mut other = attachment.sender("other").unwrap();
    let entry = &attachment.layout().channels()[2];
    let mut guest = Producer::attach(attachment.region().ring().clone(), entry).unwrap();
    let before = Instant::now();
    own.send(Kind::USER, b"text").unwrap();
    let sent = Instant::now();
    let time = own_time();
    let clock = Stamp::new(time, Clock::REALTIME);
    other.send_at(Kind::USER, b"text", clock).unwrap();
    let record = guest.reserve(0).unwrap();
    let _ = record.commit(Kind::USER, 0, time).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let least = sent.elapsed();
    let found = ages();
    let age = Duration::from_secs_f64(found[0].unwrap());
    assert!((least..before.elapsed()).contains(&age), "{age:?}");
    assert_eq!(found[1..], [None, None]);
    // A sender may give any time.
    let future = Stamp::new(own_time() + 1_000_000_000_000, Clock::MONOTONIC);
    other.send_at(Kind::USER, b"text", future).unwrap();
    assert_eq!(ages()[1], None);
}

/// Returns the time of this host's monotonic clock, in nanoseconds.
fn own_time() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(Duration::try_from(time).unwrap().as_nanos()).unwrap()
}

/// The output of the terminal is stopped, and another process has made it non-blocking.
#[test]
fn live_view_waits_for_stopped_terminal() {
    let broker = Broker::start(&[]);
    let (master, slave) = terminal(LARGE);
    let flags = fcntl_getfl(&slave).unwrap();
    fcntl_setfl(&slave, flags | OFlags::NONBLOCK).unwrap();
    tcflow(&slave, Action::OOff).unwrap();
    let end = || Stdio::from(slave.try_clone().unwrap());
    let mut view = broker
        .app(&["inspect"])
        .env("TERM", "xterm")
        .stdin(end())
        .stdout(end())
        .stderr(end())
        .start();
    // The program usually draws by then.
    std::thread::sleep(Duration::from_millis(300));
    assert!(view.try_wait().unwrap().is_none(), "it has ended");
    tcflow(&slave, Action::OOn).unwrap();
    let mut output = File::from(master);
    let mut shown = Vec::new();
    while !shown.windows(6).any(|text| text == b"region") {
        let mut part = [0; 4096];
        let length = output.read(&mut part).unwrap();
        shown.extend_from_slice(&part[..length]);
    }
    output.write_all(b"q").unwrap();
    assert_eq!(wait(&mut view).code(), Some(0));
}

#[test]
fn live_view_fits_usual_terminal() {
    // Names and numbers have their maximum length: this name has 24 characters.
    let long = "a-camera-with-a-long-nam";
    let broker = Broker::start(&[
        "--size",
        "64M",
        "--channel",
        &format!("{long}=host-host,512K"),
        "--channel",
        "other=up,16M,drop",
    ]);
    let attachment = broker.attach();
    let mut sender = attachment.sender(long).unwrap();
    sender.send(Kind::DATA, &[0x5a; 50_000]).unwrap();
    works(&mut broker.app(&["poke", "0123456789abcdef"]));
    let mut terminal = Terminal::start(broker.app(&["inspect"]), USUAL);
    for shown in [
        "region 64.00 MiB, 3 vectors a peer, raw window",
        "slot 0: no VM, no driver (ivshmem, ",
        &long[..12],
        &long[12..],
        &format!("host, {} ", std::process::id()),
        "slot 0, -",
        "9.5 %",
        "512 KiB",
        "16 MiB",
        // The last bytes of a line, and the last line of the screen.
        "38 39 61 62 63 64 65 66   0123456789abcdef",
        "q: quit",
    ] {
        terminal.wait_for(shown);
    }
    let text = terminal.text();
    let titles = [
        "from",
        "to",
        "fill",
        "of",
        "bytes/s",
        "rec/s",
        "records",
        "dropped",
        "rung",
        "suppressed",
        "age",
    ];
    for title in titles {
        assert!(
            text.split_whitespace().any(|word| word == title),
            "no `{title}` in:\n{text}"
        );
    }
    terminal.press(b"q");
    terminal.ends();
}

#[test]
fn live_view_ends_on_quit_keys() {
    let broker = Broker::start(&[]);
    for keys in [&b"q"[..], b"\x1b", b"\x03"] {
        let mut terminal = Terminal::start(broker.app(&["inspect"]), LARGE);
        terminal.wait_for("raw window");
        terminal.press(keys);
        terminal.ends();
    }
}

#[test]
fn live_view_gives_terminal_back_at_signal() {
    let broker = Broker::start(&[]);
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut terminal = Terminal::start(broker.app(&["inspect"]), LARGE);
        terminal.wait_for("raw window");
        signal_process(Pid::from_child(&terminal.child), signal);
        let status = wait(&mut terminal.child);
        assert_eq!(status.signal(), Some(signal.as_raw()));
        terminal.is_given_back();
    }
}

#[test]
fn live_view_reports_end_of_broker() {
    for signal in [Signal::KILL, Signal::TERM] {
        let broker = Broker::start(&[]);
        let mut terminal = Terminal::start(broker.app(&["inspect"]), LARGE);
        terminal.wait_for("raw window");
        let (_folder, _) = broker.stop(signal);
        assert_eq!(wait(&mut terminal.child).code(), Some(3));
        terminal.wait_for("barlink: the broker at");
        terminal.wait_for("has ended: start it again");
        terminal.is_given_back();
    }
}

#[test]
fn live_view_ends_with_its_terminal() {
    let broker = Broker::start(&[]);
    let (master, slave) = terminal(LARGE);
    let end = || Stdio::from(slave.try_clone().unwrap());
    let mut view = broker
        .app(&["inspect"])
        .env("TERM", "xterm")
        .stdin(end())
        .stdout(end())
        .stderr(end())
        .start();
    drop(slave);
    let _: [u8; 16] = read_exactly(&mut File::from(master));
    let status = wait(&mut view);
    assert!(status.code().is_some(), "{status}");
}
