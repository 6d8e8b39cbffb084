//! A fake engine: speaks like llama.cpp and like OpenAI's API, computes nothing, fails on demand.
//!
//! It stands beside the real engine in tests of failure and of speed, never instead of it.
//! Faults are set at run time with `POST /fake/fault`. Each answer is the words `w0 w1 w2 …`,
//! so that a reader sees at once whether one is missing or doubled.

mod fault;
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
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use clap::Parser;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::fault::Fault;
use crate::slots::Slots;
use crate::stream::Dialect;

/// Tokens of an answer whose request sets no number.
const DEFAULT_TOKENS: u64 = 16;

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
    /// The dialect that the handoff names: llamacpp or openai.
    #[arg(long, default_value = "llamacpp")]
    engine: String,
}

#[derive(Debug)]
pub(crate) struct Engine {
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
        model: arguments.model.clone(),
        slots: Arc::new(Slots::new(arguments.slots)),
        first_token: Duration::from_millis(arguments.first_token_ms),
        pace: Duration::from_millis(arguments.pace_ms),
        fault: Mutex::new(Fault::None),
    });
    let app = Router::new()
        .route("/health", get(health))
        .route("/props", get(props))
        .route("/slots", get(slots))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/completion", post(completion))
        .route("/v1/completions", post(openai_completion))
        .route("/v1/chat/completions", post(openai_chat))
        .route("/detokenize", post(detokenize))
        .route("/apply-template", post(apply_template))
        .route("/fake/fault", post(set_fault))
        .with_state(engine);
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
        "engine": arguments.engine,
        "url": url,
        "pid": std::process::id(),
        "slots": arguments.slots,
        "model_ref": arguments.model,
    });
    std::fs::create_dir_all(dir)?;
    let temporary = dir.join(format!(".{pool}-{replica}.tmp"));
    std::fs::write(&temporary, handoff.to_string())?;
    std::fs::rename(&temporary, dir.join(format!("{pool}-{replica}.json")))
}

async fn health(State(engine): State<Arc<Engine>>) -> Response {
    if matches!(*engine.fault.lock(), Fault::Unhealthy) {
        return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"error": {"message": "Loading model"}})))
            .into_response();
    }
    Json(json!({"status": "ok"})).into_response()
}

async fn props(State(engine): State<Arc<Engine>>) -> Json<Value> {
    Json(json!({
        "total_slots": engine.slots.total(),
        "default_generation_settings": { "n_ctx": 8192 },
        "build_info": "fake",
    }))
}

async fn slots(State(engine): State<Arc<Engine>>) -> Json<Value> {
    let busy = engine.slots.busy();
    Json((0..engine.slots.total()).map(|n| json!({"id": n, "is_processing": n < busy})).collect())
}

async fn metrics(State(engine): State<Arc<Engine>>) -> String {
    let (busy, waiting) = (engine.slots.busy(), engine.slots.waiting());
    format!("llamacpp:requests_processing {busy}\nllamacpp:requests_deferred {waiting}\n")
}

async fn models(State(engine): State<Arc<Engine>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [{"id": engine.model, "object": "model"}]}))
}

async fn detokenize(Json(body): Json<Value>) -> Json<Value> {
    let words = body["tokens"].as_array().into_iter().flatten().filter_map(Value::as_u64);
    Json(json!({"content": words.map(|n| format!("w{n} ")).collect::<String>()}))
}

async fn apply_template(Json(body): Json<Value>) -> Json<Value> {
    let texts = body["messages"].as_array().into_iter().flatten();
    let texts = texts.filter_map(|message| message["content"].as_str());
    Json(json!({"prompt": texts.map(|text| format!("<{text}>")).collect::<String>()}))
}

async fn set_fault(State(engine): State<Arc<Engine>>, Json(fault): Json<Fault>) -> StatusCode {
    *engine.fault.lock() = fault;
    StatusCode::NO_CONTENT
}

async fn completion(State(engine): State<Arc<Engine>>, Json(body): Json<Value>) -> Response {
    let tokens = body["n_predict"].as_u64().unwrap_or(DEFAULT_TOKENS);
    stream::answer(engine, Dialect::Llama, tokens, stream::first_word(&body["prompt"])).await
}

async fn openai_completion(State(engine): State<Arc<Engine>>, Json(body): Json<Value>) -> Response {
    let tokens = body["max_tokens"].as_u64().unwrap_or(DEFAULT_TOKENS);
    stream::answer(engine, Dialect::Completion, tokens, stream::first_word(&body["prompt"])).await
}

async fn openai_chat(State(engine): State<Arc<Engine>>, Json(body): Json<Value>) -> Response {
    let tokens = body["max_tokens"].as_u64().unwrap_or(DEFAULT_TOKENS);
    stream::answer(engine, Dialect::Chat, tokens, 0).await
}
