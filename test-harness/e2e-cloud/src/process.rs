//! One child process with its log; gone when dropped.

use std::fs::File;
use std::io::PipeReader;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
pub use nix::sys::signal::Signal;
use nix::sys::signal::kill;
use nix::unistd::Pid;

/// A running program. Its output goes to a file, which a failing test can show.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    /// Held open and never read.
    _unread: Option<PipeReader>,
}

/// Where cargo puts the workspace's programs: beside this one, or beside the folder of a test.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a program knows its own path");
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!("{name} is not built: run `cargo xtask test`, or `cargo build --workspace` first")
    })
}

/// As many open files for this process as it may have: both ends of all connections are files, its own among
/// them.
pub fn raise_file_limit() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit of open files");
    setrlimit(Resource::RLIMIT_NOFILE, most, most).expect("up to the hard limit anybody may");
}

/// Ports that no system takes for outgoing connections by itself: one of those may be taken before whoever
/// is started listens there.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

/// A TCP port that was free a moment ago, and is given to nobody else for long.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let count = u32::from(PORTS.end - PORTS.start);
    let first = std::process::id().wrapping_mul(7_919);
    for _ in 0..count {
        let at = first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % count;
        let port = PORTS.start + u16::try_from(at).expect("fewer than there are ports");
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("loopback has no free port between {} and {}", PORTS.start, PORTS.end)
}

impl Process {
    /// Starts the command with its output in `log`. No variable of ours comes through.
    pub fn start(mut command: Command, log: &Path) -> Self {
        // Directories that the command does not name are beside the log, not those of this machine.
        if let Some(folder) = log.parent() {
            for (variable, name) in [("STATE", "state"), ("RUNTIME", "run"), ("LOGS", "logs")] {
                let variable = format!("{variable}_DIRECTORY");
                if !command.get_envs().any(|(name, _)| name == variable.as_str()) {
                    command.env(variable, folder.join(format!("default-{name}")));
                }
            }
        }
        let file = File::options().create(true).append(true).open(log).expect("a writable log");
        let errors = file.try_clone().expect("a second handle");
        Self { child: spawn(command, file.into(), errors.into()), log: log.to_owned(), _unread: None }
    }

    /// Starts the command with both outputs in one pipe that nobody reads.
    pub fn start_unread(command: Command) -> Self {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let errors = writer.try_clone().expect("a second handle");
        let child = spawn(command, writer.into(), errors.into());
        Self { child, log: PathBuf::new(), _unread: Some(reader) }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("process ids are small");
        // A process that has ended already is as good.
        let _ = kill(Pid::from_raw(pid), signal);
    }

    /// Waits for the end, `patience` at most.
    pub fn wait(&mut self, patience: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status;
            }
            assert!(start.elapsed() < patience, "still running after {patience:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGKILL, and gone.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        // Killed processes always end.
        let _ = self.child.wait();
    }

    /// What it has written; nothing where nobody reads it.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// No variable of ours comes through but those that the command sets.
fn spawn(mut command: Command, output: Stdio, errors: Stdio) -> Child {
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        let ours = ["ORCHESTRATORD_", "POOL_MANAGERD_", "LLORCH_"].iter().any(|p| name.starts_with(p));
        let set = command.get_envs().any(|(key, _)| key.to_string_lossy() == name);
        if ours && !set {
            command.env_remove(&*name);
        }
    }
    let child = command.stdin(Stdio::null()).stdout(output).stderr(errors).spawn();
    child.unwrap_or_else(|error| panic!("{command:?} does not start: {error}"))
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGCONT);
        self.kill();
    }
}
