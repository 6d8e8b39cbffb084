//! What engines compile is bounded under `/v1` as on `/v2`: shown on the real engine, which the same texts
//! would kill or stop.

use e2e_cloud::{Cluster, Engine, Options, real_engine};
use serde_json::{Value, json};

use super::{CHAT, post};
use crate::real_engine::hostile_grammars;

/// A cluster of one node that runs the engine itself, once it is ready.
async fn supervised() -> Cluster {
    let pools = vec![(0, real_engine::pool("pool-0", "tiny", ""))];
    let options = Options { nodes: 1, engine: Engine::Tiny { slots: 2 }, pools, ..Options::default() };
    Cluster::start(options).await
}

/// The engine lives, was never started anew, and answers.
async fn is_well(cluster: &Cluster) {
    let pool = cluster.node_client(0).get_json("/v2/pools/pool-0/status").await.expect("its status");
    assert_eq!((pool["state"].as_str(), pool["supervised"]["restarts"].as_u64()), (Some("ready"), Some(0)));
    let body = json!({"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]});
    assert_eq!(post(&cluster.client, CHAT, body.to_string()).await.status(), 200);
}

/// Schemas as texts: deep, long, and with lengths that engines write out.
fn schemas() -> Vec<String> {
    vec![
        "{\"items\":".repeat(100) + "{}" + &"}".repeat(100),
        json!({"type": "string", "enum": vec!["x".repeat(1_000); 70]}).to_string(),
        json!({"type": "string", "maxLength": 1_000_000}).to_string(),
        json!({"type": "array", "minItems": 300_000, "items": {"type": "string"}}).to_string(),
        json!({"type": "string", "pattern": format!("^{}a{}$", "(".repeat(200), ")".repeat(200))})
            .to_string(),
        json!({"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"}).to_string(),
    ]
}

/// `text` is JSON, or a JSON string of it.
fn body(field: &str, value: &str) -> String {
    format!(
        "{{\"model\":\"tiny\",\"max_tokens\":4,\"messages\":[{{\"role\":\"user\",\"content\":\"hi\"}}],\"prompt\":\"hi\",{field}:{value}}}"
    )
}

fn bodies() -> Vec<String> {
    let mut bodies = Vec::new();
    for grammar in hostile_grammars() {
        let text = Value::from(grammar).to_string();
        bodies.push(body("\"grammar\"", &text));
        bodies.push(body("\"gramm\\u0061r\"", &text));
        bodies.push(body("\"guided_grammar\"", &text));
        bodies.push(body("\"structured_outputs\"", &format!("{{\"grammar\":{text}}}")));
        bodies.push(body("\"response_format\"", &format!("{{\"type\":\"grammar\",\"grammar\":{text}}}")));
    }
    for schema in schemas() {
        bodies.push(body("\"json_schema\"", &schema));
        bodies.push(body(
            "\"response_format\"",
            &format!("{{\"type\":\"json_schema\",\"json_schema\":{{\"name\":\"x\",\"schema\":{schema}}}}}"),
        ));
        bodies
            .push(body("\"response_format\"", &format!("{{\"type\":\"json_object\",\"schema\":{schema}}}")));
        bodies.push(body("\"structured_outputs\"", &format!("{{\"json\":{schema}}}")));
        let function = format!("{{\"name\":\"f\",\"parameters\":{schema}}}");
        bodies.push(body("\"tools\"", &format!("[{{\"type\":\"function\",\"function\":{function}}}]")));
        bodies.push(body("\"tools\"", &format!("[{{\"name\":\"f\",\"input_schema\":{schema}}}]")));
        bodies.push(body("\"functions\"", &format!("[{function}]")));
        bodies.push(body("\"guided_json\"", &Value::from(schema).to_string()));
    }
    // Each of them is small, and together they are not.
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"description": "x".repeat(60_000)}}});
    bodies.push(body("\"tools\"", &Value::from(vec![tool; 20]).to_string()));
    bodies
}

// CLOUD-1210
// CLOUD-1216
// CLOUD-2804
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_would_kill_or_stop_a_real_engine_does_not_reach_it_under_v1_either() {
    let cluster = supervised().await;
    let bodies = bodies();
    for body in &bodies {
        for path in [CHAT, "/v1/completions", "/v1/messages", "/v1/responses"] {
            let answer = post(&cluster.client, path, body.clone()).await;
            let (status, text) = (answer.status().as_u16(), answer.text().await.expect("a body"));
            let begins: String = body.chars().take(200).collect();
            assert_eq!(status, 400, "{path}: {begins} … {text}");
            assert!(text.contains("invalid_request_error"), "{path}: {begins} … {text}");
            assert!(!text.contains("the engine"), "it did not come so far, {path}: {text}");
        }
    }
    eprintln!("{} attacks on four routes", bodies.len());
    is_well(&cluster).await;
}

// CLOUD-2804
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_grammars_schemas_and_tools_reach_a_real_engine_under_v1() {
    let cluster = supervised().await;
    let grammars = real_engine::grammars();
    for (name, grammar) in &grammars {
        let answer = post(
            &cluster.client,
            "/v1/completions",
            body("\"grammar\"", &Value::from(grammar.as_str()).to_string()),
        )
        .await;
        assert_eq!(answer.status(), 200, "{name}");
    }
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
    let function = json!({"name": "f", "description": "x", "parameters": schema});
    for (field, value) in [
        (
            "\"response_format\"",
            json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}),
        ),
        ("\"tools\"", json!([{"type": "function", "function": function}])),
    ] {
        let answer = post(&cluster.client, CHAT, body(field, &value.to_string())).await;
        let (status, text) = (answer.status(), answer.text().await.expect("a body"));
        assert_eq!(status, 200, "{field}: {text}");
    }
    is_well(&cluster).await;
}
