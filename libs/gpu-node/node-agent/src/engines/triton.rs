//! Triton with its generate extension, before TensorRT-LLM's `ensemble`.
//!
//! What a model takes is its own affair there; the names are those of TensorRT-LLM's ensemble, at
//! the top of the body. (vLLM behind Triton takes others: run it as `vllm`, or behind Triton's own
//! OpenAI server as `openai`.) The model's name stands in the path, so a task's `model_ref` is the
//! name of the folder in Triton's repository, and the handoff must give it: the repository also
//! lists the parts of which an ensemble is made.
//!
//! The stream has no end marker: it just ends. It is whole when the HTTP message ends as such
//! messages end, with its last chunk, after at least one event. An engine that dies breaks the
//! connection inside the message, which is told apart; one that gives up and still closes its
//! message in order, without the error event that it should write, is not, and counts as done. It
//! does not say why it ended either: an answer of as many pieces as it may have tokens was cut.

use futures::FutureExt;
use pool_registry_types::engines::capabilities;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::{ErrorBody, ErrorCode, ModelRef};
use serde_json::{Value, json};

use super::answer::{EngineEvent, Reader, Reply, text_of};
use super::client::{MAX_ERROR_BYTES, percent_encoded};
use super::dialect::{Asked, Dialect, EngineFacts, EngineRequest, Look, NotReady};
use super::json::{Object, document, set};
use super::thoughts::Delta;

pub(super) static DIALECT: Dialect = Dialect {
    capabilities: capabilities(EngineKind::Triton),
    request,
    health: |look| health(look).boxed(),
    facts: |look| facts(look).boxed(),
    // How busy it is stands in metrics on another port, which the handoff does not name.
    busy: None,
    command_line: |_| {
        let mut args = vec!["--model-repository", "{model_path}", "--http-address", "127.0.0.1"];
        args.extend(["--http-port", "{port}", "--allow-grpc", "false", "--allow-metrics", "false"]);
        args.into_iter().map(str::to_owned).collect()
    },
    key_flag: None,
    quiet: None,
};

/// `/generate_stream`: ends by closing.
pub(super) static GENERATE: Reply = Reply {
    name: "Triton's generate_stream",
    is_document: false,
    ends_by_closing: true,
    read,
    token_ids: None,
};

fn request(asked: &Asked<'_>) -> Result<EngineRequest, ErrorBody> {
    let Asked { task, sent, .. } = *asked;
    let Some(max_tokens) = asked.tokens_left() else {
        let message = "max_tokens: required here, neither the task nor the handoff bounds the answer";
        return Err(ErrorBody::new(ErrorCode::Unsupported, message));
    };
    let prompt = task.prompt.clone().unwrap_or_default();
    let mut body = json!({
        "text_input": sent.map_or_else(|| prompt.clone(), |sent| format!("{prompt}{}", sent.text)),
        "stream": true,
        "exclude_input_in_output": true,
        "max_tokens": max_tokens,
    });
    match task.temperature {
        Some(0.0) => body["top_k"] = json!(1),
        temperature => {
            set(&mut body, "temperature", temperature);
            set(&mut body, "top_k", task.top_k.filter(|k| *k > 0));
            // Without either limit it takes the most probable token, whatever the temperature.
            let unlimited = temperature.filter(|_| task.top_k.is_none_or(|k| k == 0)).map(|_| 1.0);
            set(&mut body, "top_p", task.top_p.or(unlimited));
        }
    }
    // Renamed once; what is no input of the model is passed over.
    set(&mut body, "seed", task.seed);
    set(&mut body, "random_seed", task.seed);
    if !task.stop.is_empty() {
        body["stop_words"] = json!(task.stop);
    }
    let path = format!("/v2/models/{}/generate_stream", percent_encoded(asked.model));
    Ok(EngineRequest::whole(path, body, &GENERATE))
}

fn read(_: &mut Reader, event: &Object<'_>) -> EngineEvent {
    // A tensor of one element is written as the element, and one of several as a list.
    let text = event.get("text_output");
    let text = text.text().unwrap_or_else(|| text_of(text.first()));
    EngineEvent::Delta(Delta::text(text))
}

async fn health(look: &Look<'_>) -> Result<(), NotReady> {
    let ready = async |path: &str| -> Result<bool, NotReady> {
        let answer = look.client.get(look.at, path).await?;
        let status = answer.status();
        let _ = answer.bytes(MAX_ERROR_BYTES).await;
        match status {
            200..=299 => Ok(true),
            // Its word for not yet, of the server and of a model.
            400 | 503 => Ok(false),
            other => Err(NotReady::Failed(format!("{path}: HTTP {other}"))),
        }
    };
    if !ready("/v2/health/ready").await? {
        return Err(NotReady::Loading);
    }
    for model in look.models {
        if !ready(&format!("/v2/models/{}/ready", percent_encoded(model.as_str()))).await? {
            return Err(NotReady::Failed(not_ready(look, model).await));
        }
    }
    Ok(())
}

async fn facts(look: &Look<'_>) -> Result<EngineFacts, NotReady> {
    let server = look.json("/v2").await?;
    let version = server["version"].as_str().map(str::to_owned);
    Ok(EngineFacts { version, ..EngineFacts::default() })
}

/// Why a model is not ready, as the repository has it.
async fn not_ready(look: &Look<'_>, model: &ModelRef) -> String {
    let index = look.client.post(look.at, "/v2/repository/index", &json!({})).await;
    let index = match index {
        Ok(answer) => answer.bytes(MAX_INDEX_BYTES).await.unwrap_or_default(),
        Err(_) => Default::default(),
    };
    why_not(&document(&index).unwrap_or_default(), model)
}

/// Longest list of a repository that is read, bytes.
const MAX_INDEX_BYTES: usize = 1024 * 1024;

fn why_not(index: &Value, model: &ModelRef) -> String {
    let listed = || index.as_array().into_iter().flatten();
    match listed().find(|entry| entry["name"] == model.as_str()) {
        Some(entry) => {
            let word = |name: &str| entry[name].as_str().unwrap_or_default();
            format!("model {model} is {} {}", word("state"), word("reason")).trim_end().to_owned()
        }
        None => {
            let names: Vec<&str> = listed().filter_map(|entry| entry["name"].as_str()).collect();
            format!("model {model} is not in its repository, which has: {}", names.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use pool_registry_types::task::{Resume, ResumeMode, TaskRequest};

    use super::*;

    fn asked(
        task: &TaskRequest,
        ctx_max: Option<u32>,
        sent: Option<&Resume>,
    ) -> Result<EngineRequest, ErrorBody> {
        request(&Asked { task, model: "org/m", ctx_max, sent })
    }

    fn task() -> TaskRequest {
        TaskRequest::completion(ModelRef::new("org/m").unwrap(), "hi")
    }

    // CLOUD-2480
    #[test]
    fn the_model_is_in_the_path_and_the_options_are_at_the_top() {
        let task = TaskRequest {
            max_tokens: Some(8),
            temperature: Some(0.7),
            seed: Some(3),
            stop: vec!["\n".into()],
            ..task()
        };
        let request = asked(&task, None, None).unwrap();
        assert_eq!(request.path, "/v2/models/org%2Fm/generate_stream");
        let expected = json!({"text_input":"hi","stream":true,"exclude_input_in_output":true,"max_tokens":8,"temperature":0.7,"top_p":1.0,"seed":3,"random_seed":3,"stop_words":["\n"]});
        assert_eq!(request.body, expected);
    }

    // CLOUD-2480
    #[test]
    fn the_answer_is_bounded_or_refused() {
        assert_eq!(asked(&task(), None, None).unwrap_err().code, ErrorCode::Unsupported);
        let sent = Resume {
            mode: ResumeMode::Append,
            text: " a".into(),
            reasoning: String::new(),
            token_ids: vec![],
            tokens: 1,
        };
        let goes_on = asked(&task(), Some(64), Some(&sent)).unwrap();
        assert_eq!((&goes_on.body["max_tokens"], &goes_on.body["text_input"]), (&json!(63), &json!("hi a")));
        let greedy = TaskRequest { temperature: Some(0.0), top_p: Some(0.5), ..task() };
        let greedy = asked(&greedy, Some(64), None).unwrap();
        assert_eq!((&greedy.body["top_k"], &greedy.body["top_p"]), (&json!(1), &Value::Null));
    }

    // CLOUD-2485
    #[test]
    fn a_model_that_is_not_there_is_named_with_those_that_are() {
        let index = json!([{"name": "ensemble", "state": "READY"}, {"name": "m", "state": "UNAVAILABLE", "reason": "no file"}]);
        assert_eq!(why_not(&index, &ModelRef::new("m").unwrap()), "model m is UNAVAILABLE no file");
        assert!(why_not(&index, &ModelRef::new("x").unwrap()).ends_with("which has: ensemble, m"));
    }
}
