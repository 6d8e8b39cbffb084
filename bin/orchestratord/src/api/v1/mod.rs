//! The routes of OpenAI's and Anthropic's clients: bodies go to an engine as they came, and its answers
//! come back so.
//!
//! A request that takes a slot is a task like any other, in the same queue and with the same tries; only
//! nobody reads its payload, and its answer is given to whoever asked, or comes with its key, and to nobody
//! else. What is read of a body is the crate `openai-gateway`'s.

mod answer;
mod document;
mod errors;
mod models;
mod passed_events;
mod reader;
mod request;
mod running;
mod slotless;
mod streamed;
mod whole;

use axum::extract::State;
use axum::response::Response;
use daemon_kit::ApiError;
use task_stream::OpenAiRoute;

use crate::app::state::AppState;
use crate::services::streams::Claim;
use request::Call;
use running::Running;

pub(crate) use errors::{GatewayError, is_ours, shape};
pub(crate) use models::{__path_get, __path_list, get, list};

/// One route of an engine, as a handler with its document.
macro_rules! routes {
    ($params:tt $($(#[$doc:meta])* $name:ident, $route:ident, $path:literal;)*) => {
        $(
            $(#[$doc])*
            #[utoipa::path(post, path = $path, tag = "openai", request_body = serde_json::Value, params $params,
                responses((status = 200, description = "as the engine answers"),
                    (status = "4XX", description = "as the engine answers, or ours", body = GatewayError),
                    (status = "5XX", description = "as the engine answers, or ours", body = GatewayError)))]
            pub(crate) async fn $name(State(state): State<AppState>, call: Call) -> Result<Response, ApiError> {
                pass(&state, OpenAiRoute::$route, call).await
            }
        )*
    };
}

routes! {
    (("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible characters: the same request with the same key has the same answer, while its task runs and for the retention after it has completed; another request is refused with 409."))

    /// Answers a chat in OpenAI's language.
    chat_completions, ChatCompletions, "/v1/chat/completions";
    /// Continues a text in OpenAI's language.
    completions, Completions, "/v1/completions";
    /// Makes the vectors of texts in OpenAI's language.
    embeddings, Embeddings, "/v1/embeddings";
    /// Ranks documents by how much they say to a query.
    rerank, Rerank, "/v1/rerank";
    /// Answers a chat in Anthropic's language.
    messages, Messages, "/v1/messages";
    /// Answers a turn in the language of OpenAI's responses.
    responses, Responses, "/v1/responses";
}

routes! {
    ()

    /// Counts the tokens of a chat in Anthropic's language.
    count_tokens, CountTokens, "/v1/messages/count_tokens";
    /// Shows the tokens of a text.
    tokenize, Tokenize, "/tokenize";
    /// Shows the text of tokens.
    detokenize, Detokenize, "/detokenize";
    /// Shows a chat as its model is given it.
    apply_template, ApplyTemplate, "/apply-template";
}

async fn pass(state: &AppState, route: OpenAiRoute, call: Call) -> Result<Response, ApiError> {
    if !route.takes_slot() {
        return slotless::answer(state, route, call).await;
    }
    let (running, wants_stream) = begin(state, route, call).await?;
    if wants_stream { streamed::answer(running, route).await } else { whole::answer(running).await }
}

/// Submits the request, or comes to the task that its key names; and whether its client asked for a stream.
async fn begin(state: &AppState, route: OpenAiRoute, call: Call) -> Result<(Running, bool), ApiError> {
    let key = match call.idempotency_key()? {
        None => None,
        Some(key) => {
            let holder = call.holder();
            match state.keys.claim((holder, key), call.digest(route)).await? {
                Claim::New(held) => Some(held),
                Claim::Attached { task_id, streams, place } => {
                    return Ok((Running::attached(state, holder, task_id, place), streams));
                }
            }
        }
    };
    let admitted = request::admit(state, route, call).await?;
    let wants_stream = admitted.stream;
    Ok((running::submit(state, admitted, key).await?, wants_stream))
}
