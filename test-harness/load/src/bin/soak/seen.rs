//! What the soak has seen, and what of it must not be.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// So often a hostile engine may have run without being asked: its time may be over before it is known.
const AT_LEAST_ASKED: u64 = 3;

/// What was seen so far.
#[derive(Debug)]
struct Seen {
    begun: Instant,
    /// How often, when first, and beside which hostile peers.
    broken: BTreeMap<String, (u64, Duration, String)>,
    /// The hostile peers that run, and how often each has.
    running: Vec<String>,
    ran: BTreeMap<String, u64>,
    /// Bytes that hostile engines have answered.
    sent: BTreeMap<String, u64>,
    /// Of honest requests, and of honest tasks.
    requests: Vec<Duration>,
    tasks: Vec<Duration>,
    /// Honest requests whose connection was closed before it was read.
    again: u64,
    /// Most MiB, files and threads, by the daemons' names.
    most: BTreeMap<String, (u64, usize, usize)>,
}

/// The same for all who see.
#[derive(Debug, Clone)]
pub(crate) struct Record(Arc<Mutex<Seen>>);

/// A hostile peer runs, until it is dropped.
#[derive(Debug)]
pub(crate) struct Running(Record, String);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.with(|seen| {
            if let Some(place) = seen.running.iter().position(|name| *name == self.1) {
                seen.running.swap_remove(place);
            }
        });
    }
}

impl Record {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Seen {
            begun: Instant::now(),
            broken: BTreeMap::new(),
            running: Vec::new(),
            ran: BTreeMap::new(),
            sent: BTreeMap::new(),
            requests: Vec::new(),
            tasks: Vec::new(),
            again: 0,
            most: BTreeMap::new(),
        })))
    }

    fn with<T>(&self, change: impl FnOnce(&mut Seen) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// An invariant.
    pub(crate) fn broke(&self, what: impl Into<String>) {
        self.with(|seen| {
            let (since, beside, what) = (seen.begun.elapsed(), seen.running.join(" + "), what.into());
            if !seen.broken.contains_key(&what) {
                println!("broken after {} s, beside {beside}: {what}", since.as_secs());
            }
            seen.broken.entry(what).or_insert((0, since, beside)).0 += 1;
        });
    }

    pub(crate) fn begins(&self, name: String) -> Running {
        self.with(|seen| {
            *seen.ran.entry(name.clone()).or_default() += 1;
            seen.running.push(name.clone());
        });
        Running(self.clone(), name)
    }

    pub(crate) fn sent(&self, name: String, bytes: u64) {
        self.with(|seen| *seen.sent.entry(name).or_default() += bytes);
    }

    pub(crate) fn tried_again(&self) {
        self.with(|seen| seen.again += 1);
    }

    pub(crate) fn answered(&self, took: Duration) {
        self.with(|seen| seen.requests.push(took));
    }

    pub(crate) fn task(&self, took: Duration) {
        self.with(|seen| seen.tasks.push(took));
    }

    pub(crate) fn holds(&self, name: &str, mib: u64, files: usize, threads: usize) {
        self.with(|seen| {
            let most = seen.most.entry(name.to_owned()).or_default();
            *most = (most.0.max(mib), most.1.max(files), most.2.max(threads));
        });
    }

    pub(crate) fn progress(&self) -> String {
        self.with(|seen| {
            let (tasks, requests, broken) = (seen.tasks.len(), seen.requests.len(), seen.broken.len());
            format!(
                "{tasks} tasks, {requests} requests, {broken} broken, beside {}",
                seen.running.join(" + ")
            )
        })
    }

    /// Prints all of it.
    pub(crate) fn finish(&self, seed: u64) -> ExitCode {
        self.with(|seen| {
            for (name, times) in &seen.ran {
                let sent = seen.sent.get(name);
                let bytes = sent.map(|bytes| format!(", {bytes} bytes sent")).unwrap_or_default();
                println!("hostile: {name}, {times} times{bytes}");
                // That of invented names harms by what it is called.
                let asks = !name.ends_with(":Names");
                if asks && *times >= AT_LEAST_ASKED && sent == Some(&0) {
                    let what = format!("{name} was never asked anything");
                    seen.broken.insert(what, (*times, seen.begun.elapsed(), name.clone()));
                }
            }
            for (name, (mib, files, threads)) in &seen.most {
                println!("{name}: at most {mib} MiB, {files} files, {threads} threads");
            }
            let (tasks, requests) = (seen.tasks.len(), seen.requests.len());
            println!(
                "honest: {tasks} tasks of 20 tokens, p99 {} ms; {requests} requests, p99 {} ms; {} tried again",
                p99(&mut seen.tasks).as_millis(),
                p99(&mut seen.requests).as_millis(),
                seen.again,
            );
            if tasks == 0 || requests == 0 {
                let since = seen.begun.elapsed();
                seen.broken.insert("no honest peer was served".into(), (1, since, String::new()));
            }
            for (what, (times, first, beside)) in &seen.broken {
                println!(
                    "BROKEN: {what}: {times} times, first after {} s, beside {beside} (seed {seed})",
                    first.as_secs()
                );
            }
            if seen.broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        })
    }
}

fn p99(took: &mut [Duration]) -> Duration {
    took.sort_unstable();
    took.get(took.len() * 99 / 100).copied().unwrap_or_default()
}

/// Nothing where the process has gone.
pub(crate) fn resident_mib(pid: u32) -> Option<u64> {
    let kib = status(pid, "VmRSS:")?.split_whitespace().next()?.parse::<u64>().ok()?;
    Some(kib / 1024)
}

pub(crate) fn threads(pid: u32) -> usize {
    status(pid, "Threads:").and_then(|threads| threads.trim().parse().ok()).unwrap_or(0)
}

pub(crate) fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |files| files.count())
}

/// A line of the process's status; see proc(5).
fn status(pid: u32, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned)
}
