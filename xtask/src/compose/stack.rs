//! The stack of `deploy/compose`, and what it is walked through.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::{join_all, try_join_all};
use serde_json::{Value, json};

use crate::compose::Programs;
use crate::compose::docker::{Docker, Tool};
use crate::steps::{Failed, cache, read, root, run, say};
use crate::up::{port, target};

const MODEL: &str = "smollm2-135m-instruct";
const NODES: [&str; 2] = ["gpu-node-1", "gpu-node-2"];
const TAG: &str = "compose-test";
/// How long the engines may take to load the model, fetched once through the package index.
const READY_PATIENCE: Duration = Duration::from_secs(300);
/// A node that is cut off counts as offline after 30 s, with the defaults that stand here.
const OFFLINE_PATIENCE: Duration = Duration::from_secs(45);
const BACK_PATIENCE: Duration = Duration::from_secs(90);
/// Tokens of an answer under which something is done to its node.
const LONG: u32 = 240;
/// How long a stream may be silent, far beyond what anything that is done to it costs.
const QUIET: Duration = Duration::from_secs(60);
/// How many of them are there when it is done.
const BEGUN: usize = 8;
const SHORT: u32 = 12;
/// Lines of what a command wrote that are shown where it failed.
const LINES_SHOWN: usize = 60;
/// Clients that ask on while the control plane is started again.
const CLIENTS: usize = 4;

/// Everything of one run; [`Stack::down`] removes it.
pub(super) struct Stack<'d> {
    docker: &'d Docker,
    tool: Tool,
    project: String,
    secrets: tempfile::TempDir,
    runtime_image: String,
    programs: Programs,
    port: u16,
    /// What the Compose tool writes.
    log: PathBuf,
    api: Api,
}

impl<'d> Stack<'d> {
    /// Makes the secrets as an operator does.
    pub(super) fn prepare(
        docker: &'d Docker,
        tool: Tool,
        runtime_image: String,
        programs: Programs,
    ) -> Result<Self, Failed> {
        let secrets = tempfile::tempdir().map_err(|error| Failed(format!("a folder of secrets: {error}")))?;
        let mut make = Command::new(folder().join("make-secrets"));
        run(make.arg(secrets.path()), "see its message above")?;
        let token = |name: &str| read(&secrets.path().join(name));
        let port = port(0)?;
        let client = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(Duration::from_secs(2))
            .read_timeout(QUIET)
            .build();
        let api = Api {
            client: client.map_err(|error| Failed(format!("no HTTP client: {error}")))?,
            base: format!("http://127.0.0.1:{port}"),
            client_token: token("client-token")?,
            admin_token: token("admin-token")?,
        };
        let project = format!("llorch-test-{}", std::process::id());
        let log = cache().join(format!("compose-{tool:?}.log").to_lowercase());
        // An earlier run's, if any.
        let _ = std::fs::remove_file(&log);
        Ok(Self { docker, tool, project, secrets, runtime_image, programs, port, log, api })
    }

    fn compose(&self, words: &[&str]) -> Result<(), Failed> {
        let mut command = self.tool.command(self.docker);
        command.arg("--env-file").arg(super::no_settings()?).args(["--project-name", &self.project]);
        command.arg("--file").arg(super::file()).args(words);
        command.env("LLORCH_TAG", TAG).env("LLORCH_SECRETS", self.secrets.path());
        command.env("LLORCH_PUBLISH", format!("127.0.0.1:{}", self.port));
        command.env("RUNTIME_IMAGE", &self.runtime_image);
        match &self.programs {
            // Nothing of a compiler is needed.
            Programs::There(folder) => {
                command.env("BINARIES", folder).env("BUILDER_IMAGE", &self.runtime_image);
            }
            Programs::Built { builder } => {
                command.env("BUILDER_IMAGE", builder);
            }
        }
        self.quietly(&mut command)
    }

    /// Runs a command whose many lines are for a file, of which the last ones are shown where it fails.
    fn quietly(&self, command: &mut Command) -> Result<(), Failed> {
        let failed = |error: std::io::Error| Failed(format!("{}: {error}", self.log.display()));
        let log = std::fs::File::options().create(true).append(true).open(&self.log).map_err(failed)?;
        command.stdout(log.try_clone().map_err(failed)?).stderr(log);
        run(command, &format!("see {}", self.log.display()))
            .inspect_err(|_| println!("{}", self.last_lines()))
    }

    fn last_lines(&self) -> String {
        let text = read(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LINES_SHOWN)..].join("\n")
    }

    pub(super) fn build(&self) -> Result<(), Failed> {
        say(&format!("building the images with {}", self.tool.name()));
        self.compose(&["build", "orchestratord", "example-model"])
    }

    fn image(name: &str) -> String {
        format!("llama-orch/{name}:{TAG}")
    }

    /// The container of a service.
    fn container(&self, service: &str) -> Result<String, Failed> {
        let project = format!("label=com.docker.compose.project={}", self.project);
        let service = format!("label=com.docker.compose.service={service}");
        self.docker.ask(&["ps", "--all", "--quiet", "--filter", &project, "--filter", &service])
    }

    fn gpu_container(&self) -> String {
        format!("{}-gpu", self.project)
    }

    fn network(&self) -> String {
        format!("{}_cluster", self.project)
    }

    fn health(&self, service: &str) -> Result<String, Failed> {
        self.docker.ask(&["inspect", "--format", "{{.State.Health.Status}}", &self.container(service)?])
    }

    /// What a Compose tool has its hands in.
    pub(super) async fn short_walk(&self) -> Result<(), Failed> {
        self.comes_up().await?;
        self.restart_the_control_plane().await
    }

    async fn comes_up(&self) -> Result<(), Failed> {
        say("up: a control plane, two nodes with an engine each, and their model");
        self.compose(&["up", "--detach", "--no-build"])?;
        self.api.until(READY_PATIENCE, "both nodes serve the model", Api::serves_both).await?;
        self.healthy().await?;
        self.over_both_nodes().await
    }

    /// What it is brought through; each step says what it shows.
    pub(super) async fn walk(&self) -> Result<(), Failed> {
        self.comes_up().await?;
        self.gpus().await?;
        let expected = self.api.stream(LONG, &AtomicUsize::new(0)).await?.whole()?;
        self.cut(&expected).await?;
        self.kill(&expected).await?;
        self.restart_the_control_plane().await
    }

    async fn healthy(&self) -> Result<(), Failed> {
        say("Docker's health checks pass; read-only, no capabilities, no root");
        for service in ["orchestratord", NODES[0], NODES[1]] {
            let shown = "{{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}} {{.Config.User}}";
            let confined = self.docker.ask(&["inspect", "--format", shown, &self.container(service)?])?;
            if confined != "true [ALL] 10001:10001" {
                return Err(Failed(format!("{service} runs with more than it needs: {confined}")));
            }
            let start = Instant::now();
            loop {
                let health = self.health(service)?;
                if health == "healthy" {
                    break;
                }
                if start.elapsed() > Duration::from_secs(60) {
                    return Err(Failed(format!("{service} is {health}")));
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        Ok(())
    }

    /// A third node, whose container has a driver's library where the NVIDIA runtime puts it.
    async fn gpus(&self) -> Result<(), Failed> {
        say("the image loads NVML where the NVIDIA runtime puts it (here a fake library)");
        let library = target("debug").join("libfake_nvml.so");
        let library = format!("{}:/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1:ro", library.display());
        let tokens = format!("{}:/run/secrets/tokens:ro", self.secrets.path().join("node-tokens").display());
        let (name, network) = (self.gpu_container(), self.network());
        let variables = [
            "ORCHESTRATORD_URL=http://orchestratord:8080",
            "LLORCH_API_TOKEN_FILE=/run/secrets/tokens",
            "POOL_MANAGERD_NODE_ID=with-a-gpu",
        ];
        let mut words =
            vec!["run", "--detach", "--rm", "--read-only", "--name", &name, "--network", &network];
        words.extend(["--volume", &library, "--volume", &tokens, "--tmpfs", "/tmp"]);
        words.extend(["--tmpfs", "/run/llama-orch:uid=10001,gid=10001"]);
        words.extend(["--tmpfs", "/var/log/llama-orch:uid=10001,gid=10001"]);
        words.extend(["--tmpfs", "/var/lib/llama-orch/pool-managerd:uid=10001,gid=10001"]);
        words.extend(variables.iter().flat_map(|variable| ["--env", variable]));
        let image = Self::image("pool-managerd-llamacpp");
        words.push(&image);
        self.docker.ask(&words)?;
        let seen = self.api.until(BACK_PATIENCE, "the node shows its GPU", async |api: &Api| {
            let node = api.get("/v2/nodes/with-a-gpu").await?;
            let gpu = &node["capabilities"]["gpus"][0];
            Some(gpu.clone()).filter(|gpu| gpu["vram_total_bytes"].as_u64().is_some_and(|bytes| bytes > 0))
        });
        let seen = seen.await;
        // It signs off at SIGTERM.
        self.docker.ask(&["stop", &name])?;
        println!("{}", seen?);
        Ok(())
    }

    async fn over_both_nodes(&self) -> Result<(), Failed> {
        say("asking through /v1, over both nodes");
        let answers = (0..8).map(|_| async { self.api.stream(SHORT, &AtomicUsize::new(0)).await?.whole() });
        try_join_all(answers).await?;
        for node in NODES {
            let page = self.api.get(&format!("/v2/tasks?node_id={node}")).await.unwrap_or_default();
            let tasks = page["tasks"].as_array().map_or(0, Vec::len);
            println!("{node} has answered {tasks}");
            if tasks == 0 {
                return Err(Failed(format!("{node} got none of 8 tasks at once")));
            }
        }
        Ok(())
    }

    /// Starts an answer, and says on which node it comes once it has begun.
    async fn begun(&self) -> Result<(Begun, String), Failed> {
        let (api, seen) = (self.api.clone(), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&seen);
        let answer = tokio::spawn(async move { api.stream(LONG, &counted).await });
        let node = self.api.until(Duration::from_secs(30), "an answer has begun", async |api: &Api| {
            let tasks = api.get("/v2/tasks?state=running").await?;
            let text = |field: &str| Some(tasks["tasks"][0][field].as_str()?.to_owned());
            let found = (text("task_id")?, text("node_id")?);
            (seen.load(Ordering::Relaxed) >= BEGUN).then_some(found)
        });
        let (task_id, node) = node.await?;
        Ok((Begun { answer, task_id }, node))
    }

    /// That the answer is the one that an undisturbed node gives, and went on elsewhere.
    async fn unharmed(&self, begun: Begun, expected: &str) -> Result<(), Failed> {
        let answer = begun.answer.await.map_err(|error| Failed(format!("a client: {error}")))??.whole()?;
        let task = self.api.get(&format!("/v2/tasks/{}", begun.task_id)).await.unwrap_or_default();
        let attempts = task["attempts"].as_array().map_or(0, Vec::len);
        if answer == expected && attempts > 1 {
            return Ok(());
        }
        if answer == expected {
            return Err(Failed(format!("it ended before anything was done to it, in {attempts} attempt")));
        }
        Err(Failed(format!("another answer came than an undisturbed node gives:\n{answer}\n{expected}")))
    }

    async fn cut(&self, expected: &str) -> Result<(), Failed> {
        let (answer, node) = self.begun().await?;
        say(&format!("{node} loses its network under a stream"));
        let (network, container) = (self.network(), self.container(&node)?);
        self.docker.ask(&["network", "disconnect", &network, &container])?;
        let start = Instant::now();
        self.unharmed(answer, expected).await?;
        println!(
            "the stream went on elsewhere and ended {:.1} s later, no token other than without the cut",
            start.elapsed().as_secs_f64()
        );
        let offline = async |api: &Api| {
            let shown = api.get(&format!("/v2/nodes/{node}")).await?;
            (shown["liveness"] == "offline").then_some(())
        };
        self.api.until(OFFLINE_PATIENCE, "the node counts as offline", offline).await?;
        println!("{node} is offline {:.1} s after the cut", start.elapsed().as_secs_f64());
        let health = self.health(&node)?;
        if health != "healthy" {
            return Err(Failed(format!(
                "{node} is cut off, lives, and counts as {health}: Docker may replace it"
            )));
        }
        self.docker.ask(&["network", "connect", "--alias", &node, &network, &container])?;
        let start = Instant::now();
        self.api.until(BACK_PATIENCE, "the node is back", Api::serves_both).await?;
        println!("{node} serves again {:.1} s after it was connected", start.elapsed().as_secs_f64());
        Ok(())
    }

    async fn kill(&self, expected: &str) -> Result<(), Failed> {
        let (answer, node) = self.begun().await?;
        say(&format!("{node}'s container is killed under a stream"));
        let container = self.container(&node)?;
        self.docker.ask(&["kill", &container])?;
        let start = Instant::now();
        self.unharmed(answer, expected).await?;
        println!("the stream went on elsewhere and ended {:.1} s later", start.elapsed().as_secs_f64());
        self.docker.ask(&["start", &container])?;
        let start = Instant::now();
        self.api.until(BACK_PATIENCE, "the node is back", Api::serves_both).await?;
        println!("{node} serves again {:.1} s after its start", start.elapsed().as_secs_f64());
        Ok(())
    }

    async fn restart_the_control_plane(&self) -> Result<(), Failed> {
        say("the control plane is restarted under clients that repeat what was refused");
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let clients = (0..CLIENTS).map(|_| {
            let (api, stop, done) = (self.api.clone(), Arc::clone(&stop), Arc::clone(&done));
            tokio::spawn(async move {
                let mut refused = 0;
                while !stop.load(Ordering::Relaxed) {
                    match api.stream(SHORT, &AtomicUsize::new(0)).await? {
                        Answer::Refused(_) => {
                            refused += 1;
                            tokio::time::sleep(Duration::from_millis(200)).await;
                        }
                        answer => {
                            answer.whole()?;
                            done.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
                Ok::<usize, Failed>(refused)
            })
        });
        let clients: Vec<_> = clients.collect();
        let ended = async |more: usize| {
            let wanted = done.load(Ordering::Relaxed) + more;
            let start = Instant::now();
            while done.load(Ordering::Relaxed) < wanted {
                if start.elapsed() > BACK_PATIENCE {
                    return Err(Failed(format!("no {more} answers within {} s", BACK_PATIENCE.as_secs())));
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Ok(())
        };
        ended(CLIENTS).await?;
        let restarting = Instant::now();
        tokio::task::block_in_place(|| self.compose(&["restart", "orchestratord"]))?;
        println!("restarted within {:.1} s", restarting.elapsed().as_secs_f64());
        let outcome = ended(2 * CLIENTS).await;
        println!("answers again {:.1} s after the restart began", restarting.elapsed().as_secs_f64());
        stop.store(true, Ordering::Relaxed);
        let mut refused = 0;
        for client in join_all(clients).await {
            refused += client.map_err(|error| Failed(format!("a client: {error}")))??;
        }
        outcome?;
        let (lines, bad) = self.ended_tasks()?;
        println!(
            "{} answers were whole, {refused} requests were refused and repeated; {lines} tasks ended in the control plane's log",
            done.load(Ordering::Relaxed)
        );
        if bad.is_empty() {
            Ok(())
        } else {
            Err(Failed(format!("tasks that were accepted ended badly:\n{}", bad.join("\n"))))
        }
    }

    /// The tasks that have ended as the control plane's log has it: how many, and the lines of those that
    /// did not complete.
    fn ended_tasks(&self) -> Result<(usize, Vec<String>), Failed> {
        let mut logs = self.docker.command("sh");
        // The daemon writes to standard error.
        logs.args(["-c", "docker logs \"$0\" 2>&1"]).arg(self.container("orchestratord")?);
        let text = crate::steps::output(&mut logs, "see the engine's message above")?;
        let ended: Vec<&str> = text.lines().filter(|line| line.contains("\"a task ended\"")).collect();
        if ended.is_empty() {
            return Err(Failed::new("the control plane's log has no task that ended"));
        }
        let is_good =
            |line: &&&str| serde_json::from_str::<Value>(line).is_ok_and(|line| line["state"] == "Completed");
        let bad = ended.iter().filter(|line| !is_good(line)).map(|line| (*line).to_owned()).collect();
        Ok((ended.len(), bad))
    }

    /// What the containers wrote last, where something failed.
    pub(super) fn show_logs(&self) {
        // It failed for another reason already.
        let _ = self.compose(&["logs", "--tail", "15", "--no-color"]);
        println!("{}", self.last_lines());
    }

    /// Takes everything away that this run has made but what BuildKit has put aside for later builds, and looks
    /// that nothing is left.
    pub(super) fn down(&self) -> Result<(), Failed> {
        say("down");
        // It is there where something failed while it ran.
        self.docker.ask_quietly(&["rm", "--force", &self.gpu_container()]);
        let gone = self.compose(&["down", "--volumes", "--remove-orphans", "--timeout", "20"]);
        for image in ["orchestratord", "pool-managerd-llamacpp"] {
            // It is not there where the build failed.
            self.docker.ask_quietly(&["image", "rm", &Self::image(image)]);
        }
        if let Programs::There(folder) = &self.programs {
            // The stage of the programs has no name, and stays where nobody removes it.
            let of_ours = format!("label=llama-orch.binaries={}", folder.display());
            self.docker.ask_quietly(&["image", "prune", "--force", "--filter", &of_ours]);
        }
        gone?;
        let label = format!("label=com.docker.compose.project={}", self.project);
        for kind in [&["ps", "--all"][..], &["network", "ls"], &["volume", "ls"]] {
            let left = self.docker.ask(&[kind, &["--quiet", "--filter", &label]].concat())?;
            if !left.is_empty() {
                return Err(Failed(format!("docker {} shows what should be gone: {left}", kind[0])));
            }
        }
        Ok(())
    }
}

/// An answer that is under way.
struct Begun {
    answer: tokio::task::JoinHandle<Result<Answer, Failed>>,
    task_id: String,
}

fn folder() -> PathBuf {
    root().join("deploy/compose")
}

/// The control plane's, as clients and its operator ask it.
#[derive(Clone)]
struct Api {
    client: reqwest::Client,
    base: String,
    client_token: String,
    admin_token: String,
}

/// What became of a request.
enum Answer {
    /// It was not accepted: nobody listened, or 503.
    Refused(String),
    /// Its text, and whether it had its end.
    Text { text: String, is_whole: bool },
}

impl Answer {
    fn whole(self) -> Result<String, Failed> {
        match self {
            Self::Text { text, is_whole: true } if !text.is_empty() => Ok(text),
            Self::Text { text, .. } => Err(Failed(format!("an answer ended without its end: {text}"))),
            Self::Refused(why) => Err(Failed(format!("a request was refused: {why}"))),
        }
    }
}

impl Api {
    /// What its operator is shown; nothing where it does not answer, or not well.
    async fn get(&self, path: &str) -> Option<Value> {
        let request = self.client.get(format!("{}{path}", self.base)).bearer_auth(&self.admin_token);
        let response = request.timeout(Duration::from_secs(5)).send().await.ok()?;
        response.error_for_status().ok()?.json().await.ok()
    }

    async fn until<T>(
        &self,
        patience: Duration,
        what: &str,
        look: impl AsyncFn(&Self) -> Option<T>,
    ) -> Result<T, Failed> {
        let start = Instant::now();
        loop {
            if let Some(seen) = look(self).await {
                return Ok(seen);
            }
            if start.elapsed() > patience {
                let nodes = self.get("/v2/nodes").await.unwrap_or_default();
                return Err(Failed(format!(
                    "not within {} s: {what}; the nodes: {nodes}",
                    patience.as_secs()
                )));
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }

    async fn serves_both(&self) -> Option<()> {
        let models = self.get("/v2/catalog/availability").await?;
        let model = models["models"].as_array()?.iter().find(|model| model["model_id"] == MODEL)?;
        (model["total_nodes"].as_u64()? == NODES.len() as u64).then_some(())
    }

    /// Asks for a stream that is always the same, and counts its pieces as they come.
    async fn stream(&self, tokens: u32, seen: &AtomicUsize) -> Result<Answer, Failed> {
        let request = json!({
            "model": MODEL, "stream": true, "temperature": 0.0, "seed": 1, "max_tokens": tokens,
            "messages": [{"role": "user", "content": "Tell me at length about the sea, its fishes and its ships."}],
        });
        let url = format!("{}/v1/chat/completions", self.base);
        let sent = self.client.post(url).bearer_auth(&self.client_token).json(&request).send().await;
        let response = match sent {
            Ok(response) => response,
            Err(error) => return Ok(Answer::Refused(format!("{error:?}"))),
        };
        let status = response.status();
        if status == reqwest::StatusCode::SERVICE_UNAVAILABLE {
            return Ok(Answer::Refused(response.text().await.unwrap_or_default()));
        }
        if !status.is_success() {
            let body = response.text().await.unwrap_or_default();
            return Err(Failed(format!("/v1/chat/completions answers {status}: {body}")));
        }
        let (mut body, mut bytes) = (response.bytes_stream(), Vec::new());
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(|error| Failed(format!("a stream broke off: {error:?}")))?;
            bytes.extend_from_slice(&piece);
            seen.store(bytes.windows(6).filter(|at| at == b"data: ").count(), Ordering::Relaxed);
        }
        let (mut text, mut is_whole) = (String::new(), false);
        for data in String::from_utf8_lossy(&bytes).lines().filter_map(|line| line.strip_prefix("data: ")) {
            is_whole = data == "[DONE]";
            let Ok(event) = serde_json::from_str::<Value>(data) else { continue };
            if !event["error"].is_null() {
                return Err(Failed(format!("a stream has an error: {event}")));
            }
            text.push_str(event["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
        }
        Ok(Answer::Text { text, is_whole })
    }
}
