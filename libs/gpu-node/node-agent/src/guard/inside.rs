//! The guard's own process: one engine, its descendants, and whoever owns them.
//!
//! A few threads and one mailbox; no runtime. Its end is the proof that nothing of the engine
//! is left: it ends when the kernel says that it has no children, and everything that descends
//! from an engine is, at the latest when its own parent has died, a child of the guard.

use std::io::{BufRead, BufReader, PipeReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitStatus, waitpid};

use super::{GuardReport, GuardSpec, Order, RUN_TAG, output, processes};

/// How long what is left may take when its engine or its daemon has gone.
const SHORT_GRACE: Duration = Duration::from_secs(1);
/// Pause between two rounds of SIGKILL: what forks meanwhile is met in the next one.
const KILL_EVERY: Duration = Duration::from_millis(50);
/// A daemon that does not read must not stop its guards.
const WRITE_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause between two reports of driver errors: whoever writes many lines must not fill the socket.
const ALARM_EVERY: Duration = Duration::from_secs(1);

enum Heard {
    Stop,
    /// The daemon's end of the socket is closed.
    DaemonGone,
    /// A daemon has come to a guard whose own has gone.
    Adopted(UnixStream),
    EngineEnded(End),
    /// No children are left.
    Alone,
}

/// How the engine's own process has ended.
#[derive(Debug)]
struct End {
    /// For people.
    how: String,
    /// Where one ended it.
    signal: Option<i32>,
}

type Owner = Arc<Mutex<Option<UnixStream>>>;

fn say(owner: &Owner, reported: &GuardReport) {
    let mut owner = owner.lock().unwrap_or_else(PoisonError::into_inner);
    let mut line = serde_json::to_vec(reported).unwrap_or_default();
    line.push(b'\n');
    if owner.as_mut().is_some_and(|stream| stream.write_all(&line).is_err()) {
        *owner = None;
    }
}

/// What the program does when it is started as a guard, with the socket as its standard input.
pub fn run() -> ExitCode {
    match guard() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody reads it but a person who starts a guard by hand.
            let _ = writeln!(std::io::stderr(), "guard: {error}");
            ExitCode::FAILURE
        }
    }
}

fn guard() -> std::io::Result<()> {
    let stream = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let guard_spec: GuardSpec = serde_json::from_str(&line)?;
    prctl::set_child_subreaper(true)?;
    let owner: Owner = Arc::new(Mutex::new(Some(stream)));
    let (mailbox, heard) = mpsc::channel();

    let (engine, engine_output) = match start(&guard_spec) {
        Ok(started) => started,
        Err(error) => {
            let how = format!("{} does not start: {error}", guard_spec.program.display());
            say(&owner, &GuardReport::Ended { how, signal: None });
            return Ok(());
        }
    };
    // Signals of the terminal or of the service manager stop the engine as the daemon would. They
    // are blocked after the engine has started, which would inherit that and never hear SIGTERM,
    // and before any thread has: one that had them open would die of them, and all with it.
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let started = GuardReport::Started {
        pid: engine,
        run_tag: guard_spec.run_tag.clone(),
        about: guard_spec.about.clone(),
    };
    say(&owner, &started);
    keep_output(engine_output, &guard_spec, &owner);
    listen(reader, mailbox.clone());
    wait_for_signals(signals, mailbox.clone());
    reap(engine, mailbox.clone());
    if let Some(path) = &guard_spec.keep_at {
        // The next daemon has nothing else to find us by: without it the engine cannot be kept.
        let _ = std::fs::remove_file(path);
        await_daemons(UnixListener::bind(path)?, mailbox.clone());
    }

    let grace = Duration::from_millis(guard_spec.grace_ms);
    let own = std::process::id();
    let mut ended: Option<End> = None;
    // When what still lives is killed.
    let mut kill_at: Option<Instant> = None;
    loop {
        let patience =
            kill_at.map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(Instant::now()));
        let ask_to_end = match heard.recv_timeout(patience) {
            Ok(Heard::Stop) => Some(grace),
            Ok(Heard::DaemonGone) => {
                *owner.lock().unwrap_or_else(PoisonError::into_inner) = None;
                guard_spec.keep_at.is_none().then_some(grace.min(SHORT_GRACE))
            }
            Ok(Heard::Adopted(stream)) => {
                adopt(stream, &owner, &started, mailbox.clone());
                None
            }
            Ok(Heard::EngineEnded(mut end)) => {
                // What is told to end may do so in any way.
                end.signal = end.signal.filter(|_| kill_at.is_none());
                if let Some(signal) = end.signal {
                    say(&owner, &GuardReport::Crashed { signal });
                }
                ended.get_or_insert(end);
                Some(SHORT_GRACE)
            }
            Ok(Heard::Alone) | Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                if kill_at.is_some() {
                    processes::signal_all(&processes::descendants(own), Signal::SIGKILL);
                    kill_at = Some(Instant::now() + KILL_EVERY);
                }
                None
            }
        };
        if let Some(grace) = ask_to_end {
            processes::signal_all(&processes::descendants(own), Signal::SIGTERM);
            let at = Instant::now() + grace;
            kill_at = Some(kill_at.map_or(at, |before| before.min(at)));
        }
    }
    if let Some(path) = &guard_spec.keep_at {
        let _ = std::fs::remove_file(path);
    }
    let End { how, signal } = ended.unwrap_or_else(|| End { how: "it ended".into(), signal: None });
    say(&owner, &GuardReport::Ended { how, signal });
    Ok(())
}

/// Returns the engine's process id, and its output.
fn start(guard_spec: &GuardSpec) -> std::io::Result<(u32, PipeReader)> {
    output::write_heading(&guard_spec.log, &guard_spec.program.display().to_string());
    let (reader, writer) = std::io::pipe()?;
    let mut command = Command::new(&guard_spec.program);
    command
        .args(&guard_spec.args)
        .envs(guard_spec.env.iter().map(|(name, value)| (name, value)))
        .env(RUN_TAG, &guard_spec.run_tag)
        // The daemon's own, which no engine needs.
        .env_remove("LLORCH_API_TOKEN")
        .env_remove("LLORCH_API_TOKEN_FILE")
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .process_group(0);
    let engine = command.spawn()?;
    // It holds the writing ends, and the output would never end.
    drop(command);
    Ok((engine.id(), reader))
}

fn keep_output(engine_output: PipeReader, guard_spec: &GuardSpec, owner: &Owner) {
    let (log, limit, owner) = (guard_spec.log.clone(), guard_spec.log_bytes, Arc::clone(owner));
    thread::spawn(move || {
        let mut reported: Option<Instant> = None;
        output::copy(engine_output, &log, limit, |line| {
            if reported.is_none_or(|at| at.elapsed() >= ALARM_EVERY) {
                reported = Some(Instant::now());
                say(&owner, &GuardReport::Alarm { line });
            }
        });
    });
}

fn listen(reader: BufReader<UnixStream>, mailbox: Sender<Heard>) {
    thread::spawn(move || {
        for line in reader.lines() {
            let Ok(line) = line else { break };
            if let Ok(Order::Stop) = serde_json::from_str(&line)
                && mailbox.send(Heard::Stop).is_err()
            {
                return;
            }
        }
        // The mailbox outlives all threads but at the very end.
        let _ = mailbox.send(Heard::DaemonGone);
    });
}

fn adopt(stream: UnixStream, owner: &Owner, started: &GuardReport, mailbox: Sender<Heard>) {
    let mut held = owner.lock().unwrap_or_else(PoisonError::into_inner);
    // One owner at a time: who comes while another one is there is turned away.
    if held.is_some() {
        return;
    }
    let Ok(reading) = stream.try_clone() else { return };
    *held = Some(stream);
    drop(held);
    say(owner, started);
    listen(BufReader::new(reading), mailbox);
}

fn await_daemons(listener: UnixListener, mailbox: Sender<Heard>) {
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = stream.set_write_timeout(Some(WRITE_TIMEOUT));
            if mailbox.send(Heard::Adopted(stream)).is_err() {
                return;
            }
        }
    });
}

fn wait_for_signals(signals: SigSet, mailbox: Sender<Heard>) {
    thread::spawn(move || {
        while signals.wait().is_ok() {
            if mailbox.send(Heard::Stop).is_err() {
                return;
            }
        }
    });
}

/// Reaps everything, and tells of the engine's end and of the last one's.
fn reap(engine: u32, mailbox: Sender<Heard>) {
    thread::spawn(move || {
        loop {
            let is_engine = |pid: nix::unistd::Pid| u32::try_from(pid.as_raw()) == Ok(engine);
            let ended = match waitpid(None, None) {
                Ok(WaitStatus::Exited(pid, status)) if is_engine(pid) => End {
                    how: format!("it ended with status {status}"),
                    signal: super::signal_of_status(status),
                },
                Ok(WaitStatus::Signaled(pid, signal, _)) if is_engine(pid) => {
                    End { how: format!("it was killed by {}", signal.as_str()), signal: Some(signal as i32) }
                }
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(_) => break,
            };
            if mailbox.send(Heard::EngineEnded(ended)).is_err() {
                return;
            }
        }
        let _ = mailbox.send(Heard::Alone);
    });
}
