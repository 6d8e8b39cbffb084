//! The daemon's end: starting a guard, hearing it, stopping its engine, taking one over.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};

use super::{COMMAND, GuardReport, GuardSpec, Order, processes};

/// How long a kept guard may take to say what it guards.
const GREETING_TIMEOUT: Duration = Duration::from_secs(2);

/// Rounds of SIGKILL, and the pause between them, for what a killed guard has left. Killed
/// processes always end; a kernel that keeps one for longer is not ours to wait for.
const KILL_ROUNDS: u32 = 100;
const KILL_EVERY: Duration = Duration::from_millis(50);

/// Variables with what a collector of spans lets this daemon in by.
pub(crate) const COLLECTOR_SECRETS: [&str; 2] =
    ["OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"];

/// A guard that this daemon owns.
#[derive(Debug)]
pub(crate) struct Guarded {
    reported: Lines<BufReader<OwnedReadHalf>>,
    orders: OwnedWriteHalf,
    /// Absent where an earlier daemon has started it.
    child: Option<Child>,
    run_tag: Option<String>,
}

impl Guarded {
    /// Starts a guard with what it is to guard. `program` is this program itself.
    pub(crate) async fn start(program: &Path, guard_spec: &GuardSpec) -> io::Result<Self> {
        let (ours, theirs) = StdStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut command = Command::new(program);
        command
            .arg(COMMAND)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A signal of the terminal is for the daemon, which decides about its engines.
            .process_group(0);
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            let ours =
                ["LLORCH_", "POOL_MANAGERD_", "ORCHESTRATORD_"].iter().any(|ours| text.starts_with(ours));
            if ours || COLLECTOR_SECRETS.contains(&&*text) {
                command.env_remove(&name);
            }
        }
        let child = command.spawn()?;
        drop(command);
        let (reading, mut orders) = UnixStream::from_std(ours)?.into_split();
        let mut line = serde_json::to_vec(guard_spec)?;
        line.push(b'\n');
        orders.write_all(&line).await?;
        let reported = BufReader::new(reading).lines();
        Ok(Self { reported, orders, child: Some(child), run_tag: Some(guard_spec.run_tag.clone()) })
    }

    /// Takes over a guard that waits for the next daemon. Returns what it was told about its engine.
    pub(crate) async fn take_over(socket: &Path) -> io::Result<(Self, u32, String)> {
        let (reading, orders) = UnixStream::connect(socket).await?.into_split();
        let mut guarded =
            Self { reported: BufReader::new(reading).lines(), orders, child: None, run_tag: None };
        let greeting = tokio::time::timeout(GREETING_TIMEOUT, guarded.heard()).await;
        match greeting {
            Ok(GuardReport::Started { pid, run_tag, about }) => {
                guarded.run_tag = Some(run_tag);
                Ok((guarded, pid, about))
            }
            Ok(_) => Err(io::Error::other("it belongs to another daemon, or is about to end")),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "it does not answer")),
        }
    }

    /// What the guard says next. The last word is always [`GuardReport::Ended`].
    pub(crate) async fn heard(&mut self) -> GuardReport {
        loop {
            let line = self.reported.next_line().await;
            match line {
                Ok(Some(line)) => {
                    // What a newer guard says besides is not for us.
                    if let Ok(reported) = serde_json::from_str(&line) {
                        return reported;
                    }
                }
                Ok(None) | Err(_) => {
                    self.clean_up_after_guard().await;
                    return GuardReport::Ended {
                        how: "its guard ended without a report".into(),
                        signal: None,
                    };
                }
            }
        }
    }

    /// Asks for the engine's end; [`GuardReport::Ended`] follows.
    pub(crate) async fn stop(&mut self) {
        let mut line = serde_json::to_vec(&Order::Stop).unwrap_or_default();
        line.push(b'\n');
        // A guard that does not read any more has ended, and says so or is found out.
        let _ = self.orders.write_all(&line).await;
    }

    /// Somebody has killed the guard: what it guarded is known by its run tag.
    async fn clean_up_after_guard(&mut self) {
        let Some(run_tag) = self.run_tag.clone() else { return };
        for _ in 0..KILL_ROUNDS {
            let run_tag = run_tag.clone();
            let killing = owned_tasks::blocking("kill of an engine", move || {
                let left = processes::tagged(&run_tag);
                processes::signal_all(&left, Signal::SIGKILL);
                left.is_empty()
            });
            // What forks meanwhile is met in the next round.
            if killing.await.unwrap_or(true) {
                return;
            }
            tokio::time::sleep(KILL_EVERY).await;
        }
        tracing::warn!(run_tag, "processes of an engine do not end although they were killed");
    }

    /// Waits for the guard's own end, after its last word.
    pub(crate) async fn reap(mut self) {
        if let Some(child) = &mut self.child {
            let _ = tokio::time::timeout(Duration::from_secs(5), child.wait()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-1109
    #[tokio::test]
    async fn a_word_of_a_newer_guard_is_passed_over() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (reading, orders) = ours.into_split();
        let mut guarded =
            Guarded { reported: BufReader::new(reading).lines(), orders, child: None, run_tag: None };
        let words = b"{\"paused\":{\"for_ms\":5}}\n\"resting\"\n{\"ended\":{\"how\":\"at last\"}}\n";
        theirs.write_all(words).await.unwrap();
        assert_eq!(guarded.heard().await, GuardReport::Ended { how: "at last".into(), signal: None });
    }
}
