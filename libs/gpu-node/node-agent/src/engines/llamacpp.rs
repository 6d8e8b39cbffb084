//! llama.cpp's own HTTP server.
//!
//! Prompts go to its native `/completion`, messages to its `/v1/chat/completions`. It ignores
//! the model's name, queues beyond its slots without a word, and says how busy it is in its
//! metrics and its slots.

use pool_registry_types::task::{FinishReason, KvHint, Resume, ResumeMode, TaskRequest};
use serde_json::{Value, json};

use super::{
    EngineFacts, EngineRequest, NotReady, Reply, Said, gauges, get_json, health, model_names, openai,
    said_error, tokens_left,
};

/// What `/completion` cannot take as it is: messages, and what was sent before.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Preparation {
    /// To be written out by the model's own template; absent where there is a prompt.
    messages: Option<Value>,
    prompt: String,
    sent: Option<Resume>,
}

/// What is read of the last event; all of it would repeat the prompt and the settings.
const READ: [&str; 6] = ["content", "stop", "stop_type", "tokens", "tokens_predicted", "error"];

/// Longest wait for a question that precedes the request.
const PREPARATION_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

impl Preparation {
    /// Fills in the body's prompt. Returns an answer of the engine that is a refusal.
    pub(super) async fn complete(
        self,
        client: &reqwest::Client,
        url: &str,
        body: &mut Value,
    ) -> Result<Option<reqwest::Response>, reqwest::Error> {
        let ask = |path: &str, question: Value| {
            client.post(format!("{url}{path}")).timeout(PREPARATION_TIMEOUT).json(&question).send()
        };
        let mut prompt = self.prompt;
        if let Some(messages) = self.messages {
            let answer = ask("/apply-template", json!({ "messages": messages })).await?;
            if !answer.status().is_success() {
                return Ok(Some(answer));
            }
            let written: Value = answer.json().await?;
            prompt = written["prompt"].as_str().unwrap_or_default().to_owned();
        }
        let Some(sent) = self.sent else {
            body["prompt"] = json!(prompt);
            return Ok(None);
        };
        // The very tokens are better than their text, which may be cut into others; but only
        // where they are all there.
        let mut whole = false;
        if !sent.token_ids.is_empty() {
            let answer = ask("/detokenize", json!({ "tokens": sent.token_ids })).await?;
            let text: Value = if answer.status().is_success() { answer.json().await? } else { Value::Null };
            whole = text["content"] == sent.text;
        }
        body["prompt"] = if whole {
            let ids = sent.token_ids.iter().map(|id| json!(id));
            std::iter::once(json!(prompt)).chain(ids).collect()
        } else {
            json!(prompt + &sent.text)
        };
        Ok(None)
    }
}

pub(super) fn request(task: &TaskRequest, ctx_max: Option<u32>, sent: Option<&Resume>) -> EngineRequest {
    let continues = task.continuation() == Some(ResumeMode::Append);
    let cold = (task.kv_hint == KvHint::Cold).then_some(false);
    if task.prompt.is_none() && !continues {
        let mut request = openai::chat(task);
        openai::set(&mut request.body, "top_k", task.top_k);
        openai::set(&mut request.body, "min_p", task.min_p);
        openai::set(&mut request.body, "grammar", task.grammar.clone());
        openai::set(&mut request.body, "cache_prompt", cold);
        return request;
    }
    let prompt = task.prompt.clone().unwrap_or_default();
    let mut body = json!({ "prompt": prompt, "stream": true, "response_fields": READ });
    openai::set(&mut body, "n_predict", tokens_left(task, ctx_max, sent));
    openai::set(&mut body, "seed", task.seed);
    openai::set(&mut body, "temperature", task.temperature);
    openai::set(&mut body, "top_p", task.top_p);
    openai::set(&mut body, "top_k", task.top_k);
    openai::set(&mut body, "min_p", task.min_p);
    openai::set(&mut body, "grammar", task.grammar.clone());
    openai::set(&mut body, "cache_prompt", cold);
    openai::set(&mut body, "return_tokens", continues.then_some(true));
    if !task.stop.is_empty() {
        body["stop"] = json!(task.stop);
    }
    let messages = task.messages.as_ref().map(|messages| json!(messages));
    let incomplete = messages.is_some() || sent.is_some();
    let preparation = incomplete.then(|| Preparation { messages, prompt, sent: sent.cloned() });
    EngineRequest {
        path: "/completion".into(),
        body,
        reply: Reply::LlamaCompletion,
        preparation,
        wants_ids: continues,
    }
}

/// The parts of an event of `/completion` that matter.
#[derive(Debug, serde::Deserialize)]
struct Event<'a> {
    #[serde(default, borrow)]
    content: Option<std::borrow::Cow<'a, str>>,
    #[serde(default)]
    stop: bool,
    #[serde(default)]
    tokens_predicted: u64,
    #[serde(default, borrow)]
    stop_type: Option<std::borrow::Cow<'a, str>>,
    #[serde(default)]
    error: Option<Value>,
}

pub(super) fn read(data: &str) -> Said {
    let event: Event<'_> = match serde_json::from_str(data) {
        Ok(event) => event,
        Err(error) => return Said::Failed(format!("unreadable event: {error}")),
    };
    if let Some(error) = event.error {
        return said_error(None, &json!({ "error": error }));
    }
    let text = event.content.filter(|text| !text.is_empty()).map(std::borrow::Cow::into_owned);
    if event.stop {
        let limit = event.stop_type.is_some_and(|reason| reason == "limit");
        let finish_reason = if limit { FinishReason::Length } else { FinishReason::Stop };
        return Said::End { text, tokens_out: event.tokens_predicted, finish_reason };
    }
    text.map_or(Said::Nothing, Said::Text)
}

/// The ids of the tokens of an event, and the count of all so far; none where it does not say.
pub(super) fn token_ids(data: &str) -> (Vec<u32>, u64) {
    #[derive(serde::Deserialize)]
    struct Tokens {
        #[serde(default)]
        tokens: Vec<u32>,
        #[serde(default)]
        tokens_predicted: u64,
    }
    serde_json::from_str::<Tokens>(data)
        .map(|event| (event.tokens, event.tokens_predicted))
        .unwrap_or_default()
}

pub(super) async fn probe(
    client: &reqwest::Client,
    url: &str,
) -> Result<(EngineFacts, Option<u32>), NotReady> {
    health(client, url, Some(503)).await?;
    let props = get_json(client, format!("{url}/props")).await.map_err(|e| format!("/props: {e}"))?;
    let models =
        get_json(client, format!("{url}/v1/models")).await.map_err(|e| format!("/v1/models: {e}"))?;
    let number = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
    let facts = EngineFacts {
        models: model_names(&models),
        slots: number(&props["total_slots"]),
        ctx_max: number(&props["default_generation_settings"]["n_ctx"]),
        version: props["build_info"].as_str().map(str::to_owned),
    };
    Ok((facts, busy(client, url).await))
}

/// From the gauges; from the slots where the gauges are off.
pub(super) async fn busy(client: &reqwest::Client, url: &str) -> Option<u32> {
    let told = gauges::busy(client, url, "llamacpp:requests_processing", "llamacpp:requests_deferred").await;
    if told.is_some() {
        return told;
    }
    let slots = get_json(client, format!("{url}/slots")).await.ok()?;
    let busy = slots.as_array()?.iter().filter(|slot| slot["is_processing"] == true).count();
    u32::try_from(busy).ok()
}

#[cfg(test)]
mod tests {
    use pool_registry_types::ModelRef;

    use super::*;

    // CLOUD-1517
    #[test]
    fn a_prompt_goes_to_the_native_completion_bounded_by_the_context() {
        let task = TaskRequest {
            seed: Some(1),
            temperature: Some(0.0),
            stop: vec!["\n".into()],
            ..TaskRequest::completion(ModelRef::new("m").unwrap(), "hi")
        };
        let request = request(&task, Some(64), None);
        assert_eq!((&*request.path, &request.preparation), ("/completion", &None));
        let expected = json!({"prompt":"hi","stream":true,"response_fields":READ,"n_predict":64,"seed":1,"temperature":0.0,"stop":["\n"]});
        assert_eq!(request.body, expected);
    }

    // CLOUD-1534
    #[test]
    fn what_was_sent_lowers_the_bound_and_ids_are_asked_for_when_the_stream_may_go_on() {
        use pool_registry_types::task::{ChatMessage, Recovery, Role};
        let task = TaskRequest {
            recovery: Recovery::Continue,
            max_tokens: Some(10),
            ..TaskRequest::completion(ModelRef::new("m").unwrap(), "hi")
        };
        let first = request(&task, None, None);
        assert_eq!((&first.body["return_tokens"], first.wants_ids), (&json!(true), true));
        let sent = Resume { mode: ResumeMode::Append, text: " a b".into(), token_ids: vec![1, 2], tokens: 2 };
        let second = request(&task, None, Some(&sent));
        assert_eq!(second.body["n_predict"], 8);
        assert_eq!(second.preparation.unwrap().sent, Some(sent));
        let message = ChatMessage { role: Role::User, content: "hi".into() };
        let chat = TaskRequest { prompt: None, messages: Some(vec![message]), ..task };
        assert_eq!(request(&chat, None, None).path, "/completion", "its own template, written out");
        let event = r#"{"content":" a","tokens":[7],"stop":false,"tokens_predicted":3}"#;
        assert_eq!(token_ids(event), (vec![7], 3));
    }

    // CLOUD-1517
    #[test]
    fn the_last_event_may_carry_a_text_and_counts_the_tokens() {
        assert_eq!(read(r#"{"content":" a","stop":false}"#), Said::Text(" a".into()));
        assert_eq!(read(r#"{"content":"","stop":false}"#), Said::Nothing);
        let end = r#"{"content":" z","stop":true,"stop_type":"limit","tokens_predicted":8}"#;
        let said = Said::End { text: Some(" z".into()), tokens_out: 8, finish_reason: FinishReason::Length };
        assert_eq!(read(end), said);
        assert!(matches!(read(r#"{"error":{"message":"out of memory"}}"#), Said::Failed(_)));
        assert!(matches!(read("{"), Said::Failed(_)));
    }
}
