//! A control plane's end to be tried out: its time, and what it asked for.

use attempt_link::content::{Acceptance, Hello, Position};
use attempt_link::control::{Action, ConnectionEnd, ControlLane, PostId, PostOutcome, PostRequest};
use attempt_link::records::{Kind, RecordHead, write_positions};
use attempt_link::wire::{ControlAnswer, ControlBody, LifeId, StartsBody, read_starts};
use pool_registry_types::{AttemptId, BootId, Moment, NodeId, ReplicaId};
use serde::Serialize;
use uuid::Uuid;

use crate::ops::start;

pub(crate) const BOOT: BootId = BootId(Uuid::from_u128(7));

/// A lane, its time, and what it asked for and was not looked at.
pub(crate) struct Lane {
    pub(crate) lane: ControlLane,
    pub(crate) now: u64,
    pub(crate) actions: Vec<Action>,
}

pub(crate) fn id(number: u128) -> AttemptId {
    AttemptId(Uuid::from_u128(number))
}

pub(crate) fn record(kind: Kind, number: u64, first: u64, count: u32, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    RecordHead::new(kind, number, first, count).write_one(&mut out, bytes).unwrap();
    out
}

pub(crate) fn json(kind: Kind, number: u64, first: u64, value: &impl Serialize) -> Vec<u8> {
    record(kind, number, first, 0, &serde_json::to_vec(value).unwrap())
}

pub(crate) fn hello(boot_id: BootId) -> Vec<u8> {
    let hello = Hello { node_id: NodeId::new("n0").unwrap(), boot_id, version: "1".into() };
    json(Kind::Hello, 0, 0, &hello)
}

pub(crate) fn accepted(number: u64) -> Vec<u8> {
    let acceptance = Acceptance { replica_id: ReplicaId::new("r0").unwrap(), report_seq: 1 };
    json(Kind::Accepted, number, 0, &acceptance)
}

pub(crate) fn alive(positions: &[(u64, u64)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_positions(&mut bytes, positions.iter().map(|&(number, next)| Position { number, next }));
    record(Kind::Alive, 0, 0, u32::try_from(positions.len()).unwrap(), &bytes)
}

impl Lane {
    /// A lane that has just begun to dial.
    pub(crate) fn dialling() -> Self {
        let lane = ControlLane::new(Moment::from_millis(1_000), LifeId(Uuid::from_u128(1)), 3, BOOT);
        Self { lane, now: 1_000, actions: Vec::new() }.taken()
    }

    /// A lane whose link lives and whose first POST was answered.
    pub(crate) fn up() -> Self {
        let mut this = Self::dialling();
        this.receive(1, hello(BOOT));
        this.answer_all();
        this.receive(1, alive(&[]));
        this.actions.clear();
        this
    }

    pub(crate) fn at(&self) -> Moment {
        Moment::from_millis(self.now)
    }

    pub(crate) fn taken(mut self) -> Self {
        self.take();
        self
    }

    pub(crate) fn take(&mut self) {
        while let Some(action) = self.lane.next_action() {
            self.actions.push(action);
        }
    }

    pub(crate) fn receive(&mut self, n: u64, bytes: Vec<u8>) {
        self.lane.received(self.at(), n, bytes.into());
        self.take();
    }

    pub(crate) fn closed(&mut self, n: u64, end: ConnectionEnd) {
        self.lane.closed(self.at(), n, end);
        self.take();
    }

    pub(crate) fn start(&mut self, number: u128) {
        self.lane.start(self.at(), start(number, "hello")).unwrap();
        self.take();
    }

    pub(crate) fn cancel(&mut self, attempt: AttemptId) {
        self.lane.cancel(self.at(), attempt);
        self.take();
    }

    pub(crate) fn sent(&mut self, post: PostId) {
        self.lane.post_sent(self.at(), post);
        self.take();
    }

    pub(crate) fn end(&mut self, post: PostId, outcome: PostOutcome) {
        self.lane.post_ended(self.at(), post, outcome);
        self.take();
    }

    /// Time passes, and each deadline in it is kept.
    pub(crate) fn pass(&mut self, millis: u64) {
        let end = self.now + millis;
        while self.lane.next_deadline().as_millis() <= end {
            self.now = self.now.max(self.lane.next_deadline().as_millis());
            self.lane.timer(self.at());
            self.take();
        }
        self.now = end;
    }

    /// The POSTs that were asked for, and were not looked at.
    pub(crate) fn posts(&mut self) -> Vec<(PostId, PostRequest)> {
        let (posts, others) = std::mem::take(&mut self.actions)
            .into_iter()
            .partition(|action| matches!(action, Action::Post { .. }));
        self.actions = others;
        let post = |action| match action {
            Action::Post { id, request, .. } => (id, request),
            other => panic!("{other:?}"),
        };
        posts.into_iter().map(post).collect()
    }

    pub(crate) fn control(&mut self) -> (PostId, ControlBody) {
        let control = |(id, request)| match request {
            PostRequest::Control(body) => Some((id, body)),
            _ => None,
        };
        let mut posts: Vec<_> = self.posts().into_iter().filter_map(control).collect();
        assert_eq!(posts.len(), 1, "one control POST");
        posts.remove(0)
    }

    pub(crate) fn starts(&mut self) -> (PostId, StartsBody) {
        let starts = |(id, request)| match request {
            PostRequest::Starts(body) => Some((id, read_starts(&body).unwrap())),
            _ => None,
        };
        let mut posts: Vec<_> = self.posts().into_iter().filter_map(starts).collect();
        assert_eq!(posts.len(), 1, "one POST of starts");
        posts.remove(0)
    }

    pub(crate) fn answer_all(&mut self) {
        loop {
            let posts = self.posts();
            if posts.is_empty() {
                return;
            }
            for (post, _) in posts {
                self.sent(post);
                self.end(post, PostOutcome::Answered(ControlAnswer::default()));
            }
        }
    }

    /// An attempt that is accepted on the link `n`. Returns its number.
    pub(crate) fn running(&mut self, attempt: u128, n: u64) -> u64 {
        self.start(attempt);
        let (post, body) = self.starts();
        let number = body.start[0].as_ref().unwrap().facts.number;
        self.sent(post);
        self.end(post, PostOutcome::Answered(ControlAnswer::default()));
        self.receive(n, accepted(number));
        self.actions.clear();
        number
    }

    pub(crate) fn frames(&mut self, number: u64, first: u64, count: u32) {
        self.receive(1, record(Kind::Frames, number, first, count, b"frames"));
    }

    pub(crate) fn dials(&self) -> Vec<u64> {
        let dial = |action: &Action| match action {
            Action::Dial(query) => Some(query.n),
            _ => None,
        };
        self.actions.iter().filter_map(dial).collect()
    }

    pub(crate) fn did(&mut self, expected: &Action) -> bool {
        let before = self.actions.len();
        self.actions.retain(|action| action != expected);
        self.actions.len() + 1 == before
    }
}

pub(crate) fn secs(secs: u64) -> u64 {
    secs * 1_000
}
