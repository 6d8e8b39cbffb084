//! What a task may ask, and what it is refused for.

use super::*;
use crate::inputs::{MAX_INPUTS, RerankInputs};

fn request() -> TaskRequest {
    TaskRequest::completion(ModelRef::new("m").unwrap(), "hello")
}

#[test]
fn a_plain_completion_is_valid() {
    assert_eq!(request().check(), Ok(()));
}

// CLOUD-1203
#[test]
fn each_value_out_of_range_is_refused_by_its_name() {
    let cases: Vec<(&str, TaskRequest)> = vec![
        ("prompt", TaskRequest { prompt: None, ..request() }),
        ("messages", TaskRequest { messages: Some(vec![]), ..request() }),
        ("messages", TaskRequest { prompt: None, messages: Some(vec![]), ..request() }),
        ("temperature", TaskRequest { temperature: Some(-0.1), ..request() }),
        ("temperature", TaskRequest { temperature: Some(f64::NAN), ..request() }),
        ("top_p", TaskRequest { top_p: Some(1.1), ..request() }),
        ("min_p", TaskRequest { min_p: Some(2.0), ..request() }),
        ("max_tokens", TaskRequest { max_tokens: Some(0), ..request() }),
        ("ctx", TaskRequest { ctx: Some(0), ..request() }),
        ("stop", TaskRequest { stop: vec!["x".into(); 17], ..request() }),
        ("stop", TaskRequest { stop: vec![String::new()], ..request() }),
        ("deadline_ms", TaskRequest { deadline_ms: Some(0), ..request() }),
        (
            "timeouts.token_idle_ms",
            TaskRequest {
                timeouts: Some(Timeouts { first_token_ms: None, token_idle_ms: Some(0) }),
                ..request()
            },
        ),
    ];
    for (field, case) in cases {
        let error = case.check().expect_err(field);
        assert_eq!(error.code, ErrorCode::InvalidParams);
        assert!(error.message.contains(field), "{field}: {}", error.message);
    }
}

// CLOUD-1210
#[test]
fn what_an_engine_compiles_is_bounded_by_its_field() {
    let grammar = |text: String| TaskRequest { grammar: Some(text), ..request() };
    let cases = [
        ("grammar: nested 50000 deep, at most 64", grammar("root ::= ".to_owned() + &"(".repeat(50_000))),
        ("grammar: 65537 bytes long, at most 65536", grammar(" ".repeat(65_537))),
        ("grammar: repeated 1000000 times, at most 10000", grammar("root ::= \"a\"{1000000}".into())),
        (
            "stop: 65600 bytes long, at most 65536",
            TaskRequest { stop: vec!["x".repeat(4_100); 16], ..request() },
        ),
    ];
    for (message, case) in cases {
        let error = case.check().expect_err(message);
        assert_eq!((error.code, error.message.as_str()), (ErrorCode::InvalidParams, message));
    }
    let deep = "(".repeat(64) + "\"a\"" + &")".repeat(64);
    assert_eq!(grammar(format!("root ::= {deep}")).check(), Ok(()));
    assert_eq!(TaskRequest { stop: vec!["((((".repeat(1_000); 16], ..request() }.check(), Ok(()));
}

// CLOUD-1204
#[test]
fn a_misspelt_option_is_not_ignored() {
    let error =
        serde_json::from_str::<TaskRequest>(r#"{"model_ref":"m","prompt":"x","max_token":3}"#).unwrap_err();
    assert!(error.to_string().contains("max_token"), "{error}");
}

// CLOUD-1530
#[test]
fn what_cannot_be_continued_is_unsupported_before_it_starts() {
    let continued = |task: TaskRequest| TaskRequest { recovery: Recovery::Continue, ..task };
    let chat = || TaskRequest {
        prompt: None,
        messages: Some(vec![ChatMessage { role: Role::User, content: "x".into() }]),
        ..request()
    };
    let grammar = || TaskRequest { grammar: Some("root ::= \"a\"".into()), ..request() };
    let openai = TaskRequest { engine: Some(EngineKind::OpenAi), ..chat() };
    for task in [continued(grammar()), continued(openai)] {
        assert_eq!(task.check().unwrap_err().code, ErrorCode::Unsupported);
        let replayed = TaskRequest { determinism: Determinism::Strict, seed: Some(1), ..task };
        assert_eq!((replayed.check(), replayed.continuation()), (Ok(()), Some(ResumeMode::Replay)));
    }
    assert_eq!(continued(chat()).engines(), [EngineKind::LlamaCpp].into_iter().collect());
    assert_eq!(continued(request()).continuation(), Some(ResumeMode::Append));
    assert_eq!(request().continuation(), None);
}

// CLOUD-1205
#[test]
fn a_grammar_asks_for_llamacpp() {
    let task = TaskRequest { grammar: Some("root ::= \"a\"".into()), ..request() };
    assert_eq!(task.engines(), [EngineKind::LlamaCpp].into_iter().collect());
    let guided = TaskRequest { engine: Some(EngineKind::Vllm), ..task.clone() };
    assert_eq!(guided.check(), Ok(()), "who names vllm knows its language");
    let contradiction = TaskRequest { engine: Some(EngineKind::OpenAi), ..task };
    assert_eq!(contradiction.check().unwrap_err().code, ErrorCode::Unsupported);
}

fn embedding(texts: &[&str]) -> TaskRequest {
    let inputs = Inputs::Embedding(texts.iter().map(|text| (*text).to_owned()).collect());
    TaskRequest { workload: Workload::Embedding, prompt: None, inputs: Some(inputs), ..request() }
}

fn rerank(query: &str, documents: &[&str]) -> TaskRequest {
    let documents = documents.iter().map(|text| (*text).to_owned()).collect();
    let inputs = Inputs::Rerank(RerankInputs { query: query.into(), documents });
    TaskRequest { workload: Workload::Rerank, prompt: None, inputs: Some(inputs), ..request() }
}

// CLOUD-2486
#[test]
fn inputs_belong_to_their_workload_and_are_bounded() {
    assert_eq!(embedding(&["a", "b"]).check(), Ok(()));
    assert_eq!(rerank("q", &["a"]).check(), Ok(()));
    let many = vec!["x"; MAX_INPUTS + 1];
    let crossed = TaskRequest { workload: Workload::Rerank, ..embedding(&["a"]) };
    let completion = TaskRequest { inputs: embedding(&["a"]).inputs, ..request() };
    let cases = [
        ("inputs.embedding", embedding(&[])),
        ("inputs.embedding", embedding(&many)),
        ("inputs.embedding[1]", embedding(&["a", ""])),
        ("inputs.rerank.query", rerank("", &["a"])),
        ("inputs.rerank.documents", rerank("q", &[])),
        ("inputs", crossed),
        ("inputs", completion),
        ("inputs", TaskRequest { inputs: None, ..embedding(&["a"]) }),
        ("prompt", TaskRequest { prompt: Some("x".into()), ..embedding(&["a"]) }),
        ("max_tokens", TaskRequest { max_tokens: Some(1), ..embedding(&["a"]) }),
        ("recovery", TaskRequest { recovery: Recovery::Continue, ..rerank("q", &["a"]) }),
    ];
    for (field, case) in cases {
        let error = case.check().expect_err(field);
        assert_eq!(error.code, ErrorCode::InvalidParams, "{error}");
        assert!(error.message.contains(field), "{field}: {}", error.message);
    }
}

// CLOUD-2481
#[test]
fn a_named_engine_that_cannot_is_refused_by_the_field() {
    let named = |engine, task: TaskRequest| TaskRequest { engine: Some(engine), ..task };
    let message = ChatMessage { role: Role::User, content: "x".into() };
    let chat = TaskRequest { prompt: None, messages: Some(vec![message]), ..request() };
    let cases = [
        ("messages", named(EngineKind::Triton, chat.clone())),
        ("workload", named(EngineKind::Tgi, embedding(&["a"]))),
        ("workload", named(EngineKind::Triton, rerank("q", &["a"]))),
        ("top_k", named(EngineKind::Tgi, TaskRequest { top_k: Some(1), ..chat.clone() })),
        ("min_p", named(EngineKind::OpenAi, TaskRequest { min_p: Some(0.1), ..request() })),
        ("recovery", named(EngineKind::Vllm, TaskRequest { recovery: Recovery::Continue, ..chat })),
    ];
    for (field, task) in cases {
        let error = task.check().expect_err(field);
        assert_eq!(error.code, ErrorCode::Unsupported, "{error}");
        assert!(error.message.starts_with(field), "{field}: {}", error.message);
    }
}
