//! Streams that are generated again by whoever passes them on.

use pool_registry_types::Digest;
use pool_registry_types::node::StagedModel;

use super::*;

fn repeatable() -> TaskSpec {
    TaskSpec { passes_on: true, continuation: Some(ResumeMode::Replay), ..task() }
}

fn lost() -> HowEnded {
    HowEnded::Broken("reset".into())
}

impl Bench {
    /// A node that passes bodies on joins, with engines of this kind and a model of these bytes.
    fn join_as(&mut self, name: &str, engine: EngineKind, model: Option<char>) {
        let reply = self.reply();
        let request = RegisterRequest { features: vec!["openai".into()], ..register(name) };
        self.apply(Event::Register { reply, request, registrar: None });
        let Ok(Answer::Registered(registered)) = self.replies[&reply].clone() else {
            panic!("not registered")
        };
        let staged = model.map(|digit| StagedModel {
            model_id: ModelRef::new("m").unwrap(),
            digest: Digest::new(&format!("sha256:{}", digit.to_string().repeat(64))).unwrap(),
            bytes: 1,
        });
        let beat = Heartbeat {
            epoch: registered.epoch,
            seq: 1,
            timestamp: String::new(),
            intent: Intent::Serving,
            intent_order: 0,
            tokens_changed: 0,
            pools: vec![PoolReport { engine: Some(engine), ..report(1, &[]) }],
            gpus: vec![],
            models: staged.into_iter().collect(),
            problems: vec![],
        };
        let reply = self.reply();
        self.apply(Event::Heartbeat { reply, node_id: node(name), beat });
    }

    fn nodes(&self) -> Vec<&str> {
        self.dispatches.iter().map(|dispatch| dispatch.pool.node_id.as_str()).collect()
    }
}

// CLOUD-2860
#[test]
fn what_was_sent_is_generated_again_by_an_engine_of_the_same_kind_only() {
    let mut b = Bench::new();
    b.join_as("a", EngineKind::LlamaCpp, None);
    let (id, _) = b.submit(repeatable());
    b.join_as("b", EngineKind::Vllm, None);
    b.end(b.dispatches[0].attempt, 3, lost());
    b.advance_to(200);
    assert_eq!(b.nodes(), ["a"], "it waits");
    b.join_as("c", EngineKind::LlamaCpp, None);
    assert_eq!(b.nodes(), ["a", "c"]);
    let again = b.last_dispatch();
    assert_eq!((again.first_index, again.resume), (3, Some(ResumeMode::Replay)));
    b.end(again.attempt, 9, HowEnded::Finished);
    assert!(!b.terminal.contains_key(&id));
    // One that has sent nothing goes anywhere.
    let mut b = Bench::new();
    b.join_as("a", EngineKind::LlamaCpp, None);
    b.submit(repeatable()).1.unwrap();
    b.join_as("b", EngineKind::Vllm, None);
    b.end(b.dispatches[0].attempt, 0, lost());
    assert_eq!(b.nodes(), ["a", "b"]);
}

// CLOUD-2860
#[test]
fn a_pool_whose_model_is_known_to_be_another_one_is_passed_over() {
    for (model, goes_there) in [(Some('1'), true), (Some('2'), false), (None, true)] {
        let mut b = Bench::new();
        b.join_as("a", EngineKind::LlamaCpp, Some('1'));
        b.submit(repeatable()).1.unwrap();
        b.join_as("b", EngineKind::LlamaCpp, model);
        b.end(b.dispatches[0].attempt, 3, lost());
        b.advance_to(200);
        assert_eq!(b.nodes().last() == Some(&"b"), goes_there, "{model:?}");
        // The one that had it may have it again.
        b.advance_to(2_000);
        let then = if goes_there { "b" } else { "a" };
        assert_eq!(b.nodes(), ["a", then], "{model:?}");
    }
}

// CLOUD-2865
#[test]
fn what_cannot_be_generated_again_ends_with_its_attempt() {
    let mut b = Bench::new();
    b.join_as("a", EngineKind::LlamaCpp, None);
    b.join_as("b", EngineKind::LlamaCpp, None);
    let (id, _) = b.submit(repeatable());
    let attempt = b.dispatches[0].attempt;
    b.apply(Event::CannotBeRepeated { attempt });
    b.end(attempt, 3, lost());
    assert_eq!((b.terminal.get(&id), b.dispatches.len()), (Some(&ErrorCode::WorkerReset), 1));
    // It differs: there is no third attempt, whatever was said of it.
    let (id, _) = b.submit(repeatable());
    b.end(b.last_dispatch().attempt, 3, lost());
    b.end(b.last_dispatch().attempt, 3, HowEnded::Differs("it has another text".into()));
    assert_eq!((b.terminal.get(&id), b.dispatches.len()), (Some(&ErrorCode::WorkerReset), 3));
    assert_eq!(b.core.counters().replays_differed, 1);
}

// CLOUD-2865
#[test]
fn a_deadline_that_the_pace_of_the_pool_does_not_reach_ends_the_stream_at_once() {
    for (deadline_ms, is_given) in [(2_000, false), (20_000, true)] {
        let mut b = Bench::new();
        b.join_as("a", EngineKind::LlamaCpp, None);
        // 100 ms to the first token, and to each further one.
        b.submit(repeatable()).1.unwrap();
        b.serve(0, 100, 900, 10);
        let (id, _) = b.submit(TaskSpec { deadline_ms: Some(deadline_ms), ..repeatable() });
        b.join_as("b", EngineKind::LlamaCpp, None);
        b.end(b.last_dispatch().attempt, 50, lost());
        assert_eq!(b.dispatches.len() == 3, is_given, "{deadline_ms}");
        assert_eq!(b.terminal.get(&id).copied(), (!is_given).then_some(ErrorCode::WorkerReset));
    }
}

// CLOUD-2860
#[test]
fn the_bound_of_a_first_token_stays_where_each_event_of_an_attempt_is_seen() {
    let mut b = Bench::new();
    b.join_as("a", EngineKind::LlamaCpp, None);
    b.join_as("b", EngineKind::LlamaCpp, None);
    b.submit(repeatable()).1.unwrap();
    b.now += 5_000;
    b.end(b.dispatches[0].attempt, 3, lost());
    assert_eq!(b.dispatches[0].deadlines, b.dispatches[1].deadlines);
}
