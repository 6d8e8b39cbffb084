//! What is read of bodies as clients write them, and as attackers do.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const CHAT: OpenAiRoute = OpenAiRoute::ChatCompletions;

fn facts(body: &str) -> RequestFacts {
    read(CHAT, body.as_bytes()).unwrap_or_else(|error| panic!("{body}: {error}"))
}

fn refusal(body: &str) -> RequestError {
    read(CHAT, body.as_bytes()).expect_err(body)
}

// CLOUD-2801
#[test]
fn the_facts_of_a_body_are_read_by_their_names() {
    let facts = facts(
        r#" { "messages" : [{"role":"user","content":"a \"model\" {"}], "model":"org\/m:8b", "stream":true,
        "user":"ann","prompt_cache_key":"k","max_tokens":7,"max_completion_tokens":9,"max_output_tokens":8,
        "temperature":0.0,"seed":3,"n":1,"tools":[{}],"logprobs":true,"echo":true,"previous_response_id":"r"} "#,
    );
    assert_eq!(facts.model.as_deref(), Some("org/m:8b"));
    assert!(facts.stream && facts.has_tools && facts.has_logprobs && facts.has_echo);
    assert_eq!(facts.user.as_deref(), Some("ann"));
    assert_eq!(facts.prompt_cache_key.as_deref(), Some("k"));
    assert_eq!(facts.previous_response_id.as_deref(), Some("r"));
    assert_eq!(
        (facts.max_tokens, facts.max_completion_tokens, facts.max_output_tokens),
        (Some(7), Some(9), Some(8))
    );
    assert_eq!(facts.output_bound(), Some(9));
    assert_eq!((facts.temperature, facts.seed, facts.n), (Some(0.0), Some(3), Some(1)));
}

// CLOUD-2801
#[test]
fn an_escaped_name_is_the_same_name() {
    let facts = facts(r#"{"mod\u0065l":"a","\u0073tream":true}"#);
    assert_eq!(facts.model.as_deref(), Some("a"));
    assert!(facts.stream);
    assert_eq!(refusal(r#"{"mod\u0065l":"a","model":"b"}"#), RequestError::TwoModels);
    assert_eq!(refusal(r#"{"model":null,"\u006dodel":null}"#), RequestError::TwoModels);
}

// CLOUD-2801
#[test]
fn fields_within_others_are_none_of_the_bodys() {
    let facts = facts(r#"{"messages":[{"model":"x","stream":true}],"metadata":{"model":"y","user":1}}"#);
    assert_eq!((facts.model, facts.stream, facts.user), (None, false, None));
}

// CLOUD-2801
#[test]
fn null_is_absent_and_the_last_of_a_doubled_field_counts() {
    let facts =
        facts(r#"{"model":null,"stream":true,"stream":null,"seed":1,"seed":null,"stop":null,"tools":null}"#);
    assert_eq!((facts.model, facts.stream, facts.seed, facts.has_tools), (None, false, None, false));
}

// CLOUD-2801
#[test]
fn numbers_are_read_as_engines_read_them() {
    assert_eq!(facts(r#"{"max_tokens":-1}"#).output_bound(), None);
    assert_eq!(facts(r#"{"max_tokens":1e3}"#).max_tokens, Some(1000));
    assert_eq!(facts(r#"{"max_tokens":5.0}"#).max_tokens, Some(5));
    assert_eq!(
        facts(r#"{"max_tokens":99999999999999999999999999999999999999999999}"#).max_tokens,
        Some(u64::MAX)
    );
    assert_eq!(facts(r#"{"seed":-99999999999999999999}"#).seed, Some(i64::MIN));
    for zero in ["0", "-0", "0.0", "0e9"] {
        assert!(facts(&format!(r#"{{"temperature":{zero}}}"#)).is_deterministic(), "{zero}");
    }
}

// CLOUD-2802
#[test]
fn a_field_of_the_wrong_type_is_refused_by_its_name() {
    for (field, value) in [
        ("model", "1"),
        ("model", "[\"a\"]"),
        ("stream", "\"true\""),
        ("stream", "1"),
        ("user", "{}"),
        ("prompt_cache_key", "false"),
        ("previous_response_id", "0"),
        ("max_tokens", "\"5\""),
        ("max_completion_tokens", "1.5"),
        ("max_output_tokens", "1e999"),
        ("temperature", "\"0\""),
        ("seed", "0.5"),
        ("n", "true"),
        ("echo", "\"\""),
        ("tools", "{}"),
        ("functions", "\"\""),
        ("model", r#""\ud800""#),
    ] {
        let error = refusal(&format!(r#"{{"{field}":{value}}}"#));
        assert_eq!(error.field(), Some(field), "{value}");
        assert!(error.body().message.starts_with(&format!("{field}: ")), "{error}");
    }
}

// CLOUD-2802
#[test]
fn what_is_not_one_json_object_is_refused() {
    assert_eq!(refusal(""), RequestError::Empty);
    assert_eq!(refusal(" \n"), RequestError::Empty);
    assert_eq!(refusal("\u{feff}{}"), RequestError::ByteOrderMark);
    assert_eq!(read(CHAT, b"{\"a\":\"\xff\"}"), Err(RequestError::NotUtf8 { at: 6 }));
    assert_eq!(refusal("[]"), RequestError::NotAnObject);
    assert_eq!(refusal("{} {}"), RequestError::Trailing { at: 3 });
    assert_eq!(refusal("{}\0"), RequestError::Trailing { at: 2 });
    assert_eq!(refusal("{\"a\":1"), RequestError::Json(BadJson::Cut));
    for bad in [
        "{a:1}",
        "{'a':1}",
        "{\"a\":1,}",
        "{,}",
        "{\"a\" 1}",
        "{\"a\":01}",
        "{\"a\":1.}",
        "{\"a\":.5}",
        "{\"a\":+1}",
        "{\"a\":NaN}",
        "{\"a\":tru}",
        "{\"a\":[1,]}",
        "{\"a\":\"\t\"}",
        "{\"a\":\"\\x\"}",
        "{\"a\":\"\\u12g4\"}",
        "{\"a\":1 /**/}",
        "{\"\\ud800\":1}",
        "{\"a\":1]",
        "{\"a\":[1}",
    ] {
        assert!(matches!(refusal(bad), RequestError::Json(BadJson::Unexpected { .. })), "{bad}");
    }
}

// CLOUD-2802
#[test]
fn nesting_is_bounded_wherever_it_stands() {
    let nested = |levels: usize| format!("{{\"x\":{}{}}}", "[".repeat(levels), "]".repeat(levels));
    facts(&nested(126));
    assert!(matches!(refusal(&nested(127)), RequestError::Json(BadJson::Deep { .. })));
    let million = format!("{{\"messages\":{}", "{\"a\":".repeat(1_000_000));
    assert!(matches!(refusal(&million), RequestError::Json(BadJson::Deep { .. })));
}

// CLOUD-2803
#[test]
fn the_name_of_a_model_is_replaced_and_no_other_byte() {
    let set = |body: &str, name: &str| {
        let bytes = with_model(body.as_bytes(), &facts(body), name);
        String::from_utf8(bytes.to_vec()).unwrap()
    };
    assert_eq!(
        set(r#" {"a" : 1.0, "model" :  "x" , "b":"é"} "#, "y"),
        r#" {"a" : 1.0, "model" :  "y" , "b":"é"} "#
    );
    assert_eq!(set(r#"{"mod\u0065l":"\u0061"}"#, "a\"b"), r#"{"mod\u0065l":"a\"b"}"#);
    assert_eq!(set(r#"{"model":null}"#, "m"), r#"{"model":"m"}"#);
    assert_eq!(set(r#" { "a":1}"#, "m"), r#" {"model":"m", "a":1}"#);
    assert_eq!(set("{ }", "m"), r#"{"model":"m" }"#);
}

// CLOUD-2804
#[test]
fn what_engines_compile_is_bounded_wherever_it_stands() {
    let deep = format!("root ::= {}\"a\"{}", "(".repeat(65), ")".repeat(65));
    let regex = format!("{}a{}", "(".repeat(65), ")".repeat(65));
    let schema = (0..70).fold(json!({}), |inner, _| json!({ "not": inner }));
    let pattern = json!({"type": "string", "pattern": regex});
    let text = schema.to_string();
    for (field, body) in [
        ("grammar", json!({"grammar": deep})),
        ("grammar", json!({"grammar": {"type": "regex", "value": regex}})),
        ("regex", json!({"regex": regex})),
        ("ebnf", json!({"ebnf": deep})),
        ("guided_grammar", json!({"guided_grammar": deep})),
        ("guided_regex", json!({"guided_regex": regex})),
        ("guided_json", json!({"guided_json": schema})),
        ("guided_json", json!({"guided_json": text})),
        ("guided_choice", json!({"guided_choice": ["a".repeat(64 * 1024)]})),
        ("guided_*", json!({"guided_new": {"regex": regex}})),
        ("structured_outputs", json!({"structured_outputs": {"grammar": deep}})),
        ("structured_outputs", json!({"structured_outputs": {"regex": regex}})),
        ("structured_outputs", json!({"structured_outputs": {"json": text}})),
        ("structured_outputs", json!({"structured_outputs": {"whitespace_pattern": regex}})),
        ("structured_outputs", json!({"structured_outputs": {"structural_tag": text}})),
        (
            "response_format",
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}),
        ),
        ("response_format", json!({"response_format": {"type": "json_object", "schema": pattern}})),
        ("response_format", json!({"response_format": {"type": "regex", "value": regex}})),
        ("response_format", json!({"response_format": {"format": {"type": "grammar", "grammar": deep}}})),
        ("json_schema", json!({"json_schema": pattern})),
        ("input_schema", json!({"input_schema": schema})),
        ("grammar_triggers", json!({"grammar_triggers": [{"type": 2, "value": regex}]})),
        ("tools", json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": pattern}}]})),
        ("tools", json!({"tools": [{}, {"name": "f", "input_schema": schema}]})),
        (
            "tools",
            json!({"tools": [{"type": "custom", "custom": {"format": {"grammar": {"definition": deep}}}}]}),
        ),
        ("functions", json!({"functions": [{"parameters": schema}]})),
        ("stop", json!({"stop": ["a".repeat(64 * 1024)]})),
    ] {
        let error = refusal(&body.to_string());
        assert!(matches!(error, RequestError::TooLarge { .. }), "{field}: {error}");
        assert_eq!(error.field(), Some(field));
    }
    let text = json!({"text": {"format": {"type": "json_schema", "schema": schema}}}).to_string();
    assert_eq!(read(OpenAiRoute::Responses, text.as_bytes()).unwrap_err().field(), Some("text"));
    facts(&text);
    let escaped = format!(r#"{{"gr\u0061mmar":{}}}"#, Value::from(deep.as_str()));
    assert_eq!(refusal(&escaped).field(), Some("grammar"));
    let doubled = format!(r#"{{"grammar":{},"grammar":"root ::= \"a\""}}"#, Value::from(deep.as_str()));
    assert_eq!(refusal(&doubled).field(), Some("grammar"));
}

// CLOUD-2804
#[test]
fn what_clients_send_is_within_the_bounds() {
    let schema = json!({"type": "object", "properties": {"regex": {"type": "string", "pattern": "^(a|b)+$"},
        "grammar": {"type": "array", "items": {"enum": ["(((", "{20000}"]}}}, "description": "a {20000} ((("});
    let conversation = json!([{"role": "assistant", "tool_calls": [{"function": {"arguments": "((((" }}],
        "content": [{"type": "tool_use", "input": {"regex": "(".repeat(100)}}]}]);
    let body = json!({
        "messages": conversation, "input": conversation,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema}},
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}],
        "guided_choice": ["(((", "{20000}"], "structured_outputs": {"choice": ["{20000}"], "json": schema},
        "guided_decoding_backend": "xgrammar:no-fallback", "stop": ["\n\n"], "grammar": "root ::= \"(\" [a-z]* \")\"",
    });
    let facts = facts(&body.to_string());
    assert!(facts.has_tools);
}

// CLOUD-2804
#[test]
fn tools_are_bounded_together() {
    let tool = json!({"function": {"description": "d".repeat(60_000), "parameters": {}}});
    facts(&json!({"tools": vec![tool.clone(); 17]}).to_string());
    assert!(matches!(
        refusal(&json!({"tools": vec![tool.clone(); 18]}).to_string()),
        RequestError::Tools { .. }
    ));
    let split = json!({"tools": vec![tool.clone(); 9], "functions": vec![tool; 9]}).to_string();
    assert!(matches!(refusal(&split), RequestError::Tools { .. }));
}

// CLOUD-2806
#[test]
fn a_replay_is_for_one_deterministic_streamed_text() {
    let with = |more: Value| {
        let mut body = json!({"stream": true, "temperature": 0});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        facts(&body.to_string()).not_replayed(CHAT)
    };
    for replayed in [
        json!({}),
        json!({"temperature": 1, "seed": 0}),
        json!({"n": 1, "best_of": 1, "logprobs": false, "tools": [], "echo": false}),
        json!({"prompt": "a"}),
        json!({"prompt": [1, 2, 3]}),
        json!({"prompt": ["a"]}),
    ] {
        assert_eq!(with(replayed.clone()), None, "{replayed}");
    }
    for refused in [
        json!({"stream": false}),
        json!({"temperature": 0.1}),
        json!({"temperature": null}),
        json!({"temperature": 1, "seed": -1}),
        json!({"temperature": 1, "seed": 4_294_967_295_u64}),
        json!({"n": 2}),
        json!({"best_of": 2}),
        json!({"use_beam_search": true}),
        json!({"prompt": ["a", "b"]}),
        json!({"prompt": [[1], [2]]}),
        json!({"tools": [{}]}),
        json!({"functions": [{}]}),
        json!({"logprobs": true}),
        json!({"logprobs": 0}),
        json!({"echo": true}),
        json!({"return_token_ids": true}),
    ] {
        assert!(with(refused.clone()).is_some(), "{refused}");
    }
    let facts = facts(r#"{"stream":true,"temperature":0}"#);
    assert_eq!(facts.not_replayed(OpenAiRoute::Completions), None);
    assert!(facts.not_replayed(OpenAiRoute::Messages).is_some());
}

// CLOUD-2801
#[test]
fn routes_with_whole_answers_only_have_no_stream() {
    let body = br#"{"stream":true}"#;
    for route in OpenAiRoute::ALL {
        assert_eq!(read(route, body).unwrap().stream, route.may_stream(), "{route:?}");
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".*".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[^gmstu]*", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    // CLOUD-2802
    #[test]
    fn what_is_taken_is_json_to_others_too(body in prop::collection::vec(
        prop::sample::select(&b"{}[]\",:\\u00e19.-+eE truefalsn\x01\xc3\xa9"[..]), 0..24)) {
        let mut whole = b"{\"a\":".to_vec();
        whole.extend_from_slice(&body);
        whole.push(b'}');
        let taken = read(CHAT, &whole).is_ok();
        // What is passed over it does not look at.
        let text = std::str::from_utf8(&whole);
        let is_json = text.is_ok_and(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok());
        // Of a text that is skipped nobody asks which halves of pairs it has.
        prop_assert_eq!(taken, is_json, "{}", String::from_utf8_lossy(&whole));
    }

    // CLOUD-2803
    #[test]
    fn a_body_differs_by_its_model_only(before in any_json(), after in any_json(), name in ".{1,20}", has in any::<bool>()) {
        let model = if has { "\"model\" : \"old\"," } else { "" };
        let body = format!("{{\"a\": {before},{model} \"b\":{after} }}");
        let changed = with_model(body.as_bytes(), &facts(&body), &name);
        let read: Value = serde_json::from_slice(&changed).unwrap();
        prop_assert_eq!(read["model"].as_str(), Some(name.as_str()));
        let again = facts(std::str::from_utf8(&changed).unwrap());
        prop_assert_eq!(again.model, Some(name));
        let back = with_model(&changed, &facts(std::str::from_utf8(&changed).unwrap()), "old");
        if has {
            prop_assert_eq!(back, body.as_bytes());
        } else {
            prop_assert_eq!(String::from_utf8(back.to_vec()).unwrap().replacen("\"model\":\"old\",", "", 1), body);
        }
    }
}
