//! vLLM's server: OpenAI's API, and what it adds to it.
//!
//! Beside OpenAI's options it takes `top_k`, `min_p` and a grammar. The grammar goes out as
//! `structured_outputs.grammar`, which vLLM knows since 0.11; `guided_grammar`, its older name, is
//! gone since 0.12, and vLLM passes over a field that it does not know without a word, so one of
//! the two must be chosen. It is EBNF, or what the guide that the engine runs makes of it.
//!
//! It says how long its context is, not how many requests it takes at a time: the handoff does.

use pool_registry_types::task::{Resume, TaskRequest};
use serde_json::{Value, json};

use super::{
    EngineFacts, EngineRequest, NotReady, gauges, get_json, health, model_names, openai, tokens_left,
};

pub(super) fn request(task: &TaskRequest, sent: Option<&Resume>) -> EngineRequest {
    let mut request = match &task.prompt {
        Some(prompt) => {
            let left = tokens_left(task, None, sent);
            let mut request = openai::text(task, prompt, left, sent);
            if left.is_none() {
                // Said to be nothing, it is what the prompt leaves of the context. Unsaid it is 16,
                // and the whole context is refused, since it leaves no room for the prompt.
                request.body["max_tokens"] = Value::Null;
            }
            request
        }
        None => openai::chat(task),
    };
    // 0 means all of them elsewhere, and nothing to some versions of vLLM.
    openai::set(&mut request.body, "top_k", task.top_k.filter(|k| *k > 0));
    openai::set(&mut request.body, "min_p", task.min_p);
    let grammar = task.grammar.as_ref().map(|grammar| json!({ "grammar": grammar }));
    openai::set(&mut request.body, "structured_outputs", grammar);
    request
}

pub(super) async fn probe(
    client: &reqwest::Client,
    url: &str,
) -> Result<(EngineFacts, Option<u32>), NotReady> {
    // It listens once its model is in memory: until then nothing answers, and a bad answer means
    // that the engine behind the server is dead.
    health(client, url, None).await?;
    let models =
        get_json(client, format!("{url}/v1/models")).await.map_err(|e| format!("/v1/models: {e}"))?;
    // Builds of others may lack it, and no task needs it.
    let version = get_json(client, format!("{url}/version")).await.ok();
    let facts = EngineFacts {
        ctx_max: context(&models),
        models: model_names(&models),
        slots: None,
        version: version.and_then(|version| version["version"].as_str().map(str::to_owned)),
    };
    Ok((facts, busy(client, url).await))
}

/// The context of the first model that has one: adapters of a model are listed without it.
fn context(models: &Value) -> Option<u32> {
    let lengths = models["data"].as_array()?.iter().filter_map(|model| model["max_model_len"].as_u64());
    lengths.filter_map(|length| u32::try_from(length).ok()).next()
}

pub(super) async fn busy(client: &reqwest::Client, url: &str) -> Option<u32> {
    gauges::busy(client, url, "vllm:num_requests_running", "vllm:num_requests_waiting").await
}

#[cfg(test)]
mod tests {
    use pool_registry_types::ModelRef;
    use pool_registry_types::task::{ChatMessage, ResumeMode, Role};

    use super::*;

    fn task() -> TaskRequest {
        TaskRequest::completion(ModelRef::new("m").unwrap(), "hi")
    }

    // CLOUD-2480
    #[test]
    fn a_prompt_without_a_bound_may_use_what_is_left_of_the_context() {
        let unbounded = request(&task(), None);
        assert_eq!(unbounded.path, "/v1/completions");
        assert!(unbounded.body.as_object().unwrap().contains_key("max_tokens"));
        assert_eq!(unbounded.body["max_tokens"], Value::Null);
        let sent = Resume { mode: ResumeMode::Append, text: " a b".into(), token_ids: vec![], tokens: 2 };
        let bounded = request(&TaskRequest { max_tokens: Some(10), ..task() }, Some(&sent));
        assert_eq!((&bounded.body["max_tokens"], &bounded.body["prompt"]), (&json!(8), &json!("hi a b")));
    }

    // CLOUD-2480
    #[test]
    fn what_it_adds_to_the_api_goes_out_with_both_kinds_of_prompt() {
        let prompt = TaskRequest {
            top_k: Some(40),
            min_p: Some(0.05),
            grammar: Some("root ::= \"a\"".into()),
            ..task()
        };
        let message = ChatMessage { role: Role::User, content: "hi".into() };
        let chat = TaskRequest { prompt: None, messages: Some(vec![message]), ..prompt.clone() };
        for (task, path) in [(prompt, "/v1/completions"), (chat, "/v1/chat/completions")] {
            let request = request(&task, None);
            assert_eq!(request.path, path);
            assert_eq!((&request.body["top_k"], &request.body["min_p"]), (&json!(40), &json!(0.05)));
            assert_eq!(request.body["structured_outputs"], json!({"grammar": "root ::= \"a\""}));
        }
        let all = request(&TaskRequest { top_k: Some(0), ..task() }, None);
        assert_eq!(all.body["top_k"], Value::Null);
    }

    // CLOUD-2485
    #[test]
    fn an_adapter_without_a_context_does_not_hide_its_models() {
        let models = json!({"data": [{"id": "adapter"}, {"id": "m", "max_model_len": 4096}]});
        assert_eq!(context(&models), Some(4096));
    }
}
