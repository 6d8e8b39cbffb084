//! The container engine: the one that runs here, or one of our own for as long as it is needed; the Compose
//! tools that ask it; and the base images, made where no registry hands them out.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::steps::{Failed, cache, output, run, say};
use crate::up::Started;

/// How long an engine may take to answer once it is started.
const ENGINE_PATIENCE: Duration = Duration::from_secs(60);
/// How long a registry may take to hand an image out; timeout(1) ends it then.
const PULL_SECONDS: &str = "60";
const DEBIAN: &str = "http://deb.debian.org/debian";
/// Debian's packages docker.io and binutils.
const NEEDED: [&str; 2] = ["docker", "strip"];
/// For an engine of our own. Packages docker.io and iptables.
const NEEDED_TO_START: [&str; 2] = ["dockerd", "iptables"];

/// A container engine that answers.
pub(crate) struct Docker {
    /// `DOCKER_HOST` for all that asks it; absent: the one that is found by itself.
    host: Option<String>,
    /// Images that were made here, removed at the end.
    made: Vec<String>,
    own: Option<Own>,
}

/// An engine of our own, ended when dropped.
struct Own {
    daemon: Started,
    /// Its images and containers.
    data: PathBuf,
    /// Holds the socket, whose path must be short.
    _run: tempfile::TempDir,
}

impl Docker {
    /// The engine that runs on this machine, or else one of our own, whose images and containers lie in the
    /// cache.
    pub(crate) fn start() -> Result<Self, Failed> {
        let found = Self { host: None, made: Vec::new(), own: None };
        if found.answers() {
            say("using the container engine that runs here");
            return Ok(found);
        }
        say("starting a container engine of our own");
        let folder = cache().join("docker");
        let failed = |error: std::io::Error| Failed(format!("{}: {error}", folder.display()));
        std::fs::create_dir_all(&folder).map_err(failed)?;
        let run = tempfile::Builder::new().prefix("llorch").tempdir_in("/run").map_err(failed)?;
        let socket = format!("unix://{}", run.path().join("docker.sock").display());
        let mut command = Command::new("dockerd");
        let data = folder.join("data");
        command.args(["--host", &socket]).arg("--data-root").arg(&data);
        command.arg("--exec-root").arg(run.path().join("exec"));
        command.arg("--pidfile").arg(run.path().join("pid"));
        let mut daemon = Started::spawn("dockerd", command, &folder)?;
        let asking = Self { host: Some(socket.clone()), made: Vec::new(), own: None };
        let start = Instant::now();
        while !asking.answers() {
            daemon.check()?;
            if start.elapsed() > ENGINE_PATIENCE {
                return Err(Failed(format!(
                    "dockerd does not answer: see {}",
                    folder.join("dockerd.log").display()
                )));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(Self { host: Some(socket), made: Vec::new(), own: Some(Own { daemon, data, _run: run }) })
    }

    /// A command that asks this engine.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        if let Some(host) = &self.host {
            command.env("DOCKER_HOST", host);
        }
        command
    }

    fn answers(&self) -> bool {
        self.ask_quietly(&["info", "--format", "{{.ServerVersion}}"])
    }

    /// What `docker` prints when it is given these words.
    pub(crate) fn ask(&self, words: &[&str]) -> Result<String, Failed> {
        let printed = output(self.command("docker").args(words), "see the engine's message above")?;
        Ok(printed.trim().to_owned())
    }

    /// The same where it does not matter what is printed. Returns whether it went well.
    pub(super) fn ask_quietly(&self, words: &[&str]) -> bool {
        let mut asking = self.command("docker");
        asking.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        asking.status().is_ok_and(|status| status.success())
    }

    fn has(&self, image: &str) -> bool {
        self.ask_quietly(&["image", "inspect", image])
    }

    /// An image as this one: the engine has it, or a registry does, or it is made of what `fill` puts into a
    /// folder; under a name of its own, for nobody else is to build on it. Returns the name.
    pub(super) fn base(
        &mut self,
        image: &str,
        fill: impl FnOnce(&Path) -> Result<(), Failed>,
    ) -> Result<String, Failed> {
        if self.has(image) {
            return Ok(image.to_owned());
        }
        let mut pull = self.command("timeout");
        pull.args([PULL_SECONDS, "docker", "pull", "--quiet", image]).stdin(Stdio::null());
        if pull.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
            return Ok(image.to_owned());
        }
        say(&format!("no registry hands {image} out: one like it is made here"));
        let root = tempfile::Builder::new().prefix("image").tempdir_in(cache());
        let root = root.map_err(|error| Failed(format!("{}: {error}", cache().display())))?;
        fill(root.path())?;
        let own = format!("llama-orch/like-{}", image.replace(':', "-"));
        let mut import = self.command("sh");
        import.args(["-c", "tar -C \"$0\" -c . | docker import - \"$1\""]).arg(root.path()).arg(&own);
        run(&mut import, "see the engine's message above")?;
        self.made.push(own.clone());
        Ok(own)
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        for image in &self.made {
            // An image that is used by others stays.
            self.ask_quietly(&["image", "rm", image]);
        }
        if let Some(Own { daemon, data, .. }) = &mut self.own.take() {
            daemon.stop();
            // What cannot be removed is in the cache, which may be thrown away.
            let _ = std::fs::remove_dir_all(data);
        }
    }
}

/// What an operator sets for a stack of his own.
const OPERATORS: [&str; 4] = ["LLORCH_", "ORCHESTRATORD_", "COMPOSE_", "HF_"];

/// A Compose tool: versions from 2 on are a plugin of `docker`, version 1 is a program of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tool {
    V2,
    V1,
}

impl Tool {
    const KNOWN: [Self; 2] = [Self::V2, Self::V1];

    /// Those of this machine.
    pub(super) fn there() -> Vec<Self> {
        Self::KNOWN.into_iter().filter(|tool| tool.is_there()).collect()
    }

    /// Those that it has not.
    pub(super) fn lacking() -> Vec<Self> {
        Self::KNOWN.into_iter().filter(|tool| !tool.is_there()).collect()
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V2 => "docker compose (v2 or later)",
            Self::V1 => "docker-compose 1.29",
        }
    }

    /// Its command for an engine. That of version 1 builds without BuildKit, so that the Dockerfile has nothing
    /// that only BuildKit knows. An operator's own settings are not for it.
    pub(super) fn command(self, docker: &Docker) -> Command {
        let mut command = match self {
            Self::V2 => docker.command("docker"),
            Self::V1 => docker.command("docker-compose"),
        };
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            if OPERATORS.iter().any(|of| name.starts_with(of)) {
                command.env_remove(name);
            }
        }
        match self {
            // A builder of another kind does not see the engine's images.
            Self::V2 => command.env("DOCKER_BUILDKIT", "1").env("BUILDX_BUILDER", "default").arg("compose"),
            Self::V1 => command.env("DOCKER_BUILDKIT", "0").env("COMPOSE_DOCKER_CLI_BUILD", "0"),
        };
        command
    }

    fn is_there(self) -> bool {
        let (mut command, majors) = match self {
            Self::V2 => (Command::new("docker"), 2..=u32::MAX),
            Self::V1 => (Command::new("docker-compose"), 1..=1),
        };
        command.args((self == Self::V2).then_some("compose")).args(["version", "--short"]);
        let Ok(answer) = command.stdin(Stdio::null()).stderr(Stdio::null()).output() else { return false };
        let version = String::from_utf8_lossy(&answer.stdout).trim().trim_start_matches('v').to_owned();
        let major = version.split('.').next().and_then(|major| major.parse().ok());
        answer.status.success() && major.is_some_and(|major| majors.contains(&major))
    }
}

/// What the stack needs that this machine has not.
pub(super) fn lacking() -> Vec<&'static str> {
    let mut lacks: Vec<&str> = NEEDED.into_iter().filter(|program| !is_there(program)).collect();
    if Tool::there().is_empty() {
        lacks.push("docker compose");
    }
    if lacks.is_empty() && !has_engine() {
        lacks.extend(NEEDED_TO_START.into_iter().filter(|program| !is_there(program)));
    }
    if !nix::unistd::Uid::effective().is_root() {
        lacks.push("root");
    }
    lacks
}

/// Whether a container engine runs here.
pub(super) fn has_engine() -> bool {
    Docker { host: None, made: Vec::new(), own: None }.answers()
}

fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Debian 12 in a folder, with the certificates that this machine trusts.
pub(crate) fn debian(root: &Path, more: &str) -> Result<(), Failed> {
    let include = format!("--include=ca-certificates{more}");
    let mut command = Command::new("debootstrap");
    // Where the machine has an own way to packages (http_proxy, a mirror in its resolver), it has it too.
    command
        .args(["--variant=minbase", "--force-check-gpg", &include, "bookworm"])
        .arg(root)
        .arg(DEBIAN)
        .stdout(Stdio::null());
    run(&mut command, "the package registry must be reached, as root")?;
    // Images of a registry have no packages of their making in them.
    for left in ["var/cache/apt/archives", "var/lib/apt/lists"] {
        let _ = std::fs::remove_dir_all(root.join(left));
    }
    trust(root)
}

/// What stands between this machine and the registries is trusted in the images too.
fn trust(root: &Path) -> Result<(), Failed> {
    let bundle = PathBuf::from("etc/ssl/certs/ca-certificates.crt");
    let from = Path::new("/").join(&bundle);
    if from.is_file() {
        let to = root.join(bundle);
        std::fs::copy(from, &to).map_err(|error| Failed(format!("{}: {error}", to.display())))?;
    }
    Ok(())
}

/// The same with the compiler that builds us.
pub(crate) fn rust(root: &Path) -> Result<(), Failed> {
    debian(root, ",gcc,libc6-dev,binutils")?;
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]), "a Rust toolchain is needed")?;
    let mut copy = Command::new("cp");
    copy.arg("-a").arg(format!("{}/.", sysroot.trim())).arg(root.join("usr/local"));
    run(&mut copy, "the toolchain cannot be copied")
}
