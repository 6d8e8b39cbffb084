//! The real engine: llama.cpp's server, with the project's own tiny model.
//!
//! `cargo xtask test` fetches the engine into the cache beforehand; without it these journeys
//! fail and say so, because a skipped proof is none.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

fn root() -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.ancestors().nth(2).expect("the crate lies two folders deep").to_owned()
}

/// A Python that sees the engine.
pub fn python() -> PathBuf {
    let python = root().join(".cache/engine/python");
    assert!(
        python.exists(),
        "the engine is not fetched: run `cargo xtask engine` once (`cargo xtask test` does)"
    );
    python
}

/// The tiny model, written once for each test run.
pub fn tiny_model() -> PathBuf {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    let write = || {
        let path = root().join(".cache").join(format!("tiny-{}.gguf", std::process::id()));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("engine/tiny_gguf.py");
        let status = Command::new(python()).arg(script).arg(&path).status().expect("Python runs");
        assert!(status.success(), "the tiny model was not written");
        let shared = root().join(".cache/tiny.gguf");
        std::fs::rename(&path, &shared).expect("the cache can be written");
        shared
    };
    MODEL.get_or_init(write).clone()
}

/// An entry of a file of pools that runs the engine on the tiny model; `more` are further fields.
pub fn pool(pool_id: &str, model: &str, more: &str) -> String {
    let launcher = root().join("deploy/engines/llama_server.py");
    format!(
        r#"
[models.{model}]
source = "{}"

[pools.{pool_id}]
engine = "llamacpp"
model = "{model}"
slots = 2
ctx = 1024
{more}
[pools.{pool_id}.provision]
mode = "binary"
program = "{}"
args = ["{}", "--model", "{{model_path}}", "--alias", "{{model}}", "--port", "{{port}}", "--slots", "{{slots}}", "--ctx", "{{ctx}}", "--keep"]
"#,
        tiny_model().display(),
        python().display(),
        launcher.display(),
    )
}

/// The grammars that are held to be real: their names and texts, in order.
pub fn grammars() -> Vec<(String, String)> {
    let folder = root().join("libs/shared/pool-registry-types/tests/grammars");
    let entries = std::fs::read_dir(&folder).expect("the folder of grammars");
    let mut grammars: Vec<(String, String)> = entries
        .map(|entry| {
            let path = entry.expect("a readable folder").path();
            let name = path.file_stem().expect("a file's name").to_string_lossy().into_owned();
            (name, std::fs::read_to_string(&path).expect("a grammar is text"))
        })
        .collect();
    grammars.sort();
    grammars
}

/// The command that serves a model as `pool-0`, replica `r0`, with so many tokens of context a slot.
pub fn command(model: &Path, alias: &str, slots: u32, ctx: u32, runtime_dir: &Path) -> Command {
    let mut command = Command::new(python());
    command
        .arg(root().join("deploy/engines/llama_server.py"))
        .arg("--model")
        .arg(model)
        .args(["--alias", alias, "--slots", &slots.to_string(), "--ctx", &ctx.to_string(), "--keep"])
        .args(["--pool-id", "pool-0", "--replica-id", "r0", "--handoff"])
        .arg(runtime_dir.join("pool-0-r0.json"));
    command
}

/// The command that makes embeddings with the tiny model, under another name, as `pool-1`, replica `r0`.
pub fn embeddings(alias: &str, runtime_dir: &Path) -> Command {
    let mut command = Command::new(python());
    command
        .arg(root().join("deploy/engines/llama_server.py"))
        .arg("--model")
        .arg(tiny_model())
        .args(["--alias", alias, "--slots", "2", "--ctx", "1024", "--keep", "--embeddings"])
        .args(["--pool-id", "pool-1", "--replica-id", "r0", "--handoff"])
        .arg(runtime_dir.join("pool-1-r0.json"));
    command
}
