//! A fake engine: speaks like llama.cpp, vLLM, TGI, Triton or any server with OpenAI's API,
//! computes nothing, fails on demand.
//!
//! It stands beside the real engine in tests of failure and of speed, never instead of it.
//! Faults are set at run time with `POST /fake/fault`. Each answer is the words `w0 w1 w2 …`,
//! so that a reader sees at once whether one is missing or doubled.

mod answers;
mod fault;
mod generation;
mod kind;
mod slots;
mod stream;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Json, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use clap::Parser;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::fault::Fault;
use crate::kind::Kind;
use crate::slots::Slots;

/// A fake engine for tests and benchmarks.
#[derive(Debug, Parser)]
struct Arguments {
    /// 0: the system picks a port, which is printed.
    #[arg(long, default_value = "127.0.0.1:0")]
    addr: SocketAddr,
    /// The model's name.
    #[arg(long, default_value = "fake-model")]
    model: String,
    /// Requests served at a time; more wait.
    #[arg(long, default_value_t = 4)]
    slots: usize,
    /// Milliseconds to the first token.
    #[arg(long, default_value_t = 0)]
    first_token_ms: u64,
    /// Milliseconds between tokens.
    #[arg(long, default_value_t = 0)]
    pace_ms: u64,
    /// Write a handoff file for this pool and replica when listening.
    #[arg(long, requires_all = ["pool_id", "replica_id"])]
    handoff_dir: Option<PathBuf>,
    #[arg(long)]
    pool_id: Option<String>,
    #[arg(long)]
    replica_id: Option<String>,
    /// The engine that it is, which the handoff names.
    #[arg(long, value_enum, default_value_t = Kind::Llamacpp)]
    engine: Kind,
}

#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) kind: Kind,
    pub(crate) model: String,
    pub(crate) slots: Arc<Slots>,
    pub(crate) first_token: Duration,
    pub(crate) pace: Duration,
    pub(crate) fault: Mutex<Fault>,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fake-engine: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::bind(arguments.addr).await?;
    let url = format!("http://{}", listener.local_addr()?);
    let engine = Arc::new(Engine {
        kind: arguments.engine,
        model: arguments.model.clone(),
        slots: Arc::new(Slots::new(arguments.slots)),
        first_token: Duration::from_millis(arguments.first_token_ms),
        pace: Duration::from_millis(arguments.pace_ms),
        fault: Mutex::new(Fault::None),
    });
    let own: Router<Arc<Engine>> =
        Router::new().route("/fake/fault", post(set_fault)).route("/fake/busy", get(busy));
    let app = own.merge(arguments.engine.routes()).with_state(engine);
    if let Some(dir) = &arguments.handoff_dir {
        write_handoff(&arguments, dir, &url)?;
    }
    say(&url);
    let listener = listener.tap_io(|stream| {
        // A test's stream works without it, only slower.
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, app).await
}

#[expect(clippy::print_stdout, reason = "whoever starts the engine reads where it listens")]
fn say(url: &str) {
    println!("listening {url}");
}

fn write_handoff(arguments: &Arguments, dir: &std::path::Path, url: &str) -> std::io::Result<()> {
    let (pool, replica) = (arguments.pool_id.as_deref(), arguments.replica_id.as_deref());
    let (pool, replica) = (pool.unwrap_or_default(), replica.unwrap_or_default());
    let handoff = json!({
        "pool_id": pool,
        "replica_id": replica,
        "engine": arguments.engine.as_str(),
        "url": url,
        "pid": std::process::id(),
        "slots": arguments.slots,
        "model_ref": arguments.model,
        // The others are asked.
        "ctx_max": (arguments.engine == Kind::Triton).then_some(kind::CONTEXT),
    });
    std::fs::create_dir_all(dir)?;
    let temporary = dir.join(format!(".{pool}-{replica}.tmp"));
    std::fs::write(&temporary, handoff.to_string())?;
    std::fs::rename(&temporary, dir.join(format!("{pool}-{replica}.json")))
}

async fn set_fault(State(engine): State<Arc<Engine>>, Json(fault): Json<Fault>) -> StatusCode {
    *engine.fault.lock() = fault;
    StatusCode::NO_CONTENT
}

/// For tests: what the engine's own word for it should agree with, where it has one.
async fn busy(State(engine): State<Arc<Engine>>) -> Json<Value> {
    Json(json!({"busy": engine.slots.busy(), "waiting": engine.slots.waiting()}))
}
