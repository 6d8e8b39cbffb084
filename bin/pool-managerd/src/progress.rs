//! How far a copy or download is, for who waits for it: one line that is written over on a terminal, ten
//! lines elsewhere.

#![expect(clippy::print_stdout, reason = "a command says what it does")]

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Between two writings of a terminal's line.
const REFRESH: Duration = Duration::from_millis(200);
/// Where no length is known: bytes of the first line elsewhere, and then each time as many again.
const FIRST_BYTES: u64 = 64 * MIB;
const MIB: u64 = 1024 * 1024;

pub(crate) struct Progress {
    is_terminal: bool,
    began: Instant,
    /// What was there when this process began.
    before: Option<u64>,
    shown_at: Option<Instant>,
    tenths: u64,
    next_bytes: u64,
    open_line: bool,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self {
            is_terminal: std::io::stdout().is_terminal(),
            began: Instant::now(),
            before: None,
            shown_at: None,
            tenths: 0,
            next_bytes: FIRST_BYTES,
            open_line: false,
        }
    }

    /// So many bytes are done, of all where that is known.
    pub(crate) fn show(&mut self, done: u64, all: Option<u64>) {
        let before = *self.before.get_or_insert(done);
        let is_whole = all == Some(done);
        if self.is_terminal {
            if self.shown_at.is_none_or(|at| at.elapsed() >= REFRESH || is_whole) {
                self.shown_at = Some(Instant::now());
                self.open_line = true;
                print!("\r\x1b[K{}", line(before, done, all, self.began.elapsed()));
                // A terminal that is gone is shown nothing.
                let _ = std::io::stdout().flush();
            }
        } else if self.is_due(done, all) {
            println!("{}", line(before, done, all, self.began.elapsed()));
        }
    }

    /// Whether a line is due where none can be written over.
    fn is_due(&mut self, done: u64, all: Option<u64>) -> bool {
        match all {
            Some(all) => {
                let tenths = u64::try_from(u128::from(done) * 10 / u128::from(all.max(1))).unwrap_or(10);
                let is_due = tenths > self.tenths;
                self.tenths = self.tenths.max(tenths);
                is_due
            }
            None if done >= self.next_bytes => {
                self.next_bytes = done.saturating_mul(2);
                true
            }
            None => false,
        }
    }

    /// What is written next begins on a line of its own.
    pub(crate) fn end(&mut self) {
        if std::mem::take(&mut self.open_line) {
            println!();
        }
    }
}

/// `120 of 400 MiB, 35 MiB/s, 8 s left`.
fn line(before: u64, done: u64, all: Option<u64>, for_long: Duration) -> String {
    let brought = done.saturating_sub(before);
    let speed =
        brought.saturating_mul(1_000) / u64::try_from(for_long.as_millis()).unwrap_or(u64::MAX).max(1);
    let mut line = match all {
        Some(all) => format!("{} of {} MiB", done / MIB, all.div_ceil(MIB)),
        None => format!("{} MiB", done / MIB),
    };
    if speed > 0 {
        line.push_str(&match speed / MIB {
            0 => format!(", {} KiB/s", speed / 1024),
            mib => format!(", {mib} MiB/s"),
        });
        if let Some(left) = all.map(|all| all.saturating_sub(done) / speed) {
            let (hours, minutes, seconds) = (left / 3_600, left / 60 % 60, left % 60);
            line.push_str(&match (hours, minutes) {
                (0, 0) => format!(", {seconds} s left"),
                (0, _) => format!(", {minutes} min {seconds} s left"),
                _ => format!(", {hours} h {minutes} min left"),
            });
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2684
    #[test]
    fn a_line_has_bytes_speed_and_time_left_and_there_are_ten() {
        let seconds = Duration::from_secs;
        assert_eq!(
            line(20 * MIB, 120 * MIB, Some(400 * MIB), seconds(10)),
            "120 of 400 MiB, 10 MiB/s, 28 s left"
        );
        assert_eq!(line(0, MIB, Some(7_200 * MIB), seconds(1)), "1 of 7200 MiB, 1 MiB/s, 1 h 59 min left");
        assert_eq!(line(0, MIB / 2, None, seconds(1)), "0 MiB, 512 KiB/s");
        assert_eq!(line(5, 5, Some(5), seconds(0)), "0 of 1 MiB");
        let mut progress = Progress { is_terminal: false, ..Progress::new() };
        let lines = (0..=1_000).filter(|done| progress.is_due(*done, Some(1_000))).count();
        assert_eq!(lines, 10);
        let lines = (0..100).filter(|gib| progress.is_due(gib * 1024 * MIB, None)).count();
        assert!((5..=10).contains(&lines), "{lines} of 100 GiB");
    }
}
