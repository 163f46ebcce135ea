//! `barlink inspect` in a terminal: what a person sees, and the keys.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};

use barlink::protocol::cursor::Kind;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::support::*;

/// A program in a terminal.
struct Terminal {
    child: Child,
    keyboard: File,
    screen: Arc<Mutex<vt100::Parser>>,
}

/// A terminal of 120 columns and 40 lines: the person's end, and the program's.
fn terminal() -> (OwnedFd, File) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let path = ptsname(&master, Vec::new()).unwrap();
    let slave = File::options()
        .read(true)
        .write(true)
        .open(path.to_str().unwrap())
        .unwrap();
    tcsetwinsize(
        &master,
        Winsize {
            ws_row: 40,
            ws_col: 120,
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
    )
    .unwrap();
    (master, slave)
}

impl Terminal {
    fn start(mut command: std::process::Command) -> Self {
        let (master, slave) = terminal();
        let end = || Stdio::from(slave.try_clone().unwrap());
        let child = command
            .env("TERM", "xterm")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let screen = Arc::new(Mutex::new(vt100::Parser::new(40, 120, 0)));
        let (shown, mut output) = (Arc::clone(&screen), File::from(master.try_clone().unwrap()));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // The terminal's end is an error, EIO.
            while let Ok(length @ 1..) = output.read(&mut bytes) {
                shown.lock().unwrap().process(&bytes[..length]);
            }
        });
        Terminal {
            child,
            keyboard: File::from(master),
            screen,
        }
    }

    fn text(&self) -> String {
        self.screen.lock().unwrap().screen().contents()
    }

    fn wait_for(&self, text: &str) {
        let found = || self.text().contains(text);
        let start = std::time::Instant::now();
        while !found() {
            assert!(
                start.elapsed() < PATIENCE,
                "no `{text}` on the screen:\n{}",
                self.text()
            );
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    fn is_given_back(&self) {
        let restored = || !self.screen.lock().unwrap().screen().alternate_screen();
        wait_until("the terminal is given back", restored);
    }

    fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    fn ends(&mut self) {
        assert_eq!(wait(&mut self.child).code(), Some(0));
        self.is_given_back();
    }
}

#[test]
fn live_view_shows_channels_at_work_and_bytes() {
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
    let mut terminal = Terminal::start(broker.app(&["inspect"]));
    terminal.wait_for("region 1.00 MiB");
    terminal.wait_for("something to see");
    terminal.wait_for("no VM, no driver");
    terminal.wait_for(&format!("host, {}", std::process::id()));
    for _ in 0..20 {
        let _ = sender.send(Kind::DATA, &[0x5a; 1000], None).unwrap();
    }
    terminal.wait_for("31.2 %");
    // To the superblock, and on to the first records.
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
fn live_view_ends_with_each_of_its_keys() {
    let broker = Broker::start(&[]);
    for keys in [&b"q"[..], b"\x1b", b"\x03"] {
        let mut terminal = Terminal::start(broker.app(&["inspect"]));
        terminal.wait_for("raw window");
        terminal.press(keys);
        terminal.ends();
    }
}

#[test]
fn live_view_of_a_broker_that_dies_says_so() {
    let broker = Broker::start(&[]);
    let mut terminal = Terminal::start(broker.app(&["inspect"]));
    terminal.wait_for("raw window");
    let (_folder, _) = broker.stop(rustix::process::Signal::KILL);
    assert_eq!(wait(&mut terminal.child).code(), Some(3));
    terminal.wait_for("barlink: the broker at");
    terminal.is_given_back();
}

#[test]
fn live_view_ends_when_its_terminal_is_closed() {
    let broker = Broker::start(&[]);
    let (master, slave) = terminal();
    let end = || Stdio::from(slave.try_clone().unwrap());
    let mut view = broker
        .app(&["inspect"])
        .env("TERM", "xterm")
        .stdin(end())
        .stdout(end())
        .stderr(end())
        .spawn()
        .unwrap();
    drop(slave);
    let mut seen = [0; 16];
    File::from(master).read_exact(&mut seen).unwrap();
    let status = wait(&mut view);
    assert!(status.code().is_some(), "{status}");
}
