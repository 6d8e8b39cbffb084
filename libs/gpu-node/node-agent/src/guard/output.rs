//! An engine's output: into files that are turned over, and read for cries of alarm.
//!
//! Whatever becomes of the files, the pipe is read on: an engine never blocks on its log.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

/// Files of earlier output that are kept beside the present one.
pub const KEPT_FILES: u32 = 3;
/// Longest line that is read as one, bytes.
const LONGEST_LINE: u64 = 16 * 1024;
/// What engines write when their driver or their GPU is sick.
const ALARMS: [&str; 6] = [
    "cuda error",
    "cuda runtime error",
    "cudaerror",
    "cuda_error_",
    "uncorrectable ecc",
    "nvml: driver/library version mismatch",
];

/// The name of an earlier file: `x.log.1` is the one before the present.
pub fn earlier(log: &Path, n: u32) -> PathBuf {
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

impl Log {
    fn open(path: &Path, limit: u64) -> Self {
        let file = OpenOptions::new().create(true).append(true).open(path).ok();
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

/// Copies the output until nobody writes any more.
pub(crate) fn copy(output: impl Read, log: &Path, limit: u64, mut alarm: impl FnMut(String)) {
    let mut log = Log::open(log, limit);
    let mut reader = BufReader::new(output);
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        log.write(&line);
        let text = String::from_utf8_lossy(&line).to_lowercase();
        if ALARMS.iter().any(|cry| text.contains(cry)) {
            alarm(String::from_utf8_lossy(&line).trim().chars().take(500).collect());
        }
    }
}

/// The last lines of a log, of this life of its engine only: each begins with [`HEADING`].
pub fn tail(log: &Path, lines: usize) -> Vec<String> {
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
pub const HEADING: &str = "==== llama-orch starts ";

pub(crate) fn write_heading(log: &Path, what: &str) {
    if let Some(folder) = log.parent() {
        // Without a folder there is no log, and the engine runs all the same.
        let _ = std::fs::create_dir_all(folder);
    }
    if let Ok(mut file) = OpenOptions::new().create(true).append(true).open(log) {
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
}
