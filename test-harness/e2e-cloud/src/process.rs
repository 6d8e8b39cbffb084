//! One child process with its log; gone when dropped.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A running program. Its output goes to a file, which a failing test can show.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

/// Where cargo puts the workspace's programs: beside this one, or beside the folder of a test.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a program knows its own path");
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!("{name} is not built: run `cargo xtask test`, or `cargo build --workspace` first")
    })
}

/// A TCP port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    listener.local_addr().expect("a bound address").port()
}

impl Process {
    /// Starts the command with its output in `log`. No variable of ours comes through.
    pub fn start(mut command: Command, log: &Path) -> Self {
        let file = File::options().create(true).append(true).open(log).expect("a writable log");
        let errors = file.try_clone().expect("a second handle");
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            let ours = ["ORCHESTRATORD_", "POOL_MANAGERD_", "LLORCH_"].iter().any(|p| name.starts_with(p));
            let set = command.get_envs().any(|(key, _)| key.to_string_lossy() == name);
            if ours && !set {
                command.env_remove(&*name);
            }
        }
        let child = command.stdin(Stdio::null()).stdout(file).stderr(errors).spawn();
        let child = child.unwrap_or_else(|error| panic!("{command:?} does not start: {error}"));
        Self { child, log: log.to_owned() }
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

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGCONT);
        self.kill();
    }
}
