// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The live view of `barlink inspect` in a terminal.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use barlink::host::Attachment;
use barlink_protocol::wire::layout::{BROKER_PAGE, PAGE_SIZE, channel};
use crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Block, Cell, Paragraph, Row, Table};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags, fcntl_getfl};
use rustix::stdio::{dup2_stdout, stdout};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::snapshot::Snapshot;
use super::view::{self, Rate, Watched};

/// Time between two snapshots.
const INTERVAL: Duration = Duration::from_millis(500);
/// Minimum width of the terminal, in columns, for a channel on one line. Narrower terminals have
/// two lines for each channel.
const UNFOLDED: u16 = 125;
/// Bytes in a line of the hex view.
const LINE: u64 = 16;

/// Shows the region until the user quits, or a signal ends the program. The terminal is given back
/// in any case.
pub fn run(attachment: &Attachment) -> Result<()> {
    let mut screen = Screen::new(attachment)?;
    let ended_by: Arc<AtomicUsize> = Arc::default();
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register_usize(signal, Arc::clone(&ended_by), signal as usize)
            .context("cannot handle signals")?;
    }
    reopen_nonblocking_terminal();
    let mut terminal = ratatui::try_init().context("cannot use the terminal")?;
    let outcome = (|| loop {
        terminal
            .draw(|frame| screen.draw(frame))
            .context("cannot draw on the terminal")?;
        let left = INTERVAL.saturating_sub(screen.taken.elapsed());
        match wait_for_keys(left).context("cannot read the keyboard")? {
            Keyboard::Gone => return Ok(()),
            Keyboard::Silent => screen.update()?,
            Keyboard::Ready => (),
        }
        if ended_by.load(Ordering::Relaxed) != 0 {
            return Ok(());
        }
        while event::poll(Duration::ZERO).context("cannot read the keyboard")? {
            if let Event::Key(key) = event::read().context("cannot read the keyboard")?
                && screen.press(key)
            {
                return Ok(());
            }
        }
    })();
    if ratatui::try_restore().is_err() {
        // The terminal was closed. Its `Drop` would write to standard error, which is closed as
        // well, and panic.
        std::mem::forget(terminal);
    }
    match ended_by.load(Ordering::Relaxed).try_into() {
        Ok(0) | Err(_) => outcome,
        Ok(signal) => signal_hook::low_level::emulate_default_handler(signal)
            .context("cannot end by the signal"),
    }
}

/// Opens the terminal anew as standard output if another process made it non-blocking, because the
/// library that draws does not wait for such a terminal. Without the permission to open it, all
/// stays as it is.
fn reopen_nonblocking_terminal() {
    let is_nonblocking = fcntl_getfl(stdout()).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    if is_nonblocking
        && let Ok(terminal) = rustix::fs::open("/proc/self/fd/1", flags, Mode::empty())
    {
        let _ = dup2_stdout(terminal);
    }
}

/// Result of a wait for keys.
enum Keyboard {
    /// No event before the timeout.
    Silent,
    /// Keys were pressed, or the terminal's size changed.
    Ready,
    /// The terminal was closed.
    Gone,
}

/// Waits up to `time` for keys. crossterm's own wait would spin on a terminal that was closed.
fn wait_for_keys(time: Duration) -> std::io::Result<Keyboard> {
    let stdin = std::io::stdin();
    let mut files = [PollFd::new(&stdin, PollFlags::IN)];
    let timeout = rustix::time::Timespec::try_from(time).ok();
    match rustix::event::poll(&mut files, timeout.as_ref()) {
        Ok(0) => Ok(Keyboard::Silent),
        Ok(_)
            if files[0]
                .revents()
                .intersects(PollFlags::HUP | PollFlags::ERR) =>
        {
            Ok(Keyboard::Gone)
        }
        // A signal ends the program, or tells that the terminal's size has changed.
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(Keyboard::Ready),
        Err(error) => Err(error.into()),
    }
}

struct Screen<'a> {
    attachment: &'a Attachment,
    snapshot: Snapshot,
    /// The time at which the snapshot was complete.
    taken: Instant,
    watched: Vec<Watched>,
    /// First byte of the hex view; a multiple of [`LINE`].
    offset: u64,
    /// Lines of the hex view, as last drawn.
    lines: u64,
}

impl<'a> Screen<'a> {
    fn new(attachment: &'a Attachment) -> Result<Self> {
        let snapshot = Snapshot::take(attachment)?;
        let watched = vec![Watched::default(); snapshot.channels.len()];
        let offset = attachment.layout().raw_offset;
        Ok(Screen {
            attachment,
            snapshot,
            taken: Instant::now(),
            watched,
            offset,
            lines: 0,
        })
    }

    fn update(&mut self) -> Result<()> {
        // A record that came while either snapshot was taken may be in it or not, so this is the
        // time for which a channel without a new record is known to have had none.
        let quiet = self.taken.elapsed();
        let snapshot = Snapshot::take(self.attachment)?;
        let time = self.taken.elapsed();
        self.taken = Instant::now();
        let before = self.snapshot.channels.iter().zip(&self.watched);
        let mut watched: Vec<_> = before
            .zip(&snapshot.channels)
            .map(|((old, watched), new)| Watched {
                rate: Rate::between(old, new, time),
                unchanged: match old.has_same_records(new) {
                    true => watched.unchanged + quiet,
                    false => Duration::ZERO,
                },
            })
            .collect();
        // Channels that were added meanwhile.
        watched.resize_with(snapshot.channels.len(), Watched::default);
        self.watched = watched;
        self.snapshot = snapshot;
        Ok(())
    }

    /// Handles a key. Returns `true` to quit.
    fn press(&mut self, key: KeyEvent) -> bool {
        if key.kind == KeyEventKind::Release {
            return false;
        }
        let page = self.lines.max(1) * LINE;
        let last = self.attachment.layout().region_size.saturating_sub(page);
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Up => self.offset = self.offset.saturating_sub(LINE),
            KeyCode::Down => self.offset += LINE,
            KeyCode::PageUp => self.offset = self.offset.saturating_sub(page),
            KeyCode::PageDown => self.offset += page,
            KeyCode::Home => self.offset = 0,
            KeyCode::End => self.offset = last,
            KeyCode::Tab => self.offset = self.next_part(),
            _ => (),
        }
        self.offset = self.offset.min(last);
        false
    }

    /// Returns the parts of the region in their order: the offset and the name of each.
    fn parts(&self) -> Vec<(u64, String)> {
        let layout = self.attachment.layout();
        let mut parts = vec![
            (0, "superblock".to_owned()),
            (BROKER_PAGE, "broker's page".to_owned()),
        ];
        for entry in layout.channels() {
            parts.push((entry.offset, format!("channel {}, header", entry.name)));
            parts.push((
                entry.offset + channel::DATA,
                format!("channel {}, records", entry.name),
            ));
        }
        if layout.raw_size > 0 {
            parts.push((layout.raw_offset, "raw window".to_owned()));
        }
        for slot in 0..layout.slots {
            parts.push((
                layout.presence_page(slot),
                format!("driver's page, slot {slot}"),
            ));
        }
        parts.sort();
        parts
    }

    fn next_part(&self) -> u64 {
        self.parts()
            .into_iter()
            .map(|(start, _)| start)
            .find(|&start| start > self.offset)
            .unwrap_or(0)
    }

    fn draw(&mut self, frame: &mut Frame) {
        let slots = view::slots(&self.snapshot);
        let height = |lines: usize, border| {
            Constraint::Length(u16::try_from(lines + border).unwrap_or(u16::MAX))
        };
        let folds = frame.area().width < UNFOLDED;
        let rows = self.snapshot.channels.len() + 1;
        let [head, table, hex, foot] = Layout::vertical([
            height(slots.len() + 3, 0),
            height(if folds { 2 * rows } else { rows }, 2),
            Constraint::Min(3),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        let lines = view::header(&self.snapshot)
            .into_iter()
            .chain(slots)
            .map(Line::from);
        frame.render_widget(Paragraph::new(lines.collect::<Vec<_>>()), head);
        frame.render_widget(self.table(folds), table);
        self.lines = u64::from(hex.height.saturating_sub(2));
        frame.render_widget(self.hex(), hex);
        let keys = "arrows, page up/down, home, end: move   tab: next part   q: quit";
        frame.render_widget(Line::from(keys).dim(), foot);
    }

    /// Returns the table of channels. `folds` gives each channel two lines.
    fn table(&self, folds: bool) -> Table<'static> {
        let row = |row: [String; 12]| match folds {
            true => Row::new(view::fold(&row).map(Cell::from)).height(2),
            false => Row::new(row.map(Cell::from)),
        };
        let channels = self.snapshot.channels.iter().zip(&self.watched);
        let rows =
            channels.map(|(channel, watched)| row(view::channel_row(channel, Some(*watched))));
        let titles = row(view::CHANNEL_COLUMNS.map(str::to_owned));
        let widths = match folds {
            true => &view::FOLDED_WIDTHS[..],
            false => &view::CHANNEL_WIDTHS[..],
        };
        Table::new(rows, widths.iter().copied().map(Constraint::Length))
            .header(titles.style(Style::new().bold()))
            .block(Block::bordered().title("channels"))
    }

    fn hex(&self) -> Paragraph<'static> {
        let part = self
            .parts()
            .into_iter()
            .rev()
            .find(|(start, _)| *start <= self.offset);
        let title = part.map(|(_, name)| name).unwrap_or_default();
        let size = self.attachment.layout().region_size;
        let line = |index: u64| {
            let start = self.offset + index * LINE;
            let mut bytes = [0; LINE as usize];
            let length = size.saturating_sub(start).min(LINE) as usize;
            // The range is inside the region, and no page is ever unmapped, so this does not fail.
            let _ = self.attachment.region().peek(start, &mut bytes[..length]);
            Line::from(format!("{start:08x}  {}", hex_line(&bytes[..length])))
        };
        let title = format!("{title}, page {}", self.offset / PAGE_SIZE);
        Paragraph::new((0..self.lines).map(line).collect::<Vec<_>>())
            .block(Block::bordered().title(title))
    }
}

fn hex_line(bytes: &[u8]) -> String {
    let config = pretty_hex::HexConfig {
        title: false,
        width: 0,
        group: 8,
        ascii: true,
        ..pretty_hex::HexConfig::default()
    };
    pretty_hex::config_hex(&bytes, config)
}
