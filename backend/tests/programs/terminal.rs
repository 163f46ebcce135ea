// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A program in a terminal, and the screen that a person sees.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::support::*;

/// A program in a terminal.
pub struct Terminal {
    pub child: Program,
    keyboard: File,
    screen: Arc<Mutex<vt100::Parser>>,
}

/// Columns and lines of a usual terminal.
pub const USUAL: (u16, u16) = (80, 24);
/// Columns and lines of a large terminal.
pub const LARGE: (u16, u16) = (120, 40);

/// Opens a terminal of this size. Returns the person's end and the program's end.
pub fn terminal((columns, lines): (u16, u16)) -> (OwnedFd, File) {
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
            ws_row: lines,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
    )
    .unwrap();
    (master, slave)
}

impl Terminal {
    pub fn start(mut command: Command, size: (u16, u16)) -> Self {
        let (master, slave) = terminal(size);
        let end = || Stdio::from(slave.try_clone().unwrap());
        let child = command
            .env("TERM", "xterm")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .start();
        let screen = Arc::new(Mutex::new(vt100::Parser::new(size.1, size.0, 0)));
        let (shown, mut output) = (Arc::clone(&screen), File::from(master.try_clone().unwrap()));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // The end of a terminal's output is an error, EIO.
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

    pub fn text(&self) -> String {
        self.screen.lock().unwrap().screen().contents()
    }

    pub fn wait_for(&self, text: &str) {
        let found = || self.text().contains(text);
        let start = std::time::Instant::now();
        while !found() {
            assert!(
                start.elapsed() < TIMEOUT,
                "no `{text}` on the screen within {TIMEOUT:?}:\n{}",
                self.text()
            );
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    pub fn is_given_back(&self) {
        let restored = || !self.screen.lock().unwrap().screen().alternate_screen();
        wait_until("the terminal is given back", restored);
    }

    pub fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    pub fn ends(&mut self) {
        assert_eq!(wait(&mut self.child).code(), Some(0));
        self.is_given_back();
    }
}
