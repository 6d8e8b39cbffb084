//! An engine's output: into files that are turned over, and read for fatal errors of its driver.
//!
//! Whatever becomes of the files, the pipe is read on: an engine never blocks on its log. Engines
//! write texts of clients too, with their line breaks, so a line in the form of an error is a reason
//! to ask the driver and never a proof: [`fatal_driver_error`] only keeps the others out.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use node_core::supervisor::fatal_driver_error;

/// Files of earlier output that are kept beside the present one.
pub(crate) const KEPT_FILES: u32 = 3;
/// Longest line that is read as one, bytes.
const LONGEST_LINE: u64 = 16 * 1024;
/// Its owner's only: an engine may write what clients have sent.
const MODE: u32 = 0o600;

/// The name of an earlier file: `x.log.1` is the one before the present.
pub(crate) fn earlier(log: &Path, n: u32) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(format!(".{n}"));
    PathBuf::from(name)
}

struct Log {
    path: PathBuf,
    file: Option<File>,
    written: u64,
    limit: u64,
}

/// Opens a log to write at its end. One that an earlier version has left open to others is closed
/// to them.
fn open(path: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new().create(true).append(true).mode(MODE).open(path)?;
    file.set_permissions(Permissions::from_mode(MODE))?;
    Ok(file)
}

impl Log {
    fn open(path: &Path, limit: u64) -> Self {
        for n in 1..=KEPT_FILES {
            // There may be none yet.
            let _ = std::fs::set_permissions(earlier(path, n), Permissions::from_mode(MODE));
        }
        let file = open(path).ok();
        let written = file.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |about| about.len());
        Self { path: path.to_owned(), file, written, limit }
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.written > self.limit {
            self.turn_over();
        }
        if let Some(file) = &mut self.file
            && file.write_all(bytes).is_ok()
        {
            self.written += bytes.len() as u64;
        }
    }

    fn turn_over(&mut self) {
        for n in (1..KEPT_FILES).rev() {
            // The first time there is none to move.
            let _ = std::fs::rename(earlier(&self.path, n), earlier(&self.path, n + 1));
        }
        let _ = std::fs::rename(&self.path, earlier(&self.path, 1));
        *self = Self::open(&self.path, self.limit);
        self.written = 0;
    }
}

/// Copies the output until nobody writes any more. `alarm` is told the lines of driver errors.
pub(crate) fn copy(output: impl Read, log: &Path, limit: u64, mut alarm: impl FnMut(String)) {
    let mut log = Log::open(log, limit);
    let mut reader = BufReader::new(output);
    let mut line = Vec::new();
    // What is read of a longer line later begins nowhere.
    let mut begins = true;
    loop {
        line.clear();
        match reader.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        log.write(&line);
        let text = String::from_utf8_lossy(&line);
        if begins && fatal_driver_error(&text) {
            alarm(text.trim().chars().take(500).collect());
        }
        begins = line.ends_with(b"\n");
    }
}

/// The last lines of a log, of this life of its engine only: each begins with [`HEADING`].
pub(crate) fn tail(log: &Path, lines: usize) -> Vec<String> {
    let read = || -> std::io::Result<String> {
        use std::io::{Seek, SeekFrom};
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(64 * 1024)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let mine = text.rfind(HEADING).map_or(text.as_str(), |at| &text[at..]);
    let mine: Vec<&str> = mine.lines().filter(|line| !line.starts_with(HEADING)).collect();
    let cut = |line: &&str| line.chars().take(500).collect();
    mine[mine.len().saturating_sub(lines)..].iter().map(cut).collect()
}

/// What each life of an engine begins with in its log.
pub(crate) const HEADING: &str = "==== llama-orch starts ";

pub(crate) fn write_heading(log: &Path, what: &str) {
    if let Some(folder) = log.parent() {
        // Without a folder there is no log, and the engine runs all the same.
        let _ = std::fs::create_dir_all(folder);
    }
    if let Ok(mut file) = open(log) {
        let _ = writeln!(file, "{HEADING}{what}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2405
    #[test]
    fn output_is_turned_over_and_only_so_many_files_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("a-r0.log");
        let text: String = (0..2_000).map(|n| format!("line {n}\n")).collect();
        copy(text.as_bytes(), &log, 1_000, |line| panic!("{line} is no alarm"));
        let files = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(files, 1 + usize::try_from(KEPT_FILES).unwrap());
        for n in 1..=KEPT_FILES {
            assert!(std::fs::metadata(earlier(&log, n)).unwrap().len() < 1_100);
        }
        assert_eq!(tail(&log, 2), ["line 1998", "line 1999"]);
    }

    // CLOUD-2406
    #[test]
    fn the_tail_is_of_the_last_life_only_and_alarms_are_heard() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("a-r0.log");
        write_heading(&log, "a-r0");
        copy(&b"old\n"[..], &log, 1_000, |_| {});
        write_heading(&log, "a-r0");
        let mut alarms = Vec::new();
        copy(&b"new\nCUDA error: an illegal access\n"[..], &log, 1_000, |line| alarms.push(line));
        assert_eq!(tail(&log, 20), ["new", "CUDA error: an illegal access"]);
        assert_eq!(alarms, ["CUDA error: an illegal access"]);
    }

    // CLOUD-2406
    #[test]
    fn a_line_that_is_cut_begins_no_error_where_it_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("a-r0.log");
        // Where a long line is cut, no line begins.
        let long = "x".repeat(usize::try_from(LONGEST_LINE).unwrap()) + "CUDA error: x\n";
        copy(long.as_bytes(), &log, 1_000_000, |line| panic!("{line} is no alarm"));
    }

    // CLOUD-2415
    #[test]
    fn only_its_owner_reads_a_log_old_or_new_or_turned_over() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("a-r0.log");
        let open_to_all = |path: &Path| {
            std::fs::write(path, "of an earlier version\n").unwrap();
            std::fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
        };
        open_to_all(&log);
        open_to_all(&earlier(&log, 3));
        write_heading(&log, "a-r0");
        let text: String = (0..300).map(|n| format!("line {n}\n")).collect();
        copy(text.as_bytes(), &log, 1_000, |_| {});
        write_heading(&folder.path().join("b-r0.log"), "b-r0");
        let mut seen = 0;
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            let path = entry.unwrap().path();
            let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, MODE, "{}", path.display());
            seen += 1;
        }
        assert!(seen >= 4, "{seen} files");
    }
}
