//! llama.cpp's own HTTP server.
//!
//! Prompts go to its native `/completion`, messages to its `/v1/chat/completions`. It ignores
//! the model's name, queues beyond its slots without a word, and says how busy it is in its
//! metrics and its slots.

pub(super) mod preparation;

use futures::FutureExt;
use node_core::Busy;
use pool_registry_types::ErrorBody;
use pool_registry_types::engines::capabilities;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::task::{FinishReason, KvHint, ResumeMode};
use serde_json::{Value, json};

use self::preparation::Preparation;
pub(crate) use self::preparation::Unsent;
use super::answer::{EngineEvent, Reader, Reply, text_of};
use super::dialect::{Asked, Dialect, EngineFacts, EngineRequest, Look, NotReady, health};
use super::gauges;
use super::json::{Json, Object, positive, set};
use super::openai::{self, listed};
use super::thoughts::Delta;
use crate::pools_file::PoolSpec;

pub(super) static DIALECT: Dialect = Dialect {
    capabilities: capabilities(EngineKind::LlamaCpp),
    request,
    health: |look| health(look, Some(503)).boxed(),
    facts: |look| facts(look).boxed(),
    busy: Some(|look| busy(look).boxed()),
    command_line,
    key_flag: Some("--api-key-file"),
    quiet: None,
};

/// `/completion`: ends with `"stop": true`, without a marker.
pub(super) static COMPLETION: Reply = Reply {
    name: "llama.cpp's completion",
    is_document: false,
    ends_by_closing: false,
    read,
    token_ids: Some(token_ids),
};

/// What is read of the last event; all of it would repeat the prompt and the settings.
const READ: [&str; 6] = ["content", "stop", "stop_type", "tokens", "tokens_predicted", "error"];

fn request(asked: &Asked<'_>) -> Result<EngineRequest, ErrorBody> {
    let Asked { task, model, sent, .. } = *asked;
    let continues = task.continuation() == Some(ResumeMode::Append);
    let cold = (task.kv_hint == KvHint::Cold).then_some(false);
    if task.prompt.is_none() && !continues {
        let mut request = openai::chat(asked);
        set(&mut request.body, "top_k", task.top_k);
        set(&mut request.body, "min_p", task.min_p);
        set(&mut request.body, "grammar", task.grammar.clone());
        set(&mut request.body, "cache_prompt", cold);
        return Ok(request);
    }
    let prompt = task.prompt.clone().unwrap_or_default();
    // Where it serves several models it must be told which; else it passes the name over.
    let mut body = json!({ "model": model, "prompt": prompt, "stream": true, "response_fields": READ });
    set(&mut body, "n_predict", asked.tokens_left());
    set(&mut body, "seed", task.seed);
    set(&mut body, "temperature", task.temperature);
    set(&mut body, "top_p", task.top_p);
    set(&mut body, "top_k", task.top_k);
    set(&mut body, "min_p", task.min_p);
    set(&mut body, "grammar", task.grammar.clone());
    set(&mut body, "cache_prompt", cold);
    set(&mut body, "return_tokens", continues.then_some(true));
    if !task.stop.is_empty() {
        body["stop"] = json!(task.stop);
    }
    let messages = task.messages.as_ref().map(|messages| json!(messages));
    let incomplete = messages.is_some() || sent.is_some();
    let preparation = incomplete.then(|| Preparation {
        messages,
        prompt,
        sent: sent.cloned(),
        drops_thoughts: task.reasoning == pool_registry_types::task::Reasoning::Drop,
        model: model.to_owned(),
    });
    Ok(EngineRequest {
        path: "/completion".into(),
        body,
        reply: &COMPLETION,
        preparation,
        wants_ids: continues,
    })
}

fn read(reader: &mut Reader, event: &Object<'_>) -> EngineEvent {
    let delta = Delta::text(text_of(event.get("content")));
    if !event.get("stop").is_true() {
        return EngineEvent::Delta(delta);
    }
    // Older ones say it by a field for each reason.
    let limit =
        event.get("stop_type").text().as_deref() == Some("limit") || event.get("stopped_limit").is_true();
    let finish_reason = if limit { FinishReason::Length } else { FinishReason::Stop };
    reader.end(delta, event.get("tokens_predicted").count(), Some(finish_reason))
}

/// The ids of the tokens of an event, and the count of all so far; none where it does not say.
fn token_ids(event: &Object<'_>) -> (Vec<u32>, u32) {
    let ids = event.get("tokens").items().filter_map(Json::count).collect();
    (ids, event.get("tokens_predicted").count().unwrap_or(0))
}

async fn facts(look: &Look<'_>) -> Result<EngineFacts, NotReady> {
    let props = look.json("/props").await?;
    let list = look.json("/v1/models").await?;
    let (models, own_model) = listed(&list);
    // A router of several models has neither slots nor a context of its own: its handoff says them.
    Ok(EngineFacts {
        models,
        own_model,
        slots: positive(&props["total_slots"]),
        ctx_max: positive(&props["default_generation_settings"]["n_ctx"]),
        version: props["build_info"].as_str().map(str::to_owned),
    })
}

/// From the gauges; from the slots where the gauges are off. Either wakes an engine that sleeps, so
/// one that does is not asked.
async fn busy(look: &Look<'_>) -> Busy {
    match look.client.get_json(look.at, "/props").await {
        Ok(props) if props["is_sleeping"] == true => return Busy::Reported(0),
        Ok(props) if props["role"] == "router" => return Busy::CannotTell,
        _ => {}
    }
    let reported = gauges::busy(look, "llamacpp:requests_processing", "llamacpp:requests_deferred").await;
    if matches!(reported, Busy::Reported(_)) {
        return reported;
    }
    let slots = look.client.get_json(look.at, "/slots").await;
    match slots.as_ref().map(Value::as_array) {
        Ok(Some(slots)) => {
            let busy = slots.iter().filter(|slot| slot["is_processing"] == true).count();
            Busy::Reported(u32::try_from(busy).unwrap_or(u32::MAX))
        }
        Ok(None) => reported,
        Err(error) => match gauges::unanswered(error) {
            Busy::CannotTell => reported,
            unanswered => unanswered,
        },
    }
}

fn command_line(pool: &PoolSpec) -> Vec<String> {
    let mut args = vec!["--model", "{model_path}", "--alias", "{model}", "--host", "127.0.0.1"];
    args.extend([
        "--port",
        "{port}",
        "--parallel",
        "{slots}",
        "--ctx-size",
        "{ctx_total}",
        "--metrics",
        "--slots",
    ]);
    if !pool.devices.is_empty() {
        args.extend(["--n-gpu-layers", "999"]);
    }
    let mut args: Vec<String> = args.into_iter().map(str::to_owned).collect();
    if !pool.tensor_split.is_empty() {
        let split = pool.tensor_split.iter().map(f64::to_string).collect::<Vec<_>>().join(",");
        args.extend(["--tensor-split".into(), split]);
    }
    args
}

#[cfg(test)]
mod tests {
    use pool_registry_types::ModelRef;
    use pool_registry_types::sse::Decoder;
    use pool_registry_types::task::{Resume, TaskRequest};

    use super::preparation::{APPLY_TEMPLATE, PROPS};
    use super::*;
    use crate::engines::{Endpoint, EngineClient, Whose};

    fn asked<'a>(task: &'a TaskRequest, ctx_max: Option<u32>, sent: Option<&'a Resume>) -> EngineRequest {
        request(&Asked { task, model: "m", ctx_max, sent }).unwrap()
    }

    // CLOUD-1517
    #[test]
    fn a_prompt_goes_to_the_native_completion_bounded_by_the_context() {
        let task = TaskRequest {
            seed: Some(1),
            temperature: Some(0.0),
            stop: vec!["\n".into()],
            ..TaskRequest::completion(ModelRef::new("m").unwrap(), "hi")
        };
        let request = asked(&task, Some(64), None);
        assert_eq!((&*request.path, &request.preparation), ("/completion", &None));
        let expected = json!({"model":"m","prompt":"hi","stream":true,"response_fields":READ,"n_predict":64,"seed":1,"temperature":0.0,"stop":["\n"]});
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
        let first = asked(&task, None, None);
        assert_eq!((&first.body["return_tokens"], first.wants_ids), (&json!(true), true));
        let sent = Resume {
            mode: ResumeMode::Append,
            text: " a b".into(),
            reasoning: String::new(),
            token_ids: vec![1, 2],
            tokens: 2,
        };
        let second = asked(&task, None, Some(&sent));
        assert_eq!(second.body["n_predict"], 8);
        assert_eq!(second.preparation.unwrap().sent, Some(sent));
        let message = ChatMessage { role: Role::User, content: "hi".into() };
        let chat = TaskRequest { prompt: None, messages: Some(vec![message]), ..task };
        assert_eq!(asked(&chat, None, None).path, "/completion", "its own template, written out");
        let event =
            Object::read(r#"{"content":" a","tokens":[7],"stop":false,"tokens_predicted":3}"#).unwrap();
        assert_eq!(token_ids(&event), (vec![7], 3));
    }

    // CLOUD-2724
    #[test]
    fn an_engine_whose_ids_cannot_be_those_of_its_text_is_asked_for_none_any_more() {
        let taken = |events: &[Value]| {
            let (mut decoder, mut reader) = (Decoder::lossy(), Reader::new(&COMPLETION, true));
            for event in events {
                decoder.push(format!("data: {event}\n\n").as_bytes());
                while let Ok(Some(frame)) = decoder.next_frame() {
                    reader.read(&frame);
                }
            }
            reader.take_ids("x")
        };
        let event = |ids: usize, count: usize| json!({"content":"x","tokens":vec![7; ids],"tokens_predicted":count,"stop":false});
        assert_eq!(taken(&[event(1, 1)]), Some((vec![7], 1)));
        // Half a character, or the beginning of a stop text, waits for what follows it.
        assert_eq!(taken(&[event(50, 50), event(50, 100)]), Some((vec![7; 100], 100)));
        assert_eq!(taken(&[event(10_000, 1)]), None);
        assert_eq!(taken(&[event(1, 10_000)]), None);
        let waiting: Vec<Value> = (0..30).map(|_| event(10_000, 0)).collect();
        assert_eq!(taken(&waiting), None, "nor are they held without end");
    }

    // CLOUD-1517
    #[test]
    fn the_last_event_may_carry_a_text_and_counts_the_tokens() {
        let read = |event: &str| read(&mut Reader::new(&COMPLETION, false), &Object::read(event).unwrap());
        assert_eq!(read(r#"{"content":" a","stop":false}"#), EngineEvent::Delta(Delta::text(" a")));
        assert_eq!(read(r#"{"content":"","stop":false}"#), EngineEvent::Delta(Delta::default()));
        let end = r#"{"content":" z","stop":true,"stop_type":"limit","tokens_predicted":8}"#;
        let reported =
            EngineEvent::End { delta: Delta::text(" z"), tokens_out: 8, finish_reason: FinishReason::Length };
        assert_eq!(read(end), reported);
    }

    /// Answers each path with its body, and remembers which were asked for. What is not known is 404.
    async fn server(
        answers: &'static [(&'static str, &'static str)],
    ) -> (Endpoint, std::sync::Arc<parking_lot::Mutex<Vec<String>>>) {
        use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = Endpoint::new(format!("http://{}", listener.local_addr().unwrap()));
        let asked = std::sync::Arc::new(parking_lot::Mutex::new(Vec::new()));
        let paths = std::sync::Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let paths = std::sync::Arc::clone(&paths);
                tokio::spawn(async move {
                    let mut stream = BufReader::new(stream);
                    let mut line = String::new();
                    while stream.read_line(&mut line).await.unwrap_or(0) > 0 {
                        if line == "\r\n" {
                            let path = paths.lock().last().cloned().unwrap_or_default();
                            let known = answers.iter().find(|(known, _)| *known == path);
                            let (status, body) =
                                known.map_or(("404 Not Found", "{}"), |(_, body)| ("200 OK", *body));
                            let answer =
                                format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                            stream.get_mut().write_all(answer.as_bytes()).await.unwrap();
                        } else if let Some(path) =
                            line.rsplit(' ').nth(1).filter(|_| line.contains(" HTTP/1.1"))
                        {
                            paths.lock().push(path.to_owned());
                        }
                        line.clear();
                    }
                });
            }
        });
        (at, asked)
    }

    // CLOUD-2496
    #[tokio::test]
    async fn a_router_has_several_models_with_aliases_and_no_context_of_its_own() {
        let (at, asked) = server(&[
            ("/health", r#"{"status":"ok"}"#),
            ("/props", r#"{"role":"router","default_generation_settings":{"n_ctx":0},"build_info":"b10000"}"#),
            ("/v1/models", r#"{"data":[{"id":"org/a","aliases":["a","small"],"status":{"value":"unloaded"}},{"id":"org/b","aliases":[]}]}"#),
        ])
        .await;
        let client = EngineClient::new();
        let look = Look { client: &client, at: &at, models: &[] };
        let facts = facts(&look).await.unwrap();
        let names: Vec<&str> = facts.models.keys().map(ModelRef::as_str).collect();
        assert_eq!(names, ["a", "org/a", "org/b", "small"]);
        assert_eq!(facts.models[&ModelRef::new("small").unwrap()], "org/a");
        assert_eq!((facts.ctx_max, facts.slots), (None, None), "0 is unknown");
        assert_eq!(busy(&look).await, Busy::CannotTell);
        let loads = |path: &String| path.contains("slots") || path.contains("metrics") || path.contains('?');
        assert!(!asked.lock().iter().any(loads), "nothing that would load a model: {:?}", asked.lock());
        let task = TaskRequest::completion(ModelRef::new("small").unwrap(), "hi");
        let request = request(&Asked { task: &task, model: "org/a", ctx_max: None, sent: None }).unwrap();
        assert_eq!(request.body["model"], "org/a");
    }

    /// What comes of messages that may be continued.
    async fn prepared(answers: &'static [(&'static str, &'static str)]) -> Result<Value, Unsent> {
        use pool_registry_types::task::{ChatMessage, Recovery, Role};
        let (at, _) = server(answers).await;
        let task = TaskRequest {
            prompt: None,
            messages: Some(vec![ChatMessage { role: Role::User, content: "hi".into() }]),
            recovery: Recovery::Continue,
            ..TaskRequest::completion(ModelRef::new("m").unwrap(), "")
        };
        let mut request =
            request(&Asked { task: &task, model: "org/a b", ctx_max: None, sent: None }).unwrap();
        let preparation = request.preparation.take().unwrap();
        let splitter = preparation.complete(&EngineClient::new(), &at, &mut request.body).await?;
        assert_eq!(splitter.is_some(), request.body["preserved_tokens"].is_array());
        Ok(request.body)
    }

    // CLOUD-1521
    // CLOUD-2496
    #[tokio::test]
    async fn messages_are_written_out_by_the_template_of_their_own_model_and_marks_are_kept() {
        let body = prepared(&[
            ("/apply-template", "\u{feff}{\"prompt\":\"<u>hi</u>[THINK]\",\"x\":NaN}"),
            ("/props?model=org%2Fa%20b", r#"{"chat_template":"{{ '[THINK]' }} [/THINK]"}"#),
        ]);
        let body = body.await.unwrap();
        assert_eq!(body["prompt"], "<u>hi</u>[THINK]");
        assert_eq!(body["preserved_tokens"], json!(["[THINK]", "[/THINK]"]));
    }

    // CLOUD-2488
    #[tokio::test]
    async fn what_is_asked_before_a_request_is_judged_as_what_it_is() {
        let whose = async |answers| match prepared(answers).await {
            Err(Unsent::Refused { path, refusal }) => Some((path, refusal.whose)),
            _ => None,
        };
        assert_eq!(whose(&[]).await, Some((APPLY_TEMPLATE, Whose::Missing)), "not the completion");
        let nothing = whose(&[(APPLY_TEMPLATE, "{}"), ("/props?model=org%2Fa%20b", "{}")]).await;
        assert_eq!(nothing, Some((APPLY_TEMPLATE, Whose::Engine)), "an empty prompt is another prompt");
        assert_eq!(whose(&[(APPLY_TEMPLATE, r#"{"prompt":"hi"}"#)]).await, Some((PROPS, Whose::Missing)));
    }

    // CLOUD-2496
    #[tokio::test]
    async fn an_engine_that_sleeps_is_not_woken_by_looks() {
        let (at, asked) = server(&[
            ("/health", r#"{"status":"ok"}"#),
            ("/props", r#"{"total_slots":2,"default_generation_settings":{"n_ctx":512},"is_sleeping":true}"#),
            ("/v1/models", r#"{"data":[{"id":"m"}]}"#),
            ("/metrics", "llamacpp:requests_processing 1\n"),
            ("/slots", "[]"),
        ])
        .await;
        let client = EngineClient::new();
        let look = Look { client: &client, at: &at, models: &[] };
        let facts = facts(&look).await.unwrap();
        assert_eq!((facts.slots, facts.ctx_max), (Some(2), Some(512)));
        assert_eq!(busy(&look).await, Busy::Reported(0));
        let wakes = |path: &String| ["/metrics", "/slots"].contains(&path.as_str());
        assert!(!asked.lock().iter().any(wakes), "{:?}", asked.lock());
    }
}
