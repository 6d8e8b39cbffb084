//! Clients see what is their own holder's and nothing else, on every route; operators look at all of it.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use e2e_cloud::client::changes_during;
use e2e_cloud::cluster::TOKEN;
use e2e_cloud::process::program;
use e2e_cloud::{Client, Cluster, Options, eventually};
use reqwest::Method;
use serde_json::{Value, json};

use crate::security::CONTROL_PLANE;

/// What a client is given by a route of what is another holder's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shown {
    /// Nothing there is anybody's.
    Nobodys,
    /// It is as if it were not there.
    NotFound,
    /// It is left out.
    LeftOut,
    /// The same id, or the same bytes, are another thing.
    Another,
}

const ROUTES: &[(&str, Shown)] = &[
    ("DELETE /v2/catalog/models/{model_id}", Shown::Nobodys),
    ("DELETE /v2/nodes/{node_id}", Shown::Nobodys),
    ("DELETE /v2/sessions/{session_id}", Shown::NotFound),
    ("GET /docs", Shown::Nobodys),
    ("GET /health/live", Shown::Nobodys),
    ("GET /health/ready", Shown::Nobodys),
    ("GET /metrics", Shown::Nobodys),
    ("GET /nowhere", Shown::Nobodys),
    ("GET /openapi.json", Shown::Nobodys),
    ("GET /v1/models", Shown::Nobodys),
    ("GET /v1/models/{model}", Shown::Nobodys),
    ("GET /v2/artifacts/{digest}", Shown::NotFound),
    ("GET /v2/catalog/availability", Shown::Nobodys),
    ("GET /v2/catalog/models", Shown::Nobodys),
    ("GET /v2/catalog/models/{model_id}", Shown::Nobodys),
    ("GET /v2/events", Shown::LeftOut),
    ("GET /v2/meta/capabilities", Shown::Nobodys),
    ("GET /v2/meta/version", Shown::Nobodys),
    ("GET /v2/nodes", Shown::LeftOut),
    ("GET /v2/nodes/{node_id}", Shown::LeftOut),
    ("GET /v2/observability/targets", Shown::Nobodys),
    ("GET /v2/pools", Shown::LeftOut),
    ("GET /v2/pools/{pool_id}/health", Shown::LeftOut),
    ("GET /v2/pools/{pool_id}/logs", Shown::Nobodys),
    ("GET /v2/sessions/{session_id}", Shown::NotFound),
    ("GET /v2/tasks", Shown::LeftOut),
    ("GET /v2/tasks/{task_id}", Shown::NotFound),
    ("GET /v2/tasks/{task_id}/events", Shown::NotFound),
    ("GET /v2/tasks/{task_id}/explain", Shown::NotFound),
    ("POST /apply-template", Shown::Another),
    ("POST /detokenize", Shown::Another),
    ("POST /tokenize", Shown::Another),
    ("POST /v1/chat/completions", Shown::Another),
    ("POST /v1/completions", Shown::Another),
    ("POST /v1/embeddings", Shown::Another),
    ("POST /v1/messages", Shown::Another),
    ("POST /v1/messages/count_tokens", Shown::Another),
    ("POST /v1/rerank", Shown::Another),
    ("POST /v1/responses", Shown::Another),
    ("POST /v2/artifacts", Shown::Another),
    ("POST /v2/catalog/models", Shown::Nobodys),
    ("POST /v2/catalog/models/{model_id}/state", Shown::Nobodys),
    ("POST /v2/catalog/models/{model_id}/verify", Shown::Nobodys),
    ("POST /v2/nodes/register", Shown::Nobodys),
    ("POST /v2/nodes/{node_id}/drain", Shown::Nobodys),
    ("POST /v2/nodes/{node_id}/heartbeat", Shown::Nobodys),
    ("POST /v2/nodes/{node_id}/resume", Shown::Nobodys),
    ("POST /v2/placement/explain", Shown::Another),
    ("POST /v2/pools/{pool_id}/drain", Shown::Nobodys),
    ("POST /v2/pools/{pool_id}/purge", Shown::Nobodys),
    ("POST /v2/pools/{pool_id}/reload", Shown::Nobodys),
    ("POST /v2/tasks", Shown::Another),
    ("POST /v2/tasks/{task_id}/cancel", Shown::NotFound),
    ("PUT /v2/log-level", Shown::Nobodys),
];

const SHOP: &str = "test-token-of-the-shop";
const SHOP_TOO: &str = "test-token-of-the-shop-too";
const INN: &str = "test-token-of-the-inn";
const OPERATOR: &str = "test-token-of-an-operator";

const TASK: &str = "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b11";
const SESSION: &str = "7f3b1c52-64a5-4c56-9e1e-0a3e0f3d2b12";

/// With the folder of its file of tokens.
async fn cluster() -> (Cluster, tempfile::TempDir) {
    let entry = |name: &str, token: &str, scope: &str| {
        format!("[[token]]\nname = \"{name}\"\ntoken = \"{token}\"\nscopes = [\"{scope}\"]\n")
    };
    let text = entry("admin", TOKEN, "admin")
        + &entry("shop", SHOP, "client")
        + &entry("shop", SHOP_TOO, "client")
        + &entry("inn", INN, "client")
        + &entry("ann", OPERATOR, "operator");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.toml");
    std::fs::write(&file, text).unwrap();
    let path = file.display().to_string();
    let options = Options { nodes: 1, control: vec![("LLORCH_API_TOKEN_FILE", path)], ..Options::default() };
    (Cluster::start(options).await, dir)
}

/// The status of an operation on these ids, and its answer where it has an end.
async fn ask(client: &Client, operation: &str, ids: &BTreeMap<&str, String>) -> (u16, String) {
    let (method, path) = operation.split_once(' ').unwrap();
    let path = ids.iter().fold(path.to_owned(), |path, (name, id)| path.replace(&format!("{{{name}}}"), id));
    let request = client.request(method.parse::<Method>().unwrap(), &path).timeout(Duration::from_secs(10));
    let response = request.send().await.expect("an answer");
    let status = response.status().as_u16();
    let endless = status == 200 && path.ends_with("/events");
    (status, if endless { String::new() } else { response.text().await.unwrap() })
}

fn rows(shown: Shown) -> impl Iterator<Item = &'static str> {
    ROUTES.iter().filter(move |(_, of)| *of == shown).map(|(operation, _)| *operation)
}

async fn task_of(client: &Client) -> Option<Value> {
    client.get_json(&format!("/v2/tasks/{TASK}")).await.filter(|task| task["task_id"] == TASK)
}

// CLOUD-2703
// CLOUD-2705
// CLOUD-2706
// CLOUD-2707
// CLOUD-2708
// CLOUD-2943
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_route_shows_a_client_what_is_its_own_holders_and_an_operator_all_but_contents() {
    let table: Vec<&str> = CONTROL_PLANE.iter().map(|(operation, _)| *operation).collect();
    assert_eq!(ROUTES.iter().map(|(operation, _)| *operation).collect::<Vec<_>>(), table);
    let (cluster, _dir) = cluster().await;
    let [shop, shop_too, inn, operator] =
        [SHOP, SHOP_TOO, INN, OPERATOR].map(|token| Client::new(&cluster.client.base, Some(token)));
    let events_of = async |client: &Client| client.request(Method::GET, "/v2/events").send().await.unwrap();
    let (followed_by_shop, followed_by_inn) = (events_of(&shop).await, events_of(&inn).await);
    let mut task = cluster.task(1_500);
    (task["task_id"], task["session_id"]) = (TASK.into(), SESSION.into());
    assert_eq!(shop.post("/v2/tasks", &task).await.status(), 202);
    let document = json!({"of": "the shop"});
    let artifact: Value = shop.post("/v2/artifacts", &document).await.json().await.unwrap();
    let attempt = eventually("it runs", Duration::from_secs(10), || async {
        Some(task_of(&shop).await?["attempts"][0]["attempt_id"].as_str()?.to_owned())
    })
    .await;
    let digest = artifact["id"].as_str().unwrap().to_owned();
    let pool = cluster.client.nodes().await[0].pools[0].report.pool_id.to_string();
    let ids = BTreeMap::from([
        ("task_id", TASK.to_owned()),
        ("session_id", SESSION.to_owned()),
        ("digest", digest.clone()),
        ("node_id", "gpu-node-1".to_owned()),
        ("pool_id", pool),
    ]);
    let mut nobodys = ids.clone();
    nobodys.insert("task_id", "00000000-64a5-4c56-9e1e-0a3e0f3d2b11".into());
    nobodys.insert("session_id", "00000000-64a5-4c56-9e1e-0a3e0f3d2b12".into());
    nobodys.insert("digest", format!("sha256:{}", "0".repeat(64)));
    let without = |text: &str, ids: &BTreeMap<&str, String>| {
        let mut body: Value = serde_json::from_str(text).unwrap();
        body["correlation_id"] = Value::Null;
        ids.values().fold(body.to_string(), |text, id| text.replace(id.as_str(), "…"))
    };
    for operation in rows(Shown::NotFound) {
        let (status, body) = ask(&inn, operation, &ids).await;
        assert!(status == 404 && body.contains("\"NOT_FOUND\""), "{operation}: {status} {body}");
        let (status, absent) = ask(&inn, operation, &nobodys).await;
        assert_eq!(status, 404, "{operation}");
        assert_eq!(without(&body, &ids), without(&absent, &nobodys), "nothing tells them apart");
    }
    assert_eq!(task_of(&shop).await.unwrap()["state"], "running", "nobody has ended it");
    for operation in rows(Shown::NotFound).filter(|operation| operation.starts_with("GET")) {
        let (status, body) = ask(&shop_too, operation, &ids).await;
        assert_eq!(status, 200, "a token of the same name, {operation}: {body}");
    }
    let shows = |text: &str| [TASK, SESSION, &attempt].map(|id| text.contains(id)).contains(&true);
    for operation in rows(Shown::LeftOut).filter(|operation| *operation != "GET /v2/events") {
        let (status, body) = ask(&inn, operation, &ids).await;
        assert!(status == 200 && !shows(&body), "{operation}: {status} {body}");
    }
    for path in ["/v2/tasks", "/v2/nodes", "/v2/nodes/gpu-node-1"] {
        for client in [&shop, &operator] {
            eventually("its own are shown", Duration::from_secs(5), || async {
                shows(&client.get(path).await.ok()?.text().await.ok()?).then_some(())
            })
            .await;
        }
    }
    // What quotes a node's files is for operators (CLOUD-2943).
    std::fs::write(cluster.nodes[0].runtime_dir.join("p-r0.json"), "{}").unwrap();
    let problems_of = |answer: &Value, path: &str| match path {
        "/v2/pools" => answer["problems"].clone(),
        _ => answer["nodes"][0]["problems"].clone(),
    };
    for path in ["/v2/pools", "/v2/nodes"] {
        eventually("an operator sees it", Duration::from_secs(6), || async {
            let answer = operator.get_json(path).await?;
            (problems_of(&answer, path)[0]["file"] == "p-r0.json").then_some(())
        })
        .await;
        let answer = shop.get_json(path).await.unwrap();
        assert!(
            problems_of(&answer, path).is_null() && answer.to_string().contains("gpu-node-1"),
            "{answer}"
        );
    }
    // The same ids are other things.
    let mut others = cluster.task(1_500);
    (others["task_id"], others["session_id"]) = (TASK.into(), SESSION.into());
    others["prompt"] = "another prompt".into();
    assert_eq!(inn.post("/v2/tasks", &others).await.status(), 202);
    let of_inn = eventually("it runs too", Duration::from_secs(10), || async {
        Some(task_of(&inn).await?["attempts"][0]["attempt_id"].as_str()?.to_owned())
    })
    .await;
    assert_ne!(of_inn, attempt);
    let session = inn.get_json(&format!("/v2/sessions/{SESSION}")).await.unwrap();
    assert_eq!((&session["turns"], &session["session_id"]), (&json!(1), &json!(SESSION)));
    let again: Value = inn.post("/v2/artifacts", &document).await.json().await.unwrap();
    assert_eq!(again["id"], digest);
    assert_eq!(inn.get_json(&format!("/v2/artifacts/{digest}")).await, Some(document));
    let explained = inn.post("/v2/placement/explain", &others).await;
    assert_eq!(explained.status(), 200);
    // An operator looks at all of it, and says whose it means.
    let of = async |operation: &str, holder: &str| {
        let (method, path) = operation.split_once(' ').unwrap();
        let path = format!("{}{holder}", path.replace("{task_id}", TASK).replace("{digest}", &digest));
        let request = operator.request(method.parse::<Method>().unwrap(), &path);
        let response = request.timeout(Duration::from_secs(10)).send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap_or_default())
    };
    let (status, ambiguous) = of("GET /v2/tasks/{task_id}", "").await;
    assert_eq!((status, &ambiguous["code"]), (409, &json!("HOLDER_AMBIGUOUS")), "{ambiguous}");
    let (_, view) = of("GET /v2/tasks/{task_id}", "?holder=shop").await;
    assert_eq!((&view["holder"], &view["task_id"]), (&json!("shop"), &json!(TASK)));
    assert_eq!(view["attempts"][0]["attempt_id"], json!(attempt));
    eventually("both are listed", Duration::from_secs(5), || async {
        let (_, listed) = of("GET /v2/tasks", "").await;
        let holders = listed["tasks"].as_array()?.iter().map(|task| task["holder"].as_str());
        (holders.collect::<Vec<_>>() == [Some("inn"), Some("shop")]).then_some(())
    })
    .await;
    for contents in ["GET /v2/tasks/{task_id}/events", "GET /v2/artifacts/{digest}"] {
        assert_eq!(of(contents, "?holder=shop").await.0, 403, "{contents}");
    }
    assert_eq!(of("POST /v2/tasks/{task_id}/cancel", "?holder=shop").await.0, 204);
    assert_eq!(task_of(&shop).await.unwrap()["state"], "canceled");
    assert_eq!(task_of(&inn).await.unwrap()["state"], "running", "the other goes on");
    // Whoever follows what happens heard of its own task alone.
    for (followed, client, states) in
        [(followed_by_shop, &shop, "canceled"), (followed_by_inn, &inn, "running")]
    {
        let changes = changes_during(followed, Duration::from_millis(500)).await;
        let last = changes.iter().rev().find(|(name, _)| name == "task").map(|(_, data)| data);
        assert_eq!(last.unwrap()["state"], states, "{:?} {changes:?}", client.token.is_some());
        let of_tasks = changes.iter().filter(|(name, _)| name == "task").count();
        assert_eq!(of_tasks, if states == "canceled" { 3 } else { 2 }, "{changes:?}");
    }
    assert_eq!(inn.post(&format!("/v2/tasks/{TASK}/cancel"), &Value::Null).await.status(), 204);
}

// CLOUD-2704
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_tasks_of_one_id_stream_side_by_side_from_one_node() {
    let (cluster, _dir) = cluster().await;
    let [shop, inn] = [SHOP, INN].map(|token| Client::new(&cluster.client.base, Some(token)));
    let mut task = cluster.task(40);
    task["task_id"] = TASK.into();
    let (one, other) = tokio::join!(shop.run(task.clone()), inn.run(task));
    for transcript in [one, other] {
        assert!(transcript.completed(), "{transcript:?}");
        transcript.check();
        assert_eq!((transcript.tokens().len(), transcript.task_id.as_str()), (40, TASK));
    }
}

// CLOUD-2701
#[test]
fn an_entry_for_the_file_of_tokens_is_made_and_checked() {
    let run = |arguments: &[&str]| {
        let output = Command::new(program("orchestratord")).args(arguments).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let (good, entry) = run(&["token", "new", "--scope", "operator", "--name", "ann"]);
    assert!(good && entry.contains("name = \"ann\"") && entry.contains("scopes = [\"operator\"]"), "{entry}");
    let (good, both) = run(&["token", "new", "--scope", "client", "--scope", "operator"]);
    assert!(good && both.contains("scopes = [\"client\", \"operator\"]"), "{both}");
    assert!(!run(&["token", "new", "--name", "ann"]).0, "a plain token has no name");
    assert!(!run(&["token", "new", "--scope", "god"]).0);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.toml");
    std::fs::write(&file, entry + &both).unwrap();
    let (good, listed) = run(&["token", "check", &file.display().to_string()]);
    assert!(good && listed.contains(" ann operator\n") && listed.contains(" client,operator\n"), "{listed}");
}
