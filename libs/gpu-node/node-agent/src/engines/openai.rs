//! Any server with OpenAI's API: `/v1/completions`, `/v1/chat/completions`, `/v1/models`.
//!
//! The stream ends with `[DONE]`; a stream that closes without it has failed. Such servers do
//! not say how busy they are.

use pool_registry_types::task::{FinishReason, Resume, TaskRequest};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    EngineFacts, EngineRequest, Reader, Reply, Said, get_json, model_names, said_error, tokens_left,
};

/// Sets a field that has a value.
pub(crate) fn set<T: Serialize>(body: &mut Value, name: &str, value: Option<T>) {
    if let Some(value) = value {
        body[name] = json!(value);
    }
}

fn common(task: &TaskRequest, bound: Option<u64>) -> Value {
    let mut body = json!({
        "model": task.model_ref,
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

pub(super) fn chat(task: &TaskRequest) -> EngineRequest {
    let mut body = common(task, tokens_left(task, None, None));
    body["messages"] = json!(task.messages);
    EngineRequest::whole("/v1/chat/completions", body, Reply::OpenAiChat)
}

/// Goes on from the prompt, and from what was sent.
pub(super) fn text(
    task: &TaskRequest,
    prompt: &str,
    bound: Option<u64>,
    sent: Option<&Resume>,
) -> EngineRequest {
    let mut body = common(task, bound);
    body["prompt"] = json!(sent.map_or_else(|| prompt.to_owned(), |sent| format!("{prompt}{}", sent.text)));
    EngineRequest::whole("/v1/completions", body, Reply::OpenAiCompletion)
}

pub(super) fn request(task: &TaskRequest, ctx_max: Option<u32>, sent: Option<&Resume>) -> EngineRequest {
    match &task.prompt {
        // Some servers stop after 16 tokens when nothing is said.
        Some(prompt) => text(task, prompt, tokens_left(task, ctx_max, sent), sent),
        None => chat(task),
    }
}

#[derive(Debug, Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default)]
    error: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    delta: Option<Delta>,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Delta {
    #[serde(default)]
    content: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Usage {
    #[serde(default)]
    completion_tokens: u64,
}

pub(super) fn read(reader: &mut Reader, data: &str) -> Said {
    if data.trim() == "[DONE]" {
        return match reader.finish_reason {
            Some(finish_reason) => {
                let tokens_out = reader.counted.unwrap_or(reader.tokens_out);
                Said::End { text: None, tokens_out, finish_reason }
            }
            None => Said::Failed("it was done without a finish_reason".into()),
        };
    }
    let chunk: Chunk = match serde_json::from_str(data) {
        Ok(chunk) => chunk,
        Err(error) => return Said::Failed(format!("unreadable event: {error}")),
    };
    if let Some(error) = chunk.error {
        return said_error(None, &json!({ "error": error }));
    }
    if let Some(usage) = chunk.usage {
        reader.counted = Some(usage.completion_tokens);
    }
    let Some(choice) = chunk.choices.into_iter().next() else { return Said::Nothing };
    if let Some(reason) = choice.finish_reason {
        if matches!(reason.as_str(), "abort" | "error") {
            return Said::Failed(format!("it gave the request up: finish_reason {reason}"));
        }
        let finish = if reason == "length" { FinishReason::Length } else { FinishReason::Stop };
        reader.finish_reason = Some(finish);
    }
    let text = choice.text.or(choice.delta.and_then(|delta| delta.content));
    text.filter(|text| !text.is_empty()).map_or(Said::Nothing, Said::Text)
}

pub(super) async fn probe(client: &reqwest::Client, url: &str) -> Result<(EngineFacts, Option<u32>), String> {
    let models =
        get_json(client, format!("{url}/v1/models")).await.map_err(|e| format!("/v1/models: {e}"))?;
    let ctx = models["data"][0]["max_model_len"].as_u64().and_then(|n| u32::try_from(n).ok());
    let facts = EngineFacts { models: model_names(&models), slots: None, ctx_max: ctx, version: None };
    Ok((facts, None))
}

#[cfg(test)]
mod tests {
    use pool_registry_types::sse::Decoder;

    use super::*;

    fn said(reply: Reply, stream: &str) -> Vec<Said> {
        let (mut decoder, mut reader) = (Decoder::new(), Reader::new(reply, false));
        decoder.push(stream.as_bytes());
        let mut all = Vec::new();
        while let Some(frame) = decoder.next_frame().unwrap() {
            all.push(reader.read(&frame));
        }
        all.retain(|said| *said != Said::Nothing);
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
        let end = Said::End { text: None, tokens_out: 5, finish_reason: FinishReason::Length };
        assert_eq!(said(Reply::OpenAiChat, stream), vec![Said::Text("Hi".into()), end]);
    }

    // CLOUD-1516
    #[test]
    fn done_without_a_reason_is_a_failure() {
        assert!(matches!(said(Reply::OpenAiCompletion, "data: [DONE]\n\n")[..], [Said::Failed(_)]));
    }

    // CLOUD-1518
    #[test]
    fn a_text_completion_counts_its_chunks_when_the_server_does_not() {
        let stream = concat!(
            "data: {\"choices\":[{\"text\":\"a\"}]}\n\n",
            "data: {\"choices\":[{\"text\":\"b\",\"finish_reason\":\"stop\"}]}\n\n",
            "data: [DONE]\n\n",
        );
        let end = Said::End { text: None, tokens_out: 2, finish_reason: FinishReason::Stop };
        assert_eq!(said(Reply::OpenAiCompletion, stream).last(), Some(&end));
    }
}
