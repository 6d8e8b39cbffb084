//! Hugging Face's text-generation-inference.
//!
//! Prompts go to its `/generate_stream`, messages to its `/v1/chat/completions`. Three things are
//! its own. It is greedy when it is told not to sample, and refuses a temperature of 0 with a
//! prompt. It refuses in the stream: the answer's status is 200 whatever is wrong, and the first
//! event says what. And a stop text that ends the answer is a part of it.
//!
//! Embeddings are the work of another server of theirs, which is no engine here.

use std::collections::BTreeMap;

use futures::FutureExt;
use node_core::Busy;
use pool_registry_types::engines::capabilities;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::task::FinishReason;
use pool_registry_types::{ErrorBody, ModelRef};
use serde_json::{Value, json};

use super::answer::{EngineEvent, Reader, Reply, text_of};
use super::dialect::{Asked, Dialect, EngineFacts, EngineRequest, Look, health, tokens_left};
use super::json::{Object, positive, set};
use super::thoughts::Delta;
use super::{gauges, openai};
use crate::pools_file::PoolSpec;

pub(super) static DIALECT: Dialect = Dialect {
    capabilities: capabilities(EngineKind::Tgi),
    request,
    // It listens once its model is in memory; from then on a bad answer is a dead engine.
    health: |look| health(look, None).boxed(),
    facts: |look| async { Ok(facts(&look.json("/info").await?)) }.boxed(),
    busy: Some(|look| busy(look).boxed()),
    command_line,
    key_flag: None,
    quiet: None,
};

/// `/generate_stream`: the last event has the whole text, without a marker.
pub(super) static GENERATE: Reply = Reply {
    name: "TGI's generate_stream",
    is_document: false,
    ends_by_closing: false,
    read,
    token_ids: None,
};

/// The name under which its chat takes every request: any other is an adapter's.
const ANY_MODEL: &str = "tgi";

fn request(asked: &Asked<'_>) -> Result<EngineRequest, ErrorBody> {
    let Asked { task, sent, .. } = *asked;
    let Some(prompt) = &task.prompt else {
        let mut request = openai::chat(asked);
        request.body["model"] = json!(ANY_MODEL);
        // All of the probability is no limit, and refused as one.
        if task.top_p.is_some_and(|p| p >= 1.0)
            && let Some(body) = request.body.as_object_mut()
        {
            body.remove("top_p");
        }
        return Ok(request);
    };
    let inputs = sent.map_or_else(|| prompt.clone(), |sent| format!("{prompt}{}", sent.text));
    // Said to be nothing, the bound is what the prompt leaves of the context; suppressed it is 100.
    let mut parameters = json!({
        "max_new_tokens": tokens_left(task, None, sent),
        "details": true,
        "return_full_text": false,
    });
    if task.temperature == Some(0.0) {
        // Any other option of sampling would turn it on again.
        parameters["do_sample"] = json!(false);
    } else {
        set(&mut parameters, "do_sample", task.temperature.map(|_| true));
        set(&mut parameters, "temperature", task.temperature);
        set(&mut parameters, "top_p", task.top_p.filter(|p| *p < 1.0));
        set(&mut parameters, "top_k", task.top_k.filter(|k| *k > 0));
    }
    set(&mut parameters, "seed", task.seed);
    if !task.stop.is_empty() {
        parameters["stop"] = json!(task.stop);
    }
    let body = json!({ "inputs": inputs, "parameters": parameters });
    Ok(EngineRequest::whole("/generate_stream", body, &GENERATE))
}

fn read(reader: &mut Reader, event: &Object<'_>) -> EngineEvent {
    let token = event.get("token");
    // A special one is a delimiter of the model's, such as that of its end: no part of the answer.
    let text = if token.get("special").is_true() { "".into() } else { text_of(token.get("text")) };
    let mut delta = Delta::text(text);
    let details = event.get("details");
    // Both are there in the last event only.
    if !event.get("generated_text").is_given() && !details.is_object() {
        return EngineEvent::Delta(delta);
    }
    if delta.is_empty() && reader.is_empty() && !token.is_object() {
        // A whole answer in the place of a stream.
        delta.text = text_of(event.get("generated_text")).into_owned();
    }
    let limit = details.get("finish_reason").text().map(|reason| match reason.as_ref() {
        "length" => FinishReason::Length,
        _ => FinishReason::Stop,
    });
    reader.end(delta, details.get("generated_tokens").count(), limit)
}

fn facts(info: &Value) -> EngineFacts {
    let model = info["model_id"].as_str();
    EngineFacts {
        models: model
            .and_then(|id| Some(BTreeMap::from([(ModelRef::new(id).ok()?, id.to_owned())])))
            .unwrap_or_default(),
        own_model: model.map(str::to_owned),
        // What runs at a time, where that is limited; else what is let in, some of it to wait.
        slots: positive(&info["max_batch_size"]).or(positive(&info["max_concurrent_requests"])),
        ctx_max: positive(&info["max_total_tokens"]),
        version: info["version"].as_str().map(str::to_owned),
    }
}

/// Neither gauge is there before the first request.
async fn busy(look: &Look<'_>) -> Busy {
    gauges::busy(look, "tgi_batch_current_size", "tgi_queue_size").await
}

fn command_line(pool: &PoolSpec) -> Vec<String> {
    let mut args = vec!["--model-id", "{model_id}", "--hostname", "127.0.0.1", "--port", "{port}"];
    args.extend(["--max-concurrent-requests", "{slots}"]);
    let mut args: Vec<String> = args.into_iter().map(str::to_owned).collect();
    if pool.devices.len() > 1 {
        args.extend(["--num-shard".into(), pool.devices.len().to_string()]);
    }
    args
}

#[cfg(test)]
mod tests {
    use pool_registry_types::task::TaskRequest;

    use super::*;

    fn asked(task: &TaskRequest) -> EngineRequest {
        request(&Asked { task, model: "m", ctx_max: None, sent: None }).unwrap()
    }

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
        let body = asked(&greedy).body;
        let parameters =
            json!({"max_new_tokens":8,"details":true,"return_full_text":false,"do_sample":false,"seed":7});
        assert_eq!(body, json!({"inputs": "hi", "parameters": parameters}));
        let warm = TaskRequest { temperature: Some(0.7), top_p: Some(1.0), ..task() };
        let parameters = asked(&warm).body["parameters"].clone();
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
        assert_eq!(facts.models, BTreeMap::from([(ModelRef::new("org/m").unwrap(), "org/m".to_owned())]));
    }
}
