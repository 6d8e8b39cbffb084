//! What each engine that it can be answers, and says of itself.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Json, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use crate::engine::{CONTEXT, Engine, Kind};
use crate::fault::Fault;
use crate::{answers, generation, stream};

/// What an engine of this kind answers, and nothing else.
pub(crate) fn routes(kind: Kind) -> Router<Arc<Engine>> {
    let openai = || -> Router<Arc<Engine>> {
        Router::new()
            .route("/v1/models", get(models))
            .route("/v1/completions", post(generation::openai_completion))
            .route("/v1/chat/completions", post(generation::openai_chat))
            .route("/v1/embeddings", post(answers::embeddings))
            .route("/v1/rerank", post(answers::rerank))
    };
    let health = || Router::new().route("/health", get(health)).route("/metrics", get(metrics));
    match kind {
        Kind::Llamacpp => openai()
            .merge(health())
            .route("/v1/messages", post(generation::messages))
            .route("/props", get(props))
            .route("/slots", get(slots))
            .route("/completion", post(generation::completion))
            .route("/detokenize", post(detokenize))
            .route("/apply-template", post(apply_template)),
        Kind::Vllm => openai().merge(health()).route("/version", get(version)),
        Kind::Tgi => health()
            .route("/info", get(info))
            .route("/generate_stream", post(generation::tgi))
            .route("/v1/chat/completions", post(generation::openai_chat)),
        Kind::Triton => Router::new()
            .route("/v2", get(server))
            .route("/v2/health/ready", get(health_of_triton))
            .route("/v2/models/{model}/ready", get(model_ready))
            .route("/v2/repository/index", post(repository))
            .route("/v2/models/{model}/generate_stream", post(generation::triton)),
        Kind::Openai => openai(),
    }
}

fn unhealthy(engine: &Engine) -> bool {
    *engine.fault.lock() == Fault::Unhealthy
}

/// Waits as long as a busy engine does.
async fn wait_health(engine: &Engine) {
    let fault = *engine.fault.lock();
    if let Fault::Busy { health_ms } = fault {
        tokio::time::sleep(std::time::Duration::from_millis(health_ms)).await;
    }
}

/// How busy it is an engine says between two batches, which a busy one never comes to.
async fn wait_batch(engine: &Engine) {
    let fault = *engine.fault.lock();
    if matches!(fault, Fault::Busy { .. }) {
        std::future::pending::<()>().await;
    }
}

async fn health(State(engine): State<Arc<Engine>>) -> Response {
    wait_health(&engine).await;
    match engine.kind {
        Kind::Llamacpp if unhealthy(&engine) => {
            let body = json!({"error": {"message": "Loading model"}});
            (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
        }
        Kind::Tgi if unhealthy(&engine) => {
            let body = json!({"error": "unhealthy", "error_type": "healthcheck"});
            (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
        }
        _ if unhealthy(&engine) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Kind::Llamacpp => Json(json!({"status": "ok"})).into_response(),
        _ => StatusCode::OK.into_response(),
    }
}

async fn metrics(State(engine): State<Arc<Engine>>) -> String {
    wait_batch(&engine).await;
    let (busy, waiting) = (engine.slots.busy(), engine.slots.waiting());
    let model = &engine.model;
    match engine.kind {
        Kind::Vllm => format!(
            "# TYPE vllm:num_requests_running gauge\n\
             vllm:num_requests_running{{engine=\"0\",model_name=\"{model}\"}} {busy}.0\n\
             vllm:num_requests_waiting{{engine=\"0\",model_name=\"{model}\"}} {waiting}.0\n\
             vllm:num_requests_waiting_by_reason{{engine=\"0\",model_name=\"{model}\",reason=\"capacity\"}} {waiting}.0\n"
        ),
        Kind::Tgi => format!(
            "# TYPE tgi_batch_current_size gauge\ntgi_batch_current_size {busy}\ntgi_queue_size {waiting}\n"
        ),
        _ => format!("llamacpp:requests_processing {busy}\nllamacpp:requests_deferred {waiting}\n"),
    }
}

async fn models(State(engine): State<Arc<Engine>>) -> Json<Value> {
    wait_health(&engine).await;
    let mut model = json!({"id": engine.model, "object": "model"});
    if engine.kind == Kind::Vllm {
        model["max_model_len"] = json!(CONTEXT);
    }
    Json(json!({"object": "list", "data": [model]}))
}

fn thinks(engine: &Engine) -> bool {
    matches!(*engine.fault.lock(), Fault::Thinks { .. })
}

async fn props(State(engine): State<Arc<Engine>>) -> Json<Value> {
    Json(json!({
        "total_slots": engine.slots.total(),
        "default_generation_settings": { "n_ctx": CONTEXT },
        "build_info": "fake",
        "chat_template": if thinks(&engine) { "{{ messages }}<think>\n{# until </think> #}" } else { "{{ messages }}" },
    }))
}

async fn slots(State(engine): State<Arc<Engine>>) -> Json<Value> {
    wait_batch(&engine).await;
    let busy = engine.slots.busy();
    Json((0..engine.slots.total()).map(|n| json!({"id": n, "is_processing": n < busy})).collect())
}

async fn detokenize(Json(body): Json<Value>) -> Json<Value> {
    let words = body["tokens"].as_array().into_iter().flatten().filter_map(Value::as_u64);
    Json(json!({"content": words.map(stream::text_of).collect::<String>()}))
}

async fn apply_template(State(engine): State<Arc<Engine>>, Json(body): Json<Value>) -> Json<Value> {
    let texts = body["messages"].as_array().into_iter().flatten();
    let texts = texts.filter_map(|message| message["content"].as_str());
    let open = if thinks(&engine) { "<think>\n" } else { "" };
    Json(json!({"prompt": texts.map(|text| format!("<{text}>")).collect::<String>() + open}))
}

async fn version() -> Json<Value> {
    Json(json!({"version": "fake"}))
}

async fn info(State(engine): State<Arc<Engine>>) -> Json<Value> {
    Json(json!({
        "model_id": engine.model,
        "version": "fake",
        "max_concurrent_requests": engine.slots.total(),
        "max_batch_size": null,
        "max_input_tokens": CONTEXT - 1,
        "max_total_tokens": CONTEXT,
    }))
}

async fn server() -> Json<Value> {
    Json(json!({"name": "triton", "version": "fake", "extensions": ["generate", "model_repository"]}))
}

async fn health_of_triton(State(engine): State<Arc<Engine>>) -> StatusCode {
    if unhealthy(&engine) { StatusCode::BAD_REQUEST } else { StatusCode::OK }
}

async fn model_ready(State(engine): State<Arc<Engine>>, Path(model): Path<String>) -> StatusCode {
    if model == engine.model { StatusCode::OK } else { StatusCode::BAD_REQUEST }
}

/// An ensemble is listed beside the parts of which it is made.
async fn repository(State(engine): State<Arc<Engine>>) -> Json<Value> {
    let names = [engine.model.as_str(), "preprocessing", "tensorrt_llm", "postprocessing"];
    Json(names.into_iter().map(|name| json!({"name": name, "version": "1", "state": "READY"})).collect())
}
