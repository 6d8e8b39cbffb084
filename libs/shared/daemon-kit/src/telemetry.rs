//! Logs: one line an event on standard error, as text or JSON.
//!
//! Standard error may be a pipe that nobody reads, and a write to it then never returns. So lines
//! go through a bounded queue to a thread that does nothing but write: whoever logs never waits, a
//! line that finds no room is counted and gone. Whatever else is said on standard error, panics
//! among it, goes through the queue too, or gives up waiting.
//!
//! What nodes, engines and clients say is quoted in lines. In the text format a character that
//! could end a line or steer a terminal stands there as an escape.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{IsTerminal, Write};
use std::panic::PanicHookInfo;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use tracing::Dispatch;
use tracing::field::display;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

use crate::one_line::OneLine;

/// Lines that may wait for standard error. At some 200 bytes a line that is less than 1 MiB, and
/// the burst of a start or of a lost cluster while a slow reader catches up.
const WAITING: usize = 4096;
/// How long the end of a daemon waits for standard error. The queue's own bounds are shorter, 1.1 s
/// together, but it may then write to standard output, which can be the same pipe.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the process's queue had no room for; set when logging starts.
static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();
/// Lines whose write failed: the reader has gone, or the disk is full.
static REFUSED: AtomicU64 = AtomicU64::new(0);

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Lives as long as lines are to be written. Dropped, it waits until those in the queue are, for a
/// bounded time.
#[must_use]
#[derive(Debug)]
pub struct Logs(Option<WorkerGuard>);

impl Drop for Logs {
    fn drop(&mut self) {
        let guard = self.0.take();
        wait_for(move || drop(guard));
    }
}

/// Libraries that write a line for each connection, or more: they stay at `warn` unless a filter names them.
const TALKATIVE: [&str; 6] = ["h2", "hyper", "hyper_util", "reqwest", "rustls", "tower"];

/// Changes the filter of the process's log; set when logging starts.
static CHANGE: OnceLock<Box<dyn Fn(EnvFilter) + Send + Sync>> = OnceLock::new();

/// A text that is no filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no level (error, warn, info, debug, trace, off) and no list of target=level: {why}")]
pub struct BadFilter {
    text: String,
    why: String,
}

/// Whether the text is a filter, as a setting is checked.
///
/// # Errors
/// What is wrong with it.
pub fn check_filter(text: &str) -> Result<String, BadFilter> {
    filter_of(text).map(|_| text.to_owned())
}

/// Changes what is logged, until the process ends.
///
/// # Errors
/// That the text is no filter; what was logged before goes on.
pub fn change_filter(text: &str) -> Result<(), BadFilter> {
    let filter = filter_of(text)?;
    if let Some(change) = CHANGE.get() {
        change(filter);
        tracing::warn!(filter = text, "the log's filter is changed until the restart");
    }
    Ok(())
}

fn filter_of(text: &str) -> Result<EnvFilter, BadFilter> {
    let bad = |why: String| BadFilter { text: text.to_owned(), why };
    if text.trim().is_empty() {
        return Err(bad("it is empty".into()));
    }
    let named = |target: &&str| {
        text.split(',').any(|part| part.trim().split(['=', '[', ':']).next() == Some(*target))
    };
    // Where less than a warning is let through, they are no louder than the rest.
    let is_quiet = text.split(',').any(|part| matches!(part.trim(), "off" | "error"));
    let quiet: Vec<String> = TALKATIVE
        .into_iter()
        .filter(|target| !named(target) && !is_quiet)
        .map(|target| format!("{target}=warn"))
        .collect();
    let whole = [text.to_owned()].into_iter().chain(quiet).collect::<Vec<_>>().join(",");
    EnvFilter::try_new(whole).map_err(|error| bad(error.to_string()))
}

/// Starts logging, of panics too. `filter` is a level or a list of `target=level`.
pub fn init(format: LogFormat, filter: &str) -> Logs {
    let (lines, logs) = queue(StandardError::new(std::io::stderr()));
    // Only a second start in one process finds it set, and that one panics below.
    let _ = DROPPED.set(lines.error_counter());
    dispatch(format, filter, lines, std::io::stderr().is_terminal()).init();
    std::panic::set_hook(Box::new(log_panic));
    logs
}

/// Lines of this process's log that were not written.
pub(crate) fn lines_lost() -> u64 {
    let dropped = DROPPED.get().map_or(0, ErrorCounter::dropped_lines);
    REFUSED.load(Ordering::Relaxed).saturating_add(u64::try_from(dropped).unwrap_or(u64::MAX))
}

/// One line on standard error: why the daemon does not run, with its causes.
pub fn say_fatal(error: &dyn std::error::Error) {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    let text = causes.fold(error.to_string(), |text, cause| {
        let cause = cause.to_string();
        if text.contains(&cause) { text } else { format!("{text}: {cause}") }
    });
    say(text);
}

/// Writes to standard error when no log is there: before the start, after the end.
pub(crate) fn say(text: String) {
    wait_for(move || {
        // A closed standard error is no reason to end differently.
        let _ = writeln!(std::io::stderr(), "{text}");
    });
}

/// Does what may block on standard error on a thread of its own, and waits `PATIENCE` at most: the
/// end of the process ends that thread too.
fn wait_for(writing: impl FnOnce() + Send + 'static) {
    let (done, ended) = sync_channel::<()>(0);
    let on_thread = move || {
        writing();
        drop(done);
    };
    if std::thread::Builder::new().name("last-lines".into()).spawn(on_thread).is_ok() {
        // Nothing is sent: the closed channel is the end.
        let _ = ended.recv_timeout(PATIENCE);
    }
}

fn queue(writer: impl Write + Send + Sync + 'static) -> (NonBlocking, Logs) {
    let builder = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(WAITING);
    let (lines, guard) = builder.finish(writer);
    (lines, Logs(Some(guard)))
}

fn dispatch(format: LogFormat, filter: &str, lines: NonBlocking, colours: bool) -> Dispatch {
    let filter = filter_of(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(lines)
        .with_ansi(colours)
        // They would go to standard error past the queue.
        .log_internal_errors(false);
    match format {
        LogFormat::Text => {
            let builder = builder.with_target(false).fmt_fields(OneLine).with_filter_reloading();
            follow_changes(builder.reload_handle());
            Dispatch::new(builder.finish())
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_filter_reloading();
            follow_changes(builder.reload_handle());
            Dispatch::new(builder.finish())
        }
    }
}

/// The first log of a process is the one whose filter can be changed.
fn follow_changes<S: 'static>(handle: reload::Handle<EnvFilter, S>) {
    let change = move |filter| {
        // A log that has ended has nothing to change.
        let _ = handle.reload(filter);
    };
    let _ = CHANGE.set(Box::new(change));
}

/// The standard hook would write to standard error itself, and keep the thread that panics there.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| display(backtrace));
    tracing::error!(
        thread = thread.name(),
        location = panic.location().map(display),
        reason = panic.payload_as_str(),
        backtrace,
        "a thread panicked"
    );
}

/// How long the thread that writes lets lines gather once some came in quick succession. Whoever logs then
/// finds it awake: to wake it for each line, and to write each by itself, costs more than the line.
const GATHERING: Duration = Duration::from_millis(10);
/// Bytes of lines that are written at once at most.
const WRITTEN_AT_ONCE: usize = 64 * 1024;

/// Standard error, written when no further line is there. It counts the lines that it does not take.
struct StandardError<W> {
    to: W,
    waiting: Vec<u8>,
    last: Option<Instant>,
}

impl<W: Write> StandardError<W> {
    fn new(to: W) -> Self {
        Self { to, waiting: Vec::new(), last: None }
    }

    /// What cannot be written is counted, and no error of the thread that writes: it could do nothing about it.
    fn write_out(&mut self) {
        if self.to.write_all(&self.waiting).and_then(|()| self.to.flush()).is_err() {
            let lines = self.waiting.iter().filter(|byte| **byte == b'\n').count();
            REFUSED.fetch_add(lines as u64, Ordering::Relaxed);
        }
        self.waiting.clear();
    }
}

impl<W: Write> Write for StandardError<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.waiting.len() + bytes.len() > WRITTEN_AT_ONCE {
            self.write_out();
        }
        self.waiting.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.write_out();
        if self.last.replace(Instant::now()).is_some_and(|last| last.elapsed() < 2 * GATHERING) {
            std::thread::sleep(GATHERING);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;

    /// What the text log shows of it.
    fn logged(colours: bool, log: impl FnOnce()) -> String {
        // Beside a single subscriber, what other threads log first is nobody's from then on.
        let _other = tracing::Dispatch::new(tracing_subscriber::registry());
        let (mut reader, writer) = std::io::pipe().unwrap();
        let (lines, logs) = queue(writer);
        let dispatch = dispatch(LogFormat::Text, "info", lines, colours);
        tracing::dispatcher::with_default(&dispatch, log);
        drop((dispatch, logs));
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    }

    // CLOUD-1141
    #[test]
    fn no_text_begins_a_line_or_brings_a_control_character_in() {
        let hidden = [
            '\0', '\n', '\r', '\t', '\u{b}', '\u{7}', '\x1b', '\x7f', '\u{85}', '\u{9b}', '\u{61c}',
            '\u{200e}', '\u{2028}', '\u{2029}', '\u{202e}', '\u{2066}',
        ];
        let forged = format!("0.1{}2026-01-01T00:00:00Z ERROR forged", String::from_iter(hidden));
        let text = logged(false, || {
            let span = tracing::info_span!("call", node = %forged);
            let _inside = span.enter();
            tracing::info!(version = %forged, quoted = forged, "an engine said: {forged}");
        });
        let line = text.strip_suffix('\n').expect("a whole line");
        assert!(!line.contains(hidden), "{line:?}");
        assert_eq!(line.matches("ERROR forged").count(), 4, "{line}");
        let visible = r"version=0.1\u{0}\n\r\t\u{b}\u{7}\u{1b}\u{7f}\u{85}\u{9b}\u{61c}\u{200e}\u{2028}\u{2029}\u{202e}\u{2066}2026";
        assert!(line.contains(visible), "{line}");
    }

    // CLOUD-1141
    #[test]
    fn a_terminal_sees_our_colours_and_nobody_elses() {
        let text = logged(true, || tracing::error!(model = %"\x1b[31mred", "é, 猫 and \x1b[2Jclean"));
        assert!(text.contains("\x1b[31mERROR\x1b[0m") && text.contains("\x1b[3mmodel\x1b[0m"), "{text:?}");
        assert!(text.contains(r"\u{1b}[31mred") && text.contains(r"é, 猫 and \u{1b}[2Jclean"), "{text:?}");
    }

    // CLOUD-2667
    #[test]
    fn a_filter_is_checked_and_libraries_stay_quiet_unless_they_are_named() {
        for bad in ["", " ", "debug,=", "a=loud", "info[", "x=y=z"] {
            let error = check_filter(bad).unwrap_err().to_string();
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
        let shown = |text: &str| filter_of(text).unwrap().to_string();
        assert!(shown("debug").contains("hyper=warn") && shown("debug").contains("rustls=warn"));
        let named = shown("debug,hyper=trace");
        assert!(named.contains("hyper=trace") && !named.contains("hyper=warn"), "{named}");
        assert!(!shown("error").contains("warn") && !shown("off").contains("warn"));
    }

    // CLOUD-1140
    #[test]
    fn a_reader_that_does_not_read_costs_lines_and_no_time() {
        // The pipe holds 64 KiB.
        let (_reader, writer) = std::io::pipe().unwrap();
        let (mut lines, logs) = queue(writer);
        let start = Instant::now();
        for _ in 0..WAITING + 2_000 {
            lines.write_all(&[b'x'; 100]).unwrap();
        }
        assert!(lines.error_counter().dropped_lines() > 0);
        drop(logs);
        assert!(start.elapsed() < PATIENCE + Duration::from_secs(3), "{:?}", start.elapsed());
    }

    /// How often it is written to.
    struct Writes(Shared, Arc<AtomicU64>);

    impl Write for Writes {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    // CLOUD-2737
    #[test]
    fn lines_that_come_in_quick_succession_are_written_together_and_each_once() {
        const LINES: usize = WAITING / 2;
        let (written, times) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicU64::new(0)));
        let to = Writes(Shared(Arc::clone(&written)), Arc::clone(&times));
        let (mut lines, logs) = queue(StandardError::new(to));
        for n in 0..LINES {
            lines.write_all(format!("line {n:04}\n").as_bytes()).unwrap();
        }
        drop(logs);
        let expected: String = (0..LINES).map(|n| format!("line {n:04}\n")).collect();
        assert_eq!(String::from_utf8(written.lock().clone()).unwrap(), expected);
        let times = times.load(Ordering::Relaxed);
        assert!((1..LINES as u64 / 8).contains(&times), "{times}");
    }

    // CLOUD-2737
    #[test]
    fn each_line_that_could_not_be_written_is_counted() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::StorageFull.into())
            }

            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let before = REFUSED.load(Ordering::Relaxed);
        let mut full = StandardError::new(Full);
        full.write_all(b"a line\nanother\n").unwrap();
        full.flush().unwrap();
        assert_eq!(REFUSED.load(Ordering::Relaxed), before + 2);
        full.write_all(&[b'\n'; WRITTEN_AT_ONCE]).unwrap();
        // There is no room for it beside them.
        full.write_all(b"another\n").unwrap();
        assert_eq!(REFUSED.load(Ordering::Relaxed), before + 2 + WRITTEN_AT_ONCE as u64);
    }

    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    // CLOUD-1140
    #[test]
    fn what_was_logged_is_written_before_the_end() {
        let written = Arc::new(Mutex::new(Vec::new()));
        let (mut lines, logs) = queue(Shared(Arc::clone(&written)));
        for _ in 0..WAITING {
            lines.write_all(b"a line\n").unwrap();
        }
        drop(logs);
        assert_eq!(written.lock().len(), WAITING * b"a line\n".len());
        assert_eq!(lines.error_counter().dropped_lines(), 0);
    }
}
