//! What the document shows beside what the code's types say: the examples of `contracts/examples`, the
//! events of streams, and headers.
//!
//! The page of the API fills "Try it out" with the first example of a body, and puts a model of the cluster
//! in the place of `smollm2-135m`, of which all examples are.

use axum::http::StatusCode;
use pool_registry_types::routes::{self as paths, headers};
use serde_json::{Value, json};

/// A body of `contracts/examples/v2`, which the tests of the types read too.
macro_rules! example {
    ($name:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../contracts/examples/v2/", $name))
    };
}

/// Bodies, each with its name.
type NamedBodies = &'static [(&'static str, &'static str)];

/// Method, path, and the bodies that can be sent, each with its name; the first one is tried out.
const REQUESTS: &[(&str, &str, NamedBodies)] = &[
    (
        "post",
        paths::TASKS,
        &[
            ("a chat", example!("task_request_chat.json")),
            ("with everything that can be said", example!("task_request.json")),
            ("vectors of texts", example!("task_request_embedding.json")),
            ("ranks of documents", example!("task_request_rerank.json")),
        ],
    ),
    ("post", paths::PLACEMENT_EXPLAIN, &[("a chat", example!("task_request_chat.json"))]),
    ("post", paths::NODE_REGISTER, &[("a node", example!("register_request.json"))]),
    ("post", paths::NODE_HEARTBEAT, &[("a whole report", example!("heartbeat.json"))]),
    ("post", paths::POOL_DRAIN, &[("within a minute", r#"{"deadline_ms": 60000}"#)]),
    (
        "post",
        paths::POOL_RELOAD,
        &[("a start again", "{}"), ("another model", r#"{"new_model_ref": "smollm2-135m"}"#)],
    ),
    ("post", paths::CATALOG_MODELS, &[("a model", r#"{"model_id": "smollm2-135m", "state": "Active"}"#)]),
    ("post", paths::CATALOG_MODEL_STATE, &[("not placed any more", r#"{"state": "Retired"}"#)]),
    ("post", paths::ARTIFACTS, &[("any JSON", r#"{"kept": "byte for byte"}"#)]),
    (
        "post",
        "/v1/chat/completions",
        &[(
            "a chat",
            r#"{"model": "smollm2-135m", "max_tokens": 64, "messages": [{"role": "user", "content": "What is the capital of France?"}]}"#,
        )],
    ),
    (
        "post",
        "/v1/completions",
        &[("a text", r#"{"model": "smollm2-135m", "max_tokens": 64, "prompt": "Once upon a time"}"#)],
    ),
    (
        "post",
        "/v1/embeddings",
        &[("two texts", r#"{"model": "smollm2-135m", "input": ["the first text", "the second"]}"#)],
    ),
    (
        "post",
        "/v1/rerank",
        &[(
            "two documents",
            r#"{"model": "smollm2-135m", "query": "a red fox", "documents": ["the hen", "a fox"]}"#,
        )],
    ),
    (
        "post",
        "/v1/messages",
        &[(
            "a chat",
            r#"{"model": "smollm2-135m", "max_tokens": 64, "messages": [{"role": "user", "content": "What is the capital of France?"}]}"#,
        )],
    ),
    (
        "post",
        "/v1/messages/count_tokens",
        &[(
            "a chat",
            r#"{"model": "smollm2-135m", "messages": [{"role": "user", "content": "What is the capital of France?"}]}"#,
        )],
    ),
    (
        "post",
        "/v1/responses",
        &[("a turn", r#"{"model": "smollm2-135m", "input": "What is the capital of France?"}"#)],
    ),
    ("post", "/tokenize", &[("a text", r#"{"model": "smollm2-135m", "content": "Once upon a time"}"#)]),
    ("post", "/detokenize", &[("three tokens", r#"{"model": "smollm2-135m", "tokens": [1, 2, 3]}"#)]),
    (
        "post",
        "/apply-template",
        &[("a chat", r#"{"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hello"}]}"#)],
    ),
];

/// Method, path, status, and what is answered.
const ANSWERS: &[(&str, &str, &str, &str)] = &[
    ("post", paths::TASKS, "202", example!("task_accepted.json")),
    ("get", paths::TASKS, "200", example!("tasks.json")),
    ("get", paths::TASK_EXPLAIN, "200", example!("explanation.json")),
    ("post", paths::PLACEMENT_EXPLAIN, "200", example!("explanation.json")),
    ("get", paths::SESSION, "200", example!("session.json")),
    ("get", paths::NODES, "200", example!("nodes.json")),
    ("post", paths::NODE_REGISTER, "200", example!("register_answer.json")),
    ("post", paths::NODE_HEARTBEAT, "200", example!("heartbeat_answer.json")),
    ("get", paths::POOLS, "200", example!("pools.json")),
    ("post", paths::POOL_DRAIN, "202", example!("pool_ordered.json")),
    ("post", paths::POOL_RELOAD, "202", example!("pool_ordered.json")),
    ("post", paths::POOL_PURGE, "202", example!("pool_ordered.json")),
    ("get", paths::CATALOG_AVAILABILITY, "200", example!("availability.json")),
];

/// Schemas whose values stand in no answer of their own.
const SCHEMAS: &[(&str, &[&str])] = &[
    ("ErrorBody", &[example!("error.json")]),
    ("Metrics", &[example!("metrics.json")]),
    ("Started", &[example!("started.json")]),
    ("Token", &[example!("token.json"), example!("reasoning.json")]),
    ("EmbeddingResult", &[example!("result_embedding.json")]),
    ("RerankResult", &[example!("result_rerank.json")]),
    ("End", &[example!("end.json")]),
    (
        "ClusterChange",
        &[example!("change_node.json"), example!("change_pool.json"), example!("change_task.json")],
    ),
];

/// The events of a task's stream, each with the schemas of its data.
const TASK_EVENTS: &[(&str, &[&str])] = &[
    ("metrics", &["Metrics"]),
    ("started", &["Started"]),
    ("reasoning", &["Token"]),
    ("token", &["Token"]),
    ("result", &["EmbeddingResult", "RerankResult"]),
    ("end", &["End"]),
    ("error", &["ErrorBody"]),
];
/// The events of `GET /v2/events`.
const CLUSTER_EVENTS: &[(&str, &[&str])] = &[
    ("node", &["ClusterChange"]),
    ("pool", &["ClusterChange"]),
    ("task", &["ClusterChange"]),
    ("missed", &["Missed"]),
];

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).expect("every example is JSON")
}

/// On one line, as data of an event.
fn data(text: &str) -> String {
    parsed(text).to_string()
}

/// Completes the document.
pub(crate) fn add(document: &mut Value) {
    for (method, path, bodies) in REQUESTS {
        let content = &mut document["paths"][path][method]["requestBody"]["content"]["application/json"];
        for (name, body) in *bodies {
            content["examples"][name] = json!({"value": parsed(body)});
        }
    }
    for (method, path, status, body) in ANSWERS {
        let answer = &mut document["paths"][path][method]["responses"][status];
        answer["content"]["application/json"]["example"] = parsed(body);
    }
    let schemas = &mut document["components"]["schemas"];
    // How many changes were not told.
    schemas["Missed"] = json!({"type": "object", "required": ["changes"],
        "description": "Event `missed`: so many changes were lost to whoever reads too slowly.",
        "properties": {"changes": {"type": "integer", "minimum": 1}}, "examples": [{"changes": 12}]});
    for (name, examples) in SCHEMAS {
        schemas[name]["examples"] = examples.iter().map(|text| parsed(text)).collect();
    }
    let log = "5a0c2f0e-52a8-8f39-a5a2-3f4f5e9b7b21";
    let stream = format!(
        "event: started\ndata: {}\n\nid: {log}:7\nevent: token\ndata: {}\n\nid: {log}:8\nevent: end\ndata: {}\n\n",
        data(example!("started.json")),
        data(example!("token.json")),
        data(example!("end.json"))
    );
    for (method, path) in [("post", paths::TASKS), ("get", paths::TASK_EVENTS)] {
        add_stream(&mut document["paths"][path][method], TASK_EVENTS, &stream);
    }
    let stream = format!("event: task\ndata: {}\n\n", data(example!("change_task.json")));
    add_stream(&mut document["paths"][paths::EVENTS]["get"], CLUSTER_EVENTS, &stream);
    for status in ["200", "202"] {
        let answer = &mut document["paths"][paths::TASKS]["post"]["responses"][status];
        answer["headers"][headers::TASK_ID] = json!({"required": true, "description": "The task's id.", "schema": {"type": "string", "format": "uuid"}});
    }
    let all = document["paths"].as_object_mut().expect("a document has paths");
    for (path, item) in all {
        for operation in item.as_object_mut().expect("a path has operations").values_mut() {
            let is_gateways = path.starts_with("/v1/");
            if is_gateways && operation["requestBody"].is_object() {
                add_parameters(operation);
            }
            let answers = operation["responses"].as_object_mut().expect("an operation has answers");
            for (status, answer) in answers {
                // OpenAPI wants one of every answer, and utoipa leaves out those that are empty.
                if answer["description"].is_null() {
                    let code = StatusCode::from_bytes(status.as_bytes()).ok();
                    let phrase = code.and_then(|code| code.canonical_reason()).unwrap_or("an answer");
                    answer["description"] = json!(phrase.to_lowercase());
                }
                add_headers(status, is_gateways, &mut answer["headers"]);
            }
        }
    }
}

/// OpenAPI has no word for the events of a stream: their schemas stand in an extension, and in words.
fn add_stream(operation: &mut Value, events: &[(&str, &[&str])], example: &str) {
    let content = &mut operation["responses"]["200"]["content"]["text/event-stream"];
    content["example"] = json!(example);
    let mut words = Vec::new();
    for (event, schemas) in events {
        let of = |schema: &&str| json!({"$ref": format!("#/components/schemas/{schema}")});
        let shape = match schemas {
            [one] => of(one),
            several => json!({"oneOf": several.iter().map(of).collect::<Vec<_>>()}),
        };
        content["x-event-schemas"][event] = shape;
        words.push(format!("`{event}` ({})", schemas.join(" or ")));
    }
    let before = operation["description"].as_str().map_or_else(String::new, |text| format!("{text}\n\n"));
    operation["description"] =
        json!(format!("{before}Events, with the schemas of their data: {}.", words.join(", ")));
}

fn add_headers(status: &str, is_gateways: bool, all: &mut Value) {
    let mut add = |name: &str, description: &str, schema: Value| {
        if all[name].is_null() {
            all[name] = json!({"required": false, "description": description, "schema": schema});
        }
    };
    let is_refusal = status.starts_with(['4', '5']);
    let number = || json!({"type": "integer", "minimum": 0});
    if is_refusal {
        add("retry-after", "Seconds until the same request may succeed.", number());
        add(headers::BACKOFF_MS, "The same in milliseconds.", number());
    }
    if !is_gateways {
        return;
    }
    let text = || json!({"type": "string"});
    add(headers::REQUEST_ID, "The task's id; of a request that is none its correlation id.", text());
    add(headers::ANTHROPIC_REQUEST_ID, "The same.", text());
    add(headers::TASK_ID, "The task's id, where one was made.", text());
    add(headers::NODE, "The node that has answered.", text());
    add(headers::RATE_LIMIT, "Requests that the token may make.", text());
    add(headers::RATE_REMAINING, "Requests that are left of them.", text());
    add(headers::RATE_RESET, "How long until they are all there again.", text());
    if is_refusal {
        add(headers::ERROR, "Our own code, as in ErrorBody.", text());
        add(headers::SHOULD_RETRY, "`false` where the same request will not succeed.", text());
    }
}

/// What a client may say of a request under `/v1` beside its body.
fn add_parameters(operation: &mut Value) {
    let mut parameter = |name: &str, description: &str, schema: Value| {
        let parameter = json!({"name": name, "in": "header", "required": false, "description": description, "schema": schema});
        match operation["parameters"].as_array_mut() {
            Some(all) => all.push(parameter),
            None => operation["parameters"] = json!([parameter]),
        }
    };
    let words = |words: &[&str]| json!({"type": "string", "enum": words});
    parameter(
        "X-Request-Timeout-Ms",
        "Within how many milliseconds the answer must be whole.",
        json!({"type": "integer", "minimum": 1}),
    );
    parameter("X-LLORCH-Priority", "The lane that the request waits in.", words(&["interactive", "batch"]));
    parameter(
        "X-LLORCH-Recovery",
        "What becomes of a stream whose node or engine is lost.",
        words(&["continue", "fail"]),
    );
    parameter(
        "X-Session-Id",
        "Requests of one session go where its context is, where that is free.",
        json!({"type": "string"}),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::router::document;

    // CLOUD-3030
    #[test]
    fn every_example_stands_where_there_is_something_to_be_an_example_of() {
        let document: Value = serde_json::from_str(&document()).unwrap();
        for (method, path, bodies) in REQUESTS {
            let content = &document["paths"][path][method]["requestBody"]["content"]["application/json"];
            assert!(content["schema"].is_object(), "{method} {path} takes a body");
            assert_eq!(content["examples"].as_object().unwrap().len(), bodies.len(), "{path}");
        }
        for (method, path, status, _) in ANSWERS {
            let answer = &document["paths"][path][method]["responses"][status];
            assert!(answer["content"]["application/json"]["schema"].is_object(), "{method} {path} {status}");
            assert!(answer["description"].is_string(), "{method} {path} answers {status}");
        }
        // Each body that a client sends has one.
        for (path, item) in document["paths"].as_object().unwrap() {
            let content = &item["post"]["requestBody"]["content"]["application/json"];
            let is_named = REQUESTS.iter().any(|(_, of, _)| of == path) || *path == paths::POOL_PURGE;
            assert!(content.is_null() || is_named, "{path} has no example");
        }
    }

    // CLOUD-3031
    #[test]
    fn every_event_of_a_stream_has_its_schema() {
        let document: Value = serde_json::from_str(&document()).unwrap();
        let mut schemas = std::collections::BTreeSet::new();
        for (method, path) in [("post", paths::TASKS), ("get", paths::TASK_EVENTS), ("get", paths::EVENTS)] {
            let operation = &document["paths"][path][method];
            let content = &operation["responses"]["200"]["content"]["text/event-stream"];
            assert!(content["example"].as_str().unwrap().ends_with("\n\n"), "{path}");
            for (event, shape) in content["x-event-schemas"].as_object().unwrap() {
                assert!(
                    operation["description"].as_str().unwrap().contains(&format!("`{event}`")),
                    "{event}"
                );
                let shapes = shape["oneOf"].as_array().map_or(std::slice::from_ref(shape), Vec::as_slice);
                schemas.extend(shapes.iter().map(|shape| shape["$ref"].as_str().unwrap().to_owned()));
            }
        }
        for schema in &schemas {
            let shape = document.pointer(schema.trim_start_matches('#'));
            assert!(shape.is_some_and(|shape| shape["examples"][0].is_object()), "{schema}");
        }
        assert_eq!(schemas.len(), 9, "{schemas:?}");
    }

    // CLOUD-3033
    #[test]
    fn the_page_knows_the_model_of_the_examples() {
        let script = include_str!("api_page.js");
        assert!(script.contains("\"smollm2-135m\"") && script.contains("/v1/models"));
        for (_, path, bodies) in REQUESTS.iter().filter(|(_, path, _)| path.starts_with("/v1/")) {
            assert!(bodies[0].1.contains("\"model\": \"smollm2-135m\""), "{path}");
        }
    }

    // CLOUD-3032
    #[test]
    fn answers_name_their_headers() {
        let document: Value = serde_json::from_str(&document()).unwrap();
        let names = |method: &str, path: &str, status: &str| {
            let all = &document["paths"][path][method]["responses"][status]["headers"];
            all.as_object().unwrap().keys().cloned().collect::<Vec<_>>()
        };
        for status in ["200", "202"] {
            assert!(names("post", paths::TASKS, status).contains(&headers::TASK_ID.to_owned()));
        }
        assert!(names("post", paths::TASKS, "503").contains(&"retry-after".to_owned()));
        let refused = names("post", "/v1/chat/completions", "4XX");
        // What pages of other origins may read is what there is.
        for name in headers::FOR_CLIENTS {
            assert!(refused.contains(&name.to_owned()), "{name} is not among {refused:?}");
        }
    }

    // CLOUD-3034
    #[test]
    fn a_summary_stands_alone_and_fits_on_a_line() {
        let document: Value = serde_json::from_str(&document()).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                let summary = operation["summary"].as_str().unwrap_or_default();
                let place = format!("{method} {path}: {summary:?}");
                assert!((12..=100).contains(&summary.chars().count()), "{place}");
                assert!(!summary.contains('\n') && !summary.ends_with("them."), "{place}");
                assert!(!summary.contains("The same") && !summary.starts_with("All entries"), "{place}");
                assert!(seen.insert(summary.to_owned()), "{place} is another's too");
            }
        }
    }
}
