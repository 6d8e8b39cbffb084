//! Bodies of POSTs: the golden ones of `contracts/examples`, newer ones, bounds, and payloads.

use std::path::Path;

use attempt_link::wire::{
    ControlAnswer, ControlBody, LifeId, LinkKey, LinkQuery, MAX_IDS, MAX_INLINE_BYTES, MAX_LINE_BYTES,
    MAX_SEEN, MAX_STARTS, Seen, SingleError, Start, StartFacts, StartSpec, WriteError, WrittenStart,
    read_single, read_starts, write_single, write_starts,
};
use bytes::Bytes;
use pool_registry_types::task::{Reasoning, TaskRequest};
use pool_registry_types::{AttemptId, BootId, ModelRef, TaskId, TraceContext};
use proptest::prelude::*;
use serde_json::{Value, json};
use task_stream::{BodyDigest, OpenAiRoute, Passage, Payload, PayloadFormat, TaskSpec};
use uuid::Uuid;

fn example(name: &str) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../contracts/examples").join(name);
    std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

fn key() -> LinkKey {
    LinkKey { life: LifeId(Uuid::from_u128(1)), lane: 2, n: 3 }
}

fn facts() -> StartFacts {
    let body: Value = serde_json::from_str(&example("link/attempts.json")).unwrap();
    serde_json::from_value(body["start"][0].clone()).unwrap()
}

fn start(number: u64, payload: &str) -> Start {
    let payload =
        Payload { format: PayloadFormat::Native, bytes: Bytes::copy_from_slice(payload.as_bytes()) };
    Start::new(StartFacts { number, ..facts() }, &payload)
}

// CLOUD-2604
#[test]
fn the_golden_bodies_are_read_and_written_as_they_stand() {
    let text = example("link/attempts.json");
    let body = read_starts(&Bytes::from(text.clone())).unwrap();
    let starts: Vec<_> = body.start.into_iter().map(|start| WrittenStart::new(&start.unwrap())).collect();
    let written = write_starts(body.key, &starts, &body.seen, &body.done).unwrap();
    let value = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
    assert_eq!(value(&written), value(text.as_bytes()));
    for name in ["link/control.json", "newer/link_control.json"] {
        let read: ControlBody = serde_json::from_str(&example(name)).unwrap();
        assert_eq!(json!(read), value(example("link/control.json").as_bytes()), "{name}");
    }
    for name in ["link/control_answer.json", "newer/link_control_answer.json"] {
        let read: ControlAnswer = serde_json::from_str(&example(name)).unwrap();
        assert_eq!(json!(read), value(example("link/control_answer.json").as_bytes()), "{name}");
    }
    let (boot_id, life) = (BootId(Uuid::from_u128(5)), LifeId(Uuid::from_u128(1)));
    let query = LinkQuery { boot_id, life, lane: 2, n: 3 };
    assert_eq!(
        query.path(),
        "/v2/link?boot_id=00000000-0000-0000-0000-000000000005&life=00000000-0000-0000-0000-000000000001&lane=2&n=3"
    );
    assert_eq!(query.key(), key());
}

// CLOUD-2604
#[test]
fn what_a_newer_writer_says_in_a_start_is_passed_over_and_how_it_is_run_must_be_known() {
    let text = Bytes::from(example("newer/link_attempts.json"));
    let body = read_starts(&text).unwrap();
    assert_eq!(body.seen, [Seen { number: 4, next: 17 }]);
    let [known, unknown] = body.start.as_slice() else { panic!("two starts") };
    let known = known.as_ref().unwrap();
    let expected = StartFacts { caller: None, replica_hint: None, deadline_ms: None, ..facts() };
    let spec = StartSpec { reasoning: None, ..expected.spec.clone() };
    assert_eq!(known.facts, StartFacts { spec, ..expected });
    let error = unknown.as_ref().unwrap_err();
    assert_eq!(error.number, Some(8));
    assert!(error.source.to_string().contains("a_workload_to_come"), "{}", error.source);
}

// CLOUD-2830
#[test]
fn a_start_says_how_its_payload_is_passed_on_and_by_which_route_must_be_known() {
    let passage = Passage {
        route: OpenAiRoute::ChatCompletions,
        stream: true,
        query: Some("a=1".into()),
        headers: vec![("x-title".into(), "t".into())],
        model_at: Some((9, 12)),
    };
    let format = PayloadFormat::OpenAi(Box::new(passage));
    let payload = Payload { format: format.clone(), bytes: Bytes::from_static(b"{\"model\":\"m\"}") };
    let written = WrittenStart::new(&Start::new(facts(), &payload));
    let batch = write_starts(key(), &[written], &[], &[]).unwrap();
    let value: Value = serde_json::from_slice(&batch).unwrap();
    let expected = json!({"openai": {"route": "chat_completions", "stream": true, "query": "a=1",
        "headers": [["x-title", "t"]], "model_at": [9, 12]}});
    assert_eq!(value["start"][0]["payload_format"], expected);
    let read = read_starts(&batch).unwrap().start.remove(0).unwrap();
    assert_eq!((read.facts.payload_format, read.payload), (format, payload.bytes));
    let newer = std::str::from_utf8(&batch).unwrap().replace("chat_completions", "a_route_to_come");
    let read = read_starts(&Bytes::from(newer)).unwrap().start.remove(0);
    assert_eq!(read.unwrap_err().number, Some(facts().number));
}

// CLOUD-2605
#[test]
fn a_payload_comes_as_the_bytes_that_were_sent_and_shares_the_body() {
    let payload = "{\"prompt\" :\"a\\u00e4\\n\", \"x\":1e400,\"x\" : [ ]}";
    let written = WrittenStart::new(&start(7, payload));
    let batch = write_starts(key(), &[written.clone(), written.clone()], &[], &[]).unwrap();
    let alone = Bytes::from(write_single(key(), &written).unwrap().concat());
    let read = read_starts(&batch).unwrap();
    assert_eq!(read.key, key());
    for start in read.start {
        let start = start.unwrap();
        assert_eq!((start.payload.as_ref(), start.facts.number), (payload.as_bytes(), 7));
        assert!(batch.as_ptr_range().contains(&start.payload.as_ptr()));
    }
    let single = read_single(&alone).unwrap();
    assert_eq!((single.key, single.start.unwrap().payload.as_ref()), (key(), payload.as_bytes()));
    assert!(matches!(read_single(&Bytes::from_static(b"{}")), Err(SingleError::NoLine)));
    assert!(matches!(read_single(&Bytes::from_static(b"{}\n{}")), Err(SingleError::Line(_))));
}

// CLOUD-2605
#[test]
fn a_payload_that_is_not_one_json_value_and_nothing_else_goes_alone_as_it_is() {
    let facts = serde_json::to_string(&facts()).unwrap();
    let injected = format!("1}},{},\"payload\":2", &facts[..facts.len() - 1]);
    for payload in [injected.as_str(), "", "{", "nul", "{} {}", " {}", "[1]\n", "\"\u{0}\"", "]}"] {
        let written = WrittenStart::new(&start(7, payload));
        assert!(written.goes_alone(), "{payload}");
        assert_eq!(write_starts(key(), std::slice::from_ref(&written), &[], &[]), Err(WriteError::Alone));
        let alone = Bytes::from(write_single(key(), &written).unwrap().concat());
        assert_eq!(read_single(&alone).unwrap().start.unwrap().payload.as_ref(), payload.as_bytes());
    }
    let mut not_text = start(7, "");
    not_text.payload = Bytes::from_static(b"\"\xff\"");
    assert!(WrittenStart::new(&not_text).goes_alone());
}

// CLOUD-2604
#[test]
fn a_body_that_would_be_refused_is_not_written() {
    let small = WrittenStart::new(&start(1, "{}"));
    let many = vec![small.clone(); MAX_STARTS + 1];
    assert_eq!(write_starts(key(), &many, &[], &[]), Err(WriteError::TooMany(MAX_STARTS + 1)));
    let seen = vec![Seen { number: 1, next: 2 }; MAX_SEEN + 1];
    assert_eq!(write_starts(key(), &[], &seen, &[]), Err(WriteError::TooMany(0)));
    let long = WrittenStart::new(&start(1, &format!("\"{}\"", "x".repeat(60_000))));
    let written = write_starts(key(), &vec![long.clone(); 5], &[], &[]);
    assert_eq!(written, Err(WriteError::TooLong(5 * long.bytes())));
    let text = json!({ "life": key().life, "lane": 0, "n": 1, "start": vec!["x".repeat(60_000); 5] });
    let error = read_starts(&Bytes::from(text.to_string())).unwrap_err().to_string();
    assert!(error.contains("of which 262144 go together"), "{error}");
    let mut before = start(1, "{}");
    before.facts.traceparent = "x".repeat(MAX_LINE_BYTES);
    assert!(matches!(write_single(key(), &WrittenStart::new(&before)), Err(WriteError::Line(_))));
}

// CLOUD-2605
#[test]
fn a_start_of_more_than_64_kib_goes_alone() {
    let room = MAX_INLINE_BYTES - WrittenStart::new(&start(1, "\"\"")).bytes();
    let is_large = |text: usize| {
        let payload = format!("\"{}\"", "x".repeat(text));
        WrittenStart::new(&start(1, &payload)).goes_alone()
    };
    assert_eq!((is_large(room), is_large(room + 1)), (false, true));
}

// CLOUD-2604
#[test]
fn lists_beyond_their_bounds_are_refused() {
    let body = |starts: usize, seen: usize, done: usize| {
        let LinkKey { life, lane, n } = key();
        let ids = vec![AttemptId(Uuid::nil()); done];
        let body = json!({
            "life": life, "lane": lane, "n": n, "start": vec![0; starts], "seen": vec![[1, 2]; seen], "done": ids,
        });
        read_starts(&Bytes::from(body.to_string()))
    };
    assert_eq!(body(MAX_STARTS, MAX_SEEN, MAX_IDS).unwrap().start.len(), MAX_STARTS);
    for (starts, seen, done) in [(MAX_STARTS + 1, 0, 0), (0, MAX_SEEN + 1, 0), (0, 0, MAX_IDS + 1)] {
        let error = body(starts, seen, done).unwrap_err().to_string();
        assert!(error.contains("a list of at most"), "{error}");
    }
}

// CLOUD-2604
#[test]
fn of_a_tasks_facts_a_node_gets_what_it_acts_on() {
    let request = TaskRequest {
        reasoning: Reasoning::Drop,
        ..TaskRequest::completion(ModelRef::new("m").unwrap(), "a secret prompt")
    };
    let trace = TraceContext { correlation_id: "c-1".into(), ..Default::default() };
    let spec = TaskSpec::of(&request, TaskId(Uuid::nil()), BodyDigest::new([0; 32]), None, trace);
    let own = json!(StartSpec::of(&spec, Some(9)));
    assert_eq!(own, json!({"model_ref":"m","workload":"completion","reasoning":"drop","max_tokens":9}));
    assert_eq!(facts().trace().correlation_id, "c-1");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    // CLOUD-2604
    #[test]
    fn no_body_brings_a_reader_down(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0_usize..2_000) {
        let _ = read_starts(&Bytes::from(bytes.clone()));
        let _ = read_single(&Bytes::from(bytes));
        let mut body = example("link/attempts.json").into_bytes();
        body.truncate(cut);
        let _ = read_starts(&Bytes::from(body));
    }
}
