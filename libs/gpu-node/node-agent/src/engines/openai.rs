//! Any server with OpenAI's API: `/v1/completions`, `/v1/chat/completions`, `/v1/models`.
//!
//! The stream says why it ends and then `[DONE]`; servers of the field leave out either. They do not
//! say how busy they are.

use std::borrow::Cow;
use std::collections::BTreeMap;

use futures::FutureExt;
use pool_registry_types::engines::capabilities;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::task::FinishReason;
use pool_registry_types::{ErrorBody, ModelRef};
use serde_json::{Value, json};

use super::answer::{EngineEvent, Reader, Reply, text_of};
use super::dialect::{Asked, Dialect, EngineFacts, EngineRequest, Look, NotReady, tokens_left};
use super::json::{Json, Object, positive, set};
use super::thoughts::Delta;

pub(super) static DIALECT: Dialect = Dialect {
    capabilities: capabilities(EngineKind::OpenAi),
    request,
    // Its list of models shows it.
    health: |_| std::future::ready(Ok(())).boxed(),
    facts: |look| facts(look).boxed(),
    busy: None,
    // The file of pools must give its command line.
    command_line: |_| Vec::new(),
    key_flag: None,
    quiet: None,
};

/// `/v1/completions`.
pub(super) static COMPLETION: Reply =
    Reply { name: "OpenAI's completion", is_document: false, ends_by_closing: false, read, token_ids: None };
/// `/v1/chat/completions`.
pub(super) static CHAT: Reply =
    Reply { name: "OpenAI's chat", is_document: false, ends_by_closing: false, read, token_ids: None };

/// The names under which servers write thoughts, the first that says anything counts. Source:
/// llama.cpp, SGLang, TensorRT-LLM, LM Studio; vLLM, Ollama, OpenRouter; OpenRouter; Ollama.
const THOUGHTS: [&str; 4] = ["reasoning_content", "reasoning", "reasoning_details", "thinking"];

/// Names of one engine that are taken.
const MOST_MODELS: usize = 1024;

fn common(asked: &Asked<'_>, bound: Option<u64>) -> Value {
    let task = asked.task;
    let mut body = json!({
        "model": asked.model,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    set(&mut body, "max_tokens", bound);
    set(&mut body, "seed", task.seed);
    set(&mut body, "temperature", task.temperature);
    set(&mut body, "top_p", task.top_p);
    if !task.stop.is_empty() {
        body["stop"] = json!(task.stop);
    }
    body
}

pub(super) fn chat(asked: &Asked<'_>) -> EngineRequest {
    let mut body = common(asked, tokens_left(asked.task, None, None));
    body["messages"] = json!(asked.task.messages);
    EngineRequest::whole("/v1/chat/completions", body, &CHAT)
}

/// Goes on from the prompt, and from what was sent.
pub(super) fn text(asked: &Asked<'_>, prompt: &str, bound: Option<u64>) -> EngineRequest {
    let mut body = common(asked, bound);
    body["prompt"] =
        json!(asked.sent.map_or_else(|| prompt.to_owned(), |sent| format!("{prompt}{}", sent.text)));
    EngineRequest::whole("/v1/completions", body, &COMPLETION)
}

fn request(asked: &Asked<'_>) -> Result<EngineRequest, ErrorBody> {
    Ok(match &asked.task.prompt {
        // Some servers stop after 16 tokens when nothing is said.
        Some(prompt) => text(asked, prompt, asked.tokens_left()),
        None => chat(asked),
    })
}

fn read(reader: &mut Reader, event: &Object<'_>) -> EngineEvent {
    // Some count in every event, some write an empty or a wrong count last.
    let counted = event.get("usage").get("completion_tokens").count();
    reader.counted = counted.filter(|count| *count > 0).or(reader.counted);
    let choice = event.get("choices").first();
    let mut delta = Delta { thought: thought(reader, choice.get("delta")), text: String::new() };
    let written = choice.get("delta").get("content");
    let (content, text) = if written.is_given() { (written, true) } else { (choice.get("text"), false) };
    if text {
        parts(content, &mut delta);
    } else {
        delta.text = text_of(content).into_owned();
    }
    if delta.is_empty() && reader.is_empty() && !choice.get("delta").says_something() {
        // A whole answer in the place of a stream. Beside one it repeats what was sent.
        delta.thought = thought(reader, choice.get("message"));
        parts(choice.get("message").get("content"), &mut delta);
    }
    if let Some(reason) = choice.get("finish_reason").word() {
        if matches!(reason.as_ref(), "abort" | "error") {
            return EngineEvent::Failed(format!("it gave the request up: finish_reason {reason}"));
        }
        let cut = matches!(reason.as_ref(), "length" | "max_tokens" | "model_length");
        reader.finish_reason = Some(if cut { FinishReason::Length } else { FinishReason::Stop });
    }
    EngineEvent::Delta(delta)
}

/// The thoughts of a delta: under one name for the whole stream, since some servers write the same
/// under two.
fn thought(reader: &mut Reader, delta: Json<'_>) -> String {
    let reported = |name: &'static str| Some(text_of(delta.get(name))).filter(|text| !text.is_empty());
    if let Some(name) = reader.thought_field {
        return reported(name).map(Cow::into_owned).unwrap_or_default();
    }
    let Some((name, text)) = THOUGHTS.into_iter().find_map(|name| Some((name, reported(name)?))) else {
        return String::new();
    };
    reader.thought_field = Some(name);
    text.into_owned()
}

/// A content, which may be a list of parts, some of them thoughts.
fn parts(content: Json<'_>, delta: &mut Delta) {
    let thinks = |part: &Json<'_>| part.get("type").text().as_deref() == Some("thinking");
    if !content.items().any(|part| thinks(&part)) {
        delta.text.push_str(&text_of(content));
        return;
    }
    for part in content.items() {
        if thinks(&part) {
            delta.thought.push_str(&text_of(part.get("thinking")));
        } else {
            delta.text.push_str(&text_of(part));
        }
    }
}

async fn facts(look: &Look<'_>) -> Result<EngineFacts, NotReady> {
    let list = look.json("/v1/models").await?;
    let (models, own_model) = listed(&list);
    Ok(EngineFacts { models, own_model, ctx_max: context(&list), ..EngineFacts::default() })
}

/// What a list of models in OpenAI's form says: each name with the one that it goes by, and the
/// first model that is no adapter.
pub(super) fn listed(list: &Value) -> (BTreeMap<ModelRef, String>, Option<String>) {
    let mut names = BTreeMap::new();
    let mut own = None;
    for model in list["data"].as_array().into_iter().flatten().take(MOST_MODELS) {
        let Some(id) = model["id"].as_str() else { continue };
        if own.is_none() && model["parent"].is_null() {
            own = Some(id.to_owned());
        }
        let aliases = model["aliases"].as_array().into_iter().flatten().filter_map(Value::as_str);
        for name in std::iter::once(id).chain(aliases).filter_map(|name| ModelRef::new(name).ok()) {
            if names.len() < MOST_MODELS {
                names.entry(name).or_insert_with(|| id.to_owned());
            }
        }
    }
    (names, own)
}

/// The context of the first model that has one: adapters are listed without it.
pub(super) fn context(list: &Value) -> Option<u32> {
    let models = list["data"].as_array()?;
    models.iter().find_map(|model| positive(&model["max_model_len"]))
}

#[cfg(test)]
mod tests {
    use pool_registry_types::sse::Decoder;

    use super::*;

    fn reported(reply: &'static Reply, stream: &str) -> Vec<EngineEvent> {
        let (mut decoder, mut reader) = (Decoder::new(), Reader::new(reply, false));
        decoder.push(stream.as_bytes());
        let mut all = Vec::new();
        while let Some(frame) = decoder.next_frame().unwrap() {
            all.push(reader.read(&frame));
        }
        all.retain(|reported| {
            !matches!(reported, EngineEvent::Nothing) && *reported != EngineEvent::Delta(Delta::default())
        });
        all
    }

    // CLOUD-1518
    #[test]
    fn a_chat_starts_with_an_empty_chunk_and_ends_with_done() {
        let stream = concat!(
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":null}}]}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"Hi\"}}]}\n\n",
            "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"length\"}]}\n\n",
            "data: {\"choices\":[],\"usage\":{\"completion_tokens\":5}}\n\n",
            "data: [DONE]\n\n",
        );
        let end =
            EngineEvent::End { delta: Delta::default(), tokens_out: 5, finish_reason: FinishReason::Length };
        assert_eq!(reported(&CHAT, stream), vec![EngineEvent::Delta(Delta::text("Hi")), end]);
    }

    // CLOUD-1516
    #[test]
    fn done_is_an_end_without_a_reason_too_and_a_failure_when_nothing_came_before() {
        assert!(matches!(reported(&COMPLETION, "data: [DONE]\n\n")[..], [EngineEvent::Failed(_)]));
        let stream = "data: {\"choices\":[{\"text\":\"a\"}]}\n\ndata: [DONE]\n\n";
        let end =
            EngineEvent::End { delta: Delta::default(), tokens_out: 1, finish_reason: FinishReason::Stop };
        assert_eq!(reported(&COMPLETION, stream).last(), Some(&end));
    }

    // CLOUD-1518
    #[test]
    fn a_text_completion_counts_its_chunks_when_the_server_does_not() {
        let stream = concat!(
            "data: {\"choices\":[{\"text\":\"a\"}]}\n\n",
            "data: {\"choices\":[{\"text\":\"b\",\"finish_reason\":\"stop\"}]}\n\n",
            "data: [DONE]\n\n",
        );
        let end =
            EngineEvent::End { delta: Delta::default(), tokens_out: 2, finish_reason: FinishReason::Stop };
        assert_eq!(reported(&COMPLETION, stream).last(), Some(&end));
    }
}
