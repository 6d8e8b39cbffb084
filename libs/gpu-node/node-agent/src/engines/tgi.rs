//! Hugging Face's text-generation-inference.
//!
//! Prompts go to its `/generate_stream`, messages to its `/v1/chat/completions`. Three things are
//! its own. It is greedy when it is told not to sample, and refuses a temperature of 0 with a
//! prompt. It refuses in the stream: the answer's status is 200 whatever is wrong, and the first
//! event says what. And a stop text that ends the answer is a part of it.
//!
//! Embeddings are the work of another server of theirs, which is no engine here.

use pool_registry_types::ModelRef;
use pool_registry_types::task::{FinishReason, Resume, TaskRequest};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::{
    EngineFacts, EngineRequest, NotReady, Reader, Reply, Said, gauges, get_json, health, openai, said_error,
    tokens_left,
};

/// The name under which its chat takes every request: any other is an adapter's.
const ANY_MODEL: &str = "tgi";

pub(super) fn request(task: &TaskRequest, sent: Option<&Resume>) -> EngineRequest {
    let Some(prompt) = &task.prompt else {
        let mut request = openai::chat(task);
        request.body["model"] = json!(ANY_MODEL);
        // All of the probability is no limit, and refused as one.
        if task.top_p.is_some_and(|p| p >= 1.0)
            && let Some(body) = request.body.as_object_mut()
        {
            body.remove("top_p");
        }
        return request;
    };
    let inputs = sent.map_or_else(|| prompt.clone(), |sent| format!("{prompt}{}", sent.text));
    // Said to be nothing, the bound is what the prompt leaves of the context; unsaid it is 100.
    let mut parameters = json!({
        "max_new_tokens": tokens_left(task, None, sent),
        "details": true,
        "return_full_text": false,
    });
    if task.temperature == Some(0.0) {
        // Any other option of sampling would turn it on again.
        parameters["do_sample"] = json!(false);
    } else {
        openai::set(&mut parameters, "do_sample", task.temperature.map(|_| true));
        openai::set(&mut parameters, "temperature", task.temperature);
        openai::set(&mut parameters, "top_p", task.top_p.filter(|p| *p < 1.0));
        openai::set(&mut parameters, "top_k", task.top_k.filter(|k| *k > 0));
    }
    openai::set(&mut parameters, "seed", task.seed);
    if !task.stop.is_empty() {
        parameters["stop"] = json!(task.stop);
    }
    let body = json!({ "inputs": inputs, "parameters": parameters });
    EngineRequest::whole("/generate_stream", body, Reply::Tgi)
}

/// The parts of an event of `/generate_stream` that matter.
#[derive(Debug, Deserialize)]
struct Event {
    #[serde(default)]
    token: Option<Token>,
    /// Present in the last event only.
    #[serde(default)]
    generated_text: Option<IgnoredAny>,
    #[serde(default)]
    details: Option<Details>,
    #[serde(default)]
    error: Option<Value>,
    #[serde(default)]
    error_type: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Token {
    #[serde(default)]
    text: String,
    /// A mark of the model's, such as that of its end: no part of the answer.
    #[serde(default)]
    special: bool,
}

#[derive(Debug, Deserialize)]
struct Details {
    finish_reason: String,
    #[serde(default)]
    generated_tokens: Option<u64>,
}

pub(super) fn read(reader: &Reader, data: &str) -> Said {
    let event: Event = match serde_json::from_str(data) {
        Ok(event) => event,
        Err(error) => return Said::Failed(format!("unreadable event: {error}")),
    };
    if let Some(error) = event.error {
        let status = match event.error_type.as_deref() {
            Some("validation" | "template_error" | "tool_error") => Some(422),
            Some("overloaded") => Some(429),
            _ => None,
        };
        return said_error(status, &json!({ "error": error }));
    }
    let text = event.token.filter(|token| !token.special && !token.text.is_empty()).map(|token| token.text);
    if event.generated_text.is_none() && event.details.is_none() {
        return text.map_or(Said::Nothing, Said::Text);
    }
    let counted = event.details.as_ref().and_then(|details| details.generated_tokens);
    let tokens_out = counted.unwrap_or(reader.tokens_out + u64::from(text.is_some()));
    let limit = event.details.is_some_and(|details| details.finish_reason == "length");
    let finish_reason = if limit { FinishReason::Length } else { FinishReason::Stop };
    Said::End { text, tokens_out, finish_reason }
}

pub(super) async fn probe(
    client: &reqwest::Client,
    url: &str,
) -> Result<(EngineFacts, Option<u32>), NotReady> {
    // It listens once its model is in memory; from then on a bad answer is a dead engine.
    health(client, url, None).await?;
    let info = get_json(client, format!("{url}/info")).await.map_err(|e| format!("/info: {e}"))?;
    Ok((facts(&info), busy(client, url).await))
}

fn facts(info: &Value) -> EngineFacts {
    let number = |name: &str| info[name].as_u64().and_then(|n| u32::try_from(n).ok());
    EngineFacts {
        models: info["model_id"].as_str().and_then(|id| ModelRef::new(id).ok()).into_iter().collect(),
        // What runs at a time, where that is limited; else what is let in, some of it to wait.
        slots: number("max_batch_size").or(number("max_concurrent_requests")),
        ctx_max: number("max_total_tokens"),
        version: info["version"].as_str().map(str::to_owned),
    }
}

/// Neither gauge is there before the first request.
pub(super) async fn busy(client: &reqwest::Client, url: &str) -> Option<u32> {
    gauges::busy(client, url, "tgi_batch_current_size", "tgi_queue_size").await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task() -> TaskRequest {
        TaskRequest::completion(ModelRef::new("m").unwrap(), "hi")
    }

    // CLOUD-2480
    #[test]
    fn a_temperature_of_zero_is_greedy_and_nothing_samples_beside_it() {
        let greedy = TaskRequest {
            temperature: Some(0.0),
            top_p: Some(0.9),
            top_k: Some(4),
            seed: Some(7),
            max_tokens: Some(8),
            ..task()
        };
        let body = request(&greedy, None).body;
        let parameters =
            json!({"max_new_tokens":8,"details":true,"return_full_text":false,"do_sample":false,"seed":7});
        assert_eq!(body, json!({"inputs": "hi", "parameters": parameters}));
        let warm = TaskRequest { temperature: Some(0.7), top_p: Some(1.0), ..task() };
        let parameters = request(&warm, None).body["parameters"].clone();
        assert_eq!((&parameters["do_sample"], &parameters["temperature"]), (&json!(true), &json!(0.7)));
        assert_eq!((&parameters["top_p"], &parameters["max_new_tokens"]), (&Value::Null, &Value::Null));
    }

    // CLOUD-2485
    #[test]
    fn info_gives_context_slots_and_version() {
        let info = json!({"model_id": "org/m", "version": "3.3.6", "max_total_tokens": 4096, "max_concurrent_requests": 128, "max_batch_size": null});
        let facts = facts(&info);
        assert_eq!(
            (facts.ctx_max, facts.slots, facts.version.as_deref()),
            (Some(4096), Some(128), Some("3.3.6"))
        );
        assert_eq!(facts.models, [ModelRef::new("org/m").unwrap()]);
    }
}
