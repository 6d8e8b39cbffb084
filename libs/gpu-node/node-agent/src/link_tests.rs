//! Links over an agent whose engine is the test's own, read by the control plane's decoder.

use attempt_link::records::{Content, Kind, RecordDecoder};
use attempt_link::wire::{LinkKey, Seen, StartFacts, StartSpec};
use futures::StreamExt;
use pool_registry_types::task::Workload;
use pool_registry_types::{BootId, ErrorCode, LogId, ModelRef, TaskId};
use tokio::time::timeout;
use uuid::Uuid;

use super::*;
use crate::attempt_log::tests::{node, pool};
use crate::infer::tests::{Engine, id};

/// Nothing here takes as long.
const SOON: Duration = Duration::from_secs(10);
const LIFE: LifeId = LifeId(Uuid::from_u128(0x11fe));
const LOG: LogId = LogId(Uuid::from_u128(0xc));

/// The control plane's side of one link.
struct Link {
    agent: Arc<Agent>,
    key: LinkKey,
    reader: Option<LinkReader>,
    decoder: RecordDecoder,
}

impl Link {
    /// The `n`th link of a lane, which is named at once.
    async fn open(agent: &Arc<Agent>, n: u64) -> Self {
        let query = LinkQuery { boot_id: BootId(Uuid::from_u128(1)), life: LIFE, lane: 0, n };
        let reader = agent.open_link(&query, || true).unwrap();
        let decoder = RecordDecoder::new();
        let mut link = Self { agent: Arc::clone(agent), key: query.key(), reader: Some(reader), decoder };
        assert!(matches!(link.next().await, Some((_, Content::Hello(_)))));
        link.says(vec![], vec![], vec![]).unwrap();
        link
    }

    /// The next record that is not `alive`: number, first and count, and what it says.
    async fn next(&mut self) -> Option<((u64, u64, u32), Content)> {
        loop {
            if let Some(record) = self.decoder.next_record().unwrap() {
                let content = Content::read(&record).unwrap();
                let head = (record.head.number, record.head.first, record.head.count);
                match content {
                    Content::Alive(_) => continue,
                    // The bytes are the record's.
                    Content::Frames => assert!(!record.bytes.is_empty()),
                    _ => {}
                }
                return Some((head, content));
            }
            let Ok(bytes) = timeout(SOON, self.reader.as_mut()?.next()).await.unwrap()?;
            self.decoder.push(bytes);
        }
    }

    async fn alive(&mut self) -> Vec<Seen> {
        loop {
            match self.decoder.next_record().unwrap() {
                Some(record) if record.head.kind == Kind::Alive => {
                    let Content::Alive(positions) = Content::read(&record).unwrap() else { panic!() };
                    return positions;
                }
                Some(_) => {}
                None => {
                    let Ok(bytes) =
                        timeout(SOON, self.reader.as_mut().unwrap().next()).await.unwrap().unwrap();
                    self.decoder.push(bytes);
                }
            }
        }
    }

    fn says(&self, start: Vec<Start>, seen: Vec<Seen>, done: Vec<AttemptId>) -> Result<(), PostRefusal> {
        let start = start.into_iter().map(Ok).collect();
        self.agent.take_starts(StartsBody { key: self.key, start, seen, done })
    }

    fn orders(&self, cancel: Vec<AttemptId>, resume: Vec<ResumeOrder>) -> Result<ControlAnswer, PostRefusal> {
        let LinkKey { life, lane, n } = self.key;
        self.agent.take_orders(&ControlBody { life, lane, n, cancel, resume })
    }
}

fn start(number: u64, attempt: u128, payload: &str) -> Start {
    let facts = StartFacts {
        number,
        pool_id: pool(),
        attempt_id: id(attempt),
        task_id: TaskId(Uuid::from_u128(0xa)),
        log_id: LOG,
        first_index: 0,
        deadline_ms: None,
        replica_hint: None,
        resume: None,
        spec: StartSpec {
            model_ref: ModelRef::new("m").unwrap(),
            workload: Workload::default(),
            reasoning: None,
            max_tokens: Some(3),
        },
        payload_format: PayloadFormat::Native,
        keep: false,
        traceparent: String::new(),
        correlation_id: "order-7".into(),
        tracestate: String::new(),
        caller: None,
    };
    Start { facts, payload: Bytes::copy_from_slice(payload.as_bytes()) }
}

const TASK: &str = r#"{"model_ref":"m","prompt":"x"}"#;

fn resume(number: u64, attempt: u128, from: u64) -> ResumeOrder {
    ResumeOrder { attempt_id: id(attempt), log_id: LOG, from, number }
}

fn linked_node(folder: &tempfile::TempDir, engine: &Engine) -> Arc<Agent> {
    let agent = node(folder, engine.url.clone());
    agent.keep_streams(1024 * 1024);
    agent.keep_links();
    agent.take_links_of(LIFE);
    agent
}

// CLOUD-2610
// CLOUD-2631
#[tokio::test]
async fn an_attempt_goes_on_while_its_link_is_cut_and_the_next_link_gets_every_frame_once() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start().await;
    let agent = linked_node(&folder, &engine);
    let mut first = Link::open(&agent, 1).await;
    first.says(vec![start(1, 1, TASK)], vec![], vec![]).unwrap();
    let Some(((1, 0, 0), Content::Accepted(accepted))) = first.next().await else { panic!("not accepted") };
    assert_eq!(accepted.replica_id.as_str(), "r0");
    engine.may.add_permits(1);
    assert!(matches!(first.next().await, Some(((1, 0, 1), Content::Frames))));
    first.says(vec![], vec![Seen { number: 1, next: 1 }], vec![]).unwrap();
    first.reader = None;
    engine.may.add_permits(2);
    let mut second = Link::open(&agent, 2).await;
    assert_eq!(first.says(vec![], vec![], vec![]), Err(PostRefusal::Stale));
    assert_eq!(second.orders(vec![], vec![resume(2, 1, 1)]).unwrap(), ControlAnswer::default());
    assert!(matches!(second.next().await, Some(((2, 0, 0), Content::Accepted(again))) if again == accepted));
    let mut next = 1;
    loop {
        match second.next().await.unwrap() {
            ((2, first, count), Content::Frames) => {
                assert_eq!(first, next);
                next += u64::from(count);
            }
            // Three tokens and the frame of the end.
            ((2, 4, 0), Content::End(_)) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(next, 4);
    // What was seen is gone, and what was not is there until it is done.
    assert_eq!(second.orders(vec![], vec![resume(3, 1, 0)]).unwrap().gone, [id(1)]);
    assert_eq!(second.orders(vec![], vec![resume(4, 1, 4)]).unwrap(), ControlAnswer::default());
    second.says(vec![], vec![], vec![id(1)]).unwrap();
    assert_eq!(second.orders(vec![], vec![resume(5, 1, 4)]).unwrap().gone, [id(1)]);
    assert_eq!((agent.held_bytes(), agent.drivers.lock().len()), (0, 0));
}

// CLOUD-2622
// CLOUD-2624
#[tokio::test]
async fn what_cannot_be_read_is_refused_under_its_number_and_what_was_stopped_is_when_it_comes() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start().await;
    let agent = linked_node(&folder, &engine);
    let mut link = Link::open(&agent, 1).await;
    link.orders(vec![id(2)], vec![]).unwrap();
    let asked = link.orders(vec![], vec![resume(9, 3, 0), resume(10, 3, 0)]).unwrap();
    assert_eq!(asked.unknown, [id(3), id(3)], "however often it is asked for");
    let starts = vec![start(1, 1, "[]"), start(2, 2, TASK), start(3, 3, TASK), start(4, 4, TASK)];
    link.says(starts, vec![], vec![]).unwrap();
    let mut answers = Vec::new();
    for _ in 0..4 {
        let ((number, ..), content) = link.next().await.unwrap();
        answers.push((
            number,
            match content {
                Content::Refused(error) => Some(error.code),
                Content::Accepted(_) => None,
                other => panic!("{other:?}"),
            },
        ));
    }
    answers.sort_unstable();
    let duplicate = Some(ErrorCode::AttemptDuplicate);
    assert_eq!(answers, [(1, Some(ErrorCode::InvalidParams)), (2, duplicate), (3, duplicate), (4, None)]);
    engine.may.add_permits(1);
    assert!(matches!(link.next().await, Some(((4, 0, 1), Content::Frames))));
    link.orders(vec![id(4)], vec![]).unwrap();
    timeout(SOON, engine.given_up.notified()).await.unwrap();
}

// CLOUD-2644
// CLOUD-1512
#[tokio::test]
async fn alive_names_what_is_driven_and_how_far_it_is_and_an_engines_error_is_a_record() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start().await;
    let agent = linked_node(&folder, &engine);
    let mut link = Link::open(&agent, 1).await;
    link.says(vec![start(7, 1, TASK)], vec![], vec![]).unwrap();
    engine.may.add_permits(1);
    let named = loop {
        let named = link.alive().await;
        if named.first().is_some_and(|position| position.next > 0) {
            break named;
        }
    };
    assert_eq!(named, [Seen { number: 7, next: 1 }]);
    // Its node ends it, as one that nobody has read for too long.
    agent.drivers.lock()[&id(1)].cancel.cancel();
    let Some(((7, 0, 0), Content::Error(error))) = link.next().await else { panic!("no error") };
    assert_eq!(error.code, ErrorCode::Canceled);
    assert!(matches!(link.next().await, Some(((7, 1, 0), Content::End(_)))));
    link.says(vec![], vec![], vec![id(1)]).unwrap();
    assert_eq!(agent.held_bytes(), 0);
}

// CLOUD-2655
// CLOUD-2613
#[tokio::test]
async fn a_node_that_leaves_says_bye_and_opens_no_link_and_another_life_opens_none_before_it_registers() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start().await;
    let agent = linked_node(&folder, &engine);
    let mut link = Link::open(&agent, 1).await;
    let other = LifeId(Uuid::from_u128(0x22));
    let query = |life| LinkQuery { boot_id: BootId(Uuid::from_u128(1)), life, lane: 0, n: 9 };
    let refused = agent.open_link(&query(other), || true).unwrap_err();
    assert_eq!(refused, GetRefusal::Stale);
    agent.drain_and_leave(Duration::ZERO).await;
    assert!(matches!(link.next().await, Some((_, Content::Bye(_)))));
    assert!(link.next().await.is_none(), "the response is over");
    assert_eq!(agent.open_link(&query(LIFE), || true).unwrap_err(), GetRefusal::Leaving);
}

// CLOUD-2656
#[tokio::test]
async fn a_link_whose_credential_does_not_count_any_more_takes_no_start_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start().await;
    let agent = linked_node(&folder, &engine);
    let counts = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let query = LinkQuery { boot_id: BootId(Uuid::from_u128(1)), life: LIFE, lane: 3, n: 1 };
    let admits = Arc::clone(&counts);
    let reader = agent.open_link(&query, move || admits.load(Ordering::Relaxed)).unwrap();
    let decoder = RecordDecoder::new();
    let mut link = Link { agent: Arc::clone(&agent), key: query.key(), reader: Some(reader), decoder };
    assert!(matches!(link.next().await, Some((_, Content::Hello(_)))));
    link.says(vec![start(1, 1, TASK)], vec![], vec![]).unwrap();
    counts.store(false, Ordering::Relaxed);
    agent.check_links();
    assert_eq!(link.says(vec![start(2, 2, TASK)], vec![], vec![]), Err(PostRefusal::Credential));
    assert!(matches!(link.next().await, Some(((1, 0, 0), Content::Accepted(_)))));
    engine.may.add_permits(3);
    while !matches!(link.next().await.unwrap(), ((1, ..), Content::End(_))) {}
    counts.store(true, Ordering::Relaxed);
    agent.check_links();
    link.says(vec![start(2, 2, TASK)], vec![], vec![]).unwrap();
}
