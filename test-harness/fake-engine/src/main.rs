//! A fake engine: speaks like llama.cpp, vLLM, TGI, Triton or any server with OpenAI's API,
//! computes nothing, fails on demand.
//!
//! It stands beside the real engine in tests of failure and of speed, never instead of it.
//! Faults are set at run time with `POST /fake/fault`, and `GET /fake/seen` shows which traces and ids
//! came with its requests; `PUT /fake/script` sets answers to the byte, and `GET /fake/received` shows what
//! came meanwhile. Each answer is the words `w0 w1 w2 …`, so that a reader sees at once
//! whether one is missing or doubled.

mod answers;
mod engine;
mod fault;
mod generation;
mod kind;
mod script;
mod seen;
mod slots;
mod steps;
mod stream;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use atomic_file::WriteError;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Json, Request, State};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::serve::ListenerExt;
use clap::Parser;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::engine::{Engine, Kind};
use crate::fault::Fault;
use crate::script::Scripted;
use crate::seen::Seen;
use crate::slots::Slots;
use crate::steps::Steps;

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
    /// Leave out of the handoff what can be asked of the engine: models, slots, and the process.
    #[arg(long)]
    bare: bool,
    /// Asks for this key.
    #[arg(long)]
    api_key: Option<String>,
    /// The file with the key that the handoff names.
    #[arg(long)]
    api_key_file: Option<PathBuf>,
    /// The engine that it is, which the handoff names.
    #[arg(long, value_enum, default_value_t = Kind::Llamacpp)]
    engine: Kind,
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
        key: arguments.api_key.clone(),
        connections: AtomicU64::new(0),
        seen: Seen::default(),
        scripted: Scripted::default(),
        steps: Steps::begin(),
    });
    let own: Router<Arc<Engine>> = Router::new()
        .route("/fake/fault", post(set_fault))
        .route("/fake/busy", get(busy))
        .route("/fake/seen", get(seen::seen))
        .route("/fake/script", put(script::set))
        .route("/fake/received", get(script::received));
    // A script answers for routes too that the kind of engine has not.
    let guarded = kind::routes(arguments.engine).fallback(|| async { StatusCode::NOT_FOUND });
    let guarded = guarded.layer(from_fn_with_state(Arc::clone(&engine), script::play));
    let guarded = guarded.layer(from_fn_with_state(Arc::clone(&engine), guard));
    let guarded = guarded.layer(from_fn_with_state(Arc::clone(&engine), seen::remember));
    let app = own.merge(guarded).layer(DefaultBodyLimit::disable()).with_state(Arc::clone(&engine));
    if let Some(dir) = &arguments.handoff_dir {
        write_handoff(&arguments, dir, &url)?;
    }
    say(&url);
    let listener = listener.tap_io(move |stream| {
        engine.connections.fetch_add(1, Ordering::Relaxed);
        // A test's stream works without it, only slower.
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, app).await
}

#[expect(clippy::print_stdout, reason = "whoever starts the engine reads where it listens")]
fn say(url: &str) {
    println!("listening {url}");
}

fn write_handoff(arguments: &Arguments, dir: &std::path::Path, url: &str) -> Result<(), WriteError> {
    let (pool, replica) = (arguments.pool_id.as_deref(), arguments.replica_id.as_deref());
    let (pool, replica) = (pool.unwrap_or_default(), replica.unwrap_or_default());
    let mut handoff = json!({
        "pool_id": pool,
        "replica_id": replica,
        "engine": arguments.engine.as_str(),
        "url": url,
        "api_key_file": arguments.api_key_file,
    });
    if !arguments.bare {
        handoff["pid"] = json!(std::process::id());
        handoff["slots"] = json!(arguments.slots);
        handoff["model_ref"] = json!(arguments.model);
        // The others are asked.
        handoff["ctx_max"] = json!((arguments.engine == Kind::Triton).then_some(engine::CONTEXT));
    }
    let file = dir.join(format!("{pool}-{replica}.json"));
    atomic_file::replace(&file, handoff.to_string().as_bytes(), atomic_file::BY_UMASK)
}

async fn set_fault(State(engine): State<Arc<Engine>>, Json(fault): Json<Fault>) -> StatusCode {
    *engine.fault.lock() = fault;
    StatusCode::NO_CONTENT
}

/// For tests: what the engine's own word for it should agree with, where it has one.
async fn busy(State(engine): State<Arc<Engine>>) -> Json<Value> {
    let connections = engine.connections.load(Ordering::Relaxed);
    Json(json!({"busy": engine.slots.busy(), "waiting": engine.slots.waiting(), "connections": connections}))
}

/// Lets nobody in without the key, where there is one.
async fn guard(State(engine): State<Arc<Engine>>, request: Request, next: Next) -> Response {
    let given = request.headers().get("authorization").and_then(|value| value.to_str().ok());
    let wanted = engine.key.as_ref().map(|key| format!("Bearer {key}"));
    // As vLLM has it: whether it is up is open to everybody.
    if wanted.is_none() || given == wanted.as_deref() || request.uri().path() == "/health" {
        return next.run(request).await;
    }
    (StatusCode::UNAUTHORIZED, Json(json!({"error": "Unauthorized"}))).into_response()
}
