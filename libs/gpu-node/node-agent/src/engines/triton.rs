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

use std::fmt::Write;

use pool_registry_types::task::{Resume, TaskRequest};
use pool_registry_types::{ErrorBody, ErrorCode, ModelRef};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    EngineFacts, EngineRequest, NotReady, Reply, Said, describe, get_json, openai, said_error, tokens_left,
};

pub(super) fn request(
    task: &TaskRequest,
    ctx_max: Option<u32>,
    sent: Option<&Resume>,
) -> Result<EngineRequest, ErrorBody> {
    let Some(max_tokens) = tokens_left(task, ctx_max, sent) else {
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
            openai::set(&mut body, "temperature", temperature);
            openai::set(&mut body, "top_k", task.top_k.filter(|k| *k > 0));
            // Without either limit it takes the most probable token, whatever the temperature.
            let unlimited = temperature.filter(|_| task.top_k.is_none_or(|k| k == 0)).map(|_| 1.0);
            openai::set(&mut body, "top_p", task.top_p.or(unlimited));
        }
    }
    // Renamed once; what is no input of the model is passed over.
    openai::set(&mut body, "seed", task.seed);
    openai::set(&mut body, "random_seed", task.seed);
    if !task.stop.is_empty() {
        body["stop_words"] = json!(task.stop);
    }
    let path = format!("/v2/models/{}/generate_stream", in_path(&task.model_ref));
    Ok(EngineRequest::whole(path, body, Reply::Triton))
}

/// A model's name as one segment of a path.
fn in_path(model: &ModelRef) -> String {
    model.as_str().bytes().fold(String::new(), |mut path, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            path.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(path, "%{byte:02X}");
        }
        path
    })
}

#[derive(Debug, Deserialize)]
struct Event {
    #[serde(default)]
    text_output: Option<Value>,
    #[serde(default)]
    error: Option<Value>,
}

pub(super) fn read(data: &str) -> Said {
    let event: Event = match serde_json::from_str(data) {
        Ok(event) => event,
        Err(error) => return Said::Failed(format!("unreadable event: {error}")),
    };
    if let Some(error) = event.error {
        return said_error(None, &json!({ "error": error }));
    }
    // A tensor of one element is written as the element, and one of several as a list.
    let text = match event.text_output {
        Some(Value::Array(mut texts)) if !texts.is_empty() => texts.swap_remove(0),
        Some(text) => text,
        None => Value::Null,
    };
    match text {
        Value::String(text) if !text.is_empty() => Said::Text(text),
        _ => Said::Nothing,
    }
}

pub(super) async fn probe(
    client: &reqwest::Client,
    url: &str,
    models: &[ModelRef],
) -> Result<(EngineFacts, Option<u32>), NotReady> {
    let ready = async |path: String| -> Result<bool, String> {
        let answer = client.get(format!("{url}{path}")).send().await.map_err(describe)?;
        match answer.status().as_u16() {
            200..=299 => Ok(true),
            // Its word for not yet, of the server and of a model.
            400 | 503 => Ok(false),
            other => Err(format!("{path}: HTTP {other}")),
        }
    };
    if !ready("/v2/health/ready".to_owned()).await? {
        return Err(NotReady::Loading);
    }
    for model in models {
        if !ready(format!("/v2/models/{}/ready", in_path(model))).await? {
            return Err(NotReady::Failed(not_ready(client, url, model).await));
        }
    }
    let server = get_json(client, format!("{url}/v2")).await.map_err(|e| format!("/v2: {e}"))?;
    let version = server["version"].as_str().map(str::to_owned);
    // How busy it is stands in metrics on another port, which the handoff does not name.
    Ok((EngineFacts { version, ..EngineFacts::default() }, None))
}

/// Why a model is not ready, as the repository has it.
async fn not_ready(client: &reqwest::Client, url: &str, model: &ModelRef) -> String {
    let index = async {
        let asked = client.post(format!("{url}/v2/repository/index")).json(&json!({}));
        asked.send().await.ok()?.json::<Value>().await.ok()
    };
    let index = index.await.unwrap_or_default();
    why_not(&index, model)
}

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
    use pool_registry_types::task::ResumeMode;

    use super::*;

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
        let request = request(&task, None, None).unwrap();
        assert_eq!(request.path, "/v2/models/org%2Fm/generate_stream");
        let expected = json!({"text_input":"hi","stream":true,"exclude_input_in_output":true,"max_tokens":8,"temperature":0.7,"top_p":1.0,"seed":3,"random_seed":3,"stop_words":["\n"]});
        assert_eq!(request.body, expected);
    }

    // CLOUD-2480
    #[test]
    fn the_answer_is_bounded_or_refused() {
        assert_eq!(request(&task(), None, None).unwrap_err().code, ErrorCode::Unsupported);
        let sent = Resume { mode: ResumeMode::Append, text: " a".into(), token_ids: vec![], tokens: 1 };
        let goes_on = request(&task(), Some(64), Some(&sent)).unwrap();
        assert_eq!((&goes_on.body["max_tokens"], &goes_on.body["text_input"]), (&json!(63), &json!("hi a")));
        let greedy = TaskRequest { temperature: Some(0.0), top_p: Some(0.5), ..task() };
        let greedy = request(&greedy, Some(64), None).unwrap();
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
