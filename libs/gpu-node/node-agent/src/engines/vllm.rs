//! vLLM's server: OpenAI's API, and what it adds to it.
//!
//! Beside OpenAI's options it takes `top_k`, `min_p` and a grammar. The grammar goes out as
//! `structured_outputs.grammar`, which vLLM knows since 0.11; `guided_grammar`, its older name, is
//! gone since 0.12, and vLLM passes over a field that it does not know without a word, so one of
//! the two must be chosen. It is EBNF, or what the guide that the engine runs makes of it.
//!
//! It says how long its context is, not how many requests it takes at a time: the handoff does.

use futures::FutureExt;
use node_core::Busy;
use pool_registry_types::ErrorBody;
use pool_registry_types::engines::capabilities;
use pool_registry_types::pool::EngineKind;
use serde_json::{Value, json};

use super::dialect::{
    Asked, Dialect, EngineFacts, EngineRequest, Look, NotReady, Quiet, health, tokens_left,
};
use super::gauges;
use super::json::set;
use super::openai::{self, context, listed};
use crate::pools_file::PoolSpec;

pub(super) static DIALECT: Dialect = Dialect {
    capabilities: capabilities(EngineKind::Vllm),
    request,
    // It listens once its model is in memory: until then nothing answers, and a bad answer means
    // that the engine behind the server is dead.
    health: |look| health(look, None).boxed(),
    facts: |look| facts(look).boxed(),
    busy: Some(|look| busy(look).boxed()),
    command_line: |pool| {
        let mut args = vec!["serve".to_owned(), "{model_id}".to_owned()];
        args.extend(options(pool));
        args
    },
    key_flag: None,
    quiet: Some(&Quiet {
        // Newer ones show only groups of flags unless a word is looked for.
        help: &["--help", "--help=log-requests"],
        flags: &["--no-enable-log-requests", "--disable-log-requests"],
    }),
};

fn request(asked: &Asked<'_>) -> Result<EngineRequest, ErrorBody> {
    let task = asked.task;
    let mut request = match &task.prompt {
        Some(prompt) => {
            let left = tokens_left(task, None, asked.sent);
            let mut request = openai::text(asked, prompt, left);
            if left.is_none() {
                // Said to be nothing, it is what the prompt leaves of the context. Unsaid it is 16,
                // and the whole context is refused, since it leaves no room for the prompt.
                request.body["max_tokens"] = Value::Null;
            }
            request
        }
        None => openai::chat(asked),
    };
    // 0 means all of them elsewhere, and nothing to some versions of vLLM.
    set(&mut request.body, "top_k", task.top_k.filter(|k| *k > 0));
    set(&mut request.body, "min_p", task.min_p);
    let grammar = task.grammar.as_ref().map(|grammar| json!({ "grammar": grammar }));
    set(&mut request.body, "structured_outputs", grammar);
    Ok(request)
}

async fn facts(look: &Look<'_>) -> Result<EngineFacts, NotReady> {
    let list = look.json("/v1/models").await?;
    // Builds of others may lack it, and no task needs it.
    let version = look.client.get_json(look.at, "/version").await.ok();
    let (models, own_model) = listed(&list);
    Ok(EngineFacts {
        models,
        own_model,
        ctx_max: context(&list),
        version: version.and_then(|version| version["version"].as_str().map(str::to_owned)),
        ..EngineFacts::default()
    })
}

async fn busy(look: &Look<'_>) -> Busy {
    gauges::busy(look, "vllm:num_requests_running", "vllm:num_requests_waiting").await
}

/// The options of its server, however it was started.
pub(crate) fn options(pool: &PoolSpec) -> Vec<String> {
    let mut options = vec!["--served-model-name".to_owned(), "{model}".to_owned()];
    options.extend(pool.aliases.iter().map(ToString::to_string));
    options
        .extend(["--host", "127.0.0.1", "--port", "{port}", "--max-num-seqs", "{slots}"].map(str::to_owned));
    if pool.devices.len() > 1 {
        options.extend(["--tensor-parallel-size".into(), pool.devices.len().to_string()]);
    }
    if let Some(ctx) = pool.ctx {
        options.extend(["--max-model-len".into(), ctx.to_string()]);
    }
    options
}

#[cfg(test)]
mod tests {
    use pool_registry_types::ModelRef;
    use pool_registry_types::task::{ChatMessage, Resume, ResumeMode, Role, TaskRequest};

    use super::*;

    fn asked(task: &TaskRequest, sent: Option<&Resume>) -> EngineRequest {
        request(&Asked { task, model: "m", ctx_max: None, sent }).unwrap()
    }

    fn task() -> TaskRequest {
        TaskRequest::completion(ModelRef::new("m").unwrap(), "hi")
    }

    // CLOUD-2480
    #[test]
    fn a_prompt_without_a_bound_may_use_what_is_left_of_the_context() {
        let unbounded = asked(&task(), None);
        assert_eq!(unbounded.path, "/v1/completions");
        assert!(unbounded.body.as_object().unwrap().contains_key("max_tokens"));
        assert_eq!(unbounded.body["max_tokens"], Value::Null);
        let sent = Resume {
            mode: ResumeMode::Append,
            text: " a b".into(),
            reasoning: String::new(),
            token_ids: vec![],
            tokens: 2,
        };
        let bounded = asked(&TaskRequest { max_tokens: Some(10), ..task() }, Some(&sent));
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
            let request = asked(&task, None);
            assert_eq!(request.path, path);
            assert_eq!((&request.body["top_k"], &request.body["min_p"]), (&json!(40), &json!(0.05)));
            assert_eq!(request.body["structured_outputs"], json!({"grammar": "root ::= \"a\""}));
        }
        let all = asked(&TaskRequest { top_k: Some(0), ..task() }, None);
        assert_eq!(all.body["top_k"], Value::Null);
    }

    // CLOUD-2485
    #[test]
    fn an_adapter_without_a_context_does_not_hide_its_models() {
        let models = json!({"data": [{"id": "adapter"}, {"id": "m", "max_model_len": 4096}]});
        assert_eq!(context(&models), Some(4096));
        let models = json!({"data": [{"id": "tuned", "parent": "m", "max_model_len": null}, {"id": "m", "parent": null, "max_model_len": 4096}]});
        let (names, own) = listed(&models);
        assert_eq!((names.len(), own.as_deref(), context(&models)), (2, Some("m"), Some(4096)));
    }
}
