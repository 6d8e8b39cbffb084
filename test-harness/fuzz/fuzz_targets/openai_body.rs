//! Bodies for the OpenAI-compatible gateway: what is taken is JSON to others too, says the same of its
//! model, and differs by nothing else when another is put in.

#![no_main]

use libfuzzer_sys::fuzz_target;
use openai_gateway::request::{RequestError, read, with_model};
use serde_json::Value;
use task_stream::OpenAiRoute;

/// What the facts and an error may take beside the body's own texts, bytes.
const FACTS: usize = 8192;

fn same(body: &Value, field: &str, read: Option<&str>) {
    assert_eq!(body[field].as_str(), read, "{field}");
}

fuzz_target!(|body: &[u8]| {
    let (facts, spent) = fuzz::measure(|| read(OpenAiRoute::ChatCompletions, body));
    // Copies of the texts, and a table of rules for a grammar.
    let most = FACTS + 160 * body.len();
    assert!(spent.highest <= most, "{} bytes for a body of {}", spent.highest, body.len());
    let value = serde_json::from_slice::<Value>(body);
    let facts = match facts {
        Ok(facts) => facts,
        Err(RequestError::Json(_) | RequestError::Trailing { .. }) => {
            assert!(value.is_err(), "JSON that is refused as none");
            return;
        }
        Err(RequestError::NotAnObject) => return assert!(!value.is_ok_and(|value| value.is_object())),
        Err(_) => return,
    };
    // Half of a pair and numbers beyond a float are read by nobody here, and refused by serde_json.
    if let Ok(value) = value {
        same(&value, "model", facts.model.as_deref());
        same(&value, "user", facts.user.as_deref());
        same(&value, "prompt_cache_key", facts.prompt_cache_key.as_deref());
        assert_eq!(value["stream"].as_bool().unwrap_or(false), facts.stream);
        assert_eq!(value["temperature"].as_f64(), facts.temperature);
    }
    let changed = with_model(body, &facts, "a/b\"c");
    let again = read(OpenAiRoute::ChatCompletions, &changed).expect("another model's name is no error");
    assert_eq!(again.model.as_deref(), Some("a/b\"c"));
    // What stands before the value, and behind it, is what stood there.
    let before = changed.iter().zip(body).take_while(|(new, old)| new == old).count();
    let behind = changed.iter().rev().zip(body.iter().rev()).take_while(|(new, old)| new == old).count();
    assert!(before + behind + "\"model\":\"a/b\\\"c\",".len() >= changed.len(), "more than the model has changed");
});
