//! What is done to the world.

use attempt_link::control::{ConnectionEnd, ControlLane};
use attempt_link::wire::{Start, StartFacts, StartSpec};
use pool_registry_types::task::Workload;
use pool_registry_types::{AttemptId, LogId, ModelRef, PoolId, TaskId};
use task_stream::PayloadFormat;
use uuid::Uuid;

use crate::host::Host;
use crate::oracle::{Over, Reader};
use crate::world::{Event, World, at, boot, life, node};

/// Something that is done to the world.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    Start {
        frames: u32,
        every: u64,
        keep: bool,
        size: u8,
    },
    /// Attempts that write large frames only.
    StartLarge {
        attempts: usize,
    },
    Cancel {
        which: usize,
    },
    Cut {
        up: bool,
        down: bool,
        millis: u64,
    },
    Reset {
        half_open: bool,
    },
    Refuse {
        millis: u64,
    },
    LosePosts {
        millis: u64,
    },
    LoseAnswers {
        millis: u64,
    },
    LatePosts {
        millis: u64,
    },
    Stall {
        millis: u64,
    },
    Stick {
        which: usize,
        millis: u64,
    },
    Full {
        millis: u64,
    },
    /// The node loses or doubles a record.
    Misread {
        which: usize,
        again: bool,
    },
    /// Links say hello and break, or nothing else.
    Flap {
        millis: u64,
        mute: bool,
    },
    RestartControl,
    RestartNode,
    Credential,
    Leave,
}

/// The start of an attempt of its own task.
pub(crate) fn start(id: u128, prompt: &str) -> Start {
    let facts = StartFacts {
        number: 0,
        pool_id: PoolId::new("p").unwrap(),
        attempt_id: AttemptId(Uuid::from_u128(id)),
        task_id: TaskId(Uuid::from_u128(id)),
        log_id: LogId(Uuid::from_u128(id)),
        first_index: 0,
        deadline_ms: Some(600_000),
        replica_hint: None,
        resume: None,
        spec: StartSpec {
            model_ref: ModelRef::new("m").unwrap(),
            workload: Workload::Completion,
            reasoning: None,
            max_tokens: None,
        },
        payload_format: PayloadFormat::Native,
        keep: false,
        traceparent: String::new(),
        correlation_id: String::new(),
        tracestate: String::new(),
        caller: None,
    };
    Start { facts, payload: serde_json::json!({ "prompt": prompt }).to_string().into() }
}

impl World {
    pub(crate) fn act(&mut self, op: Op) {
        let now = self.now;
        match op {
            Op::Start { frames, every, keep, size } => self.start(frames, every, keep, size),
            Op::StartLarge { attempts } => (0..attempts).for_each(|_| self.start(6, 400, true, 30)),
            Op::Cancel { which } => {
                let open = self.readers.iter().filter(|(_, reader)| reader.over.is_none());
                let open: Vec<AttemptId> = open.map(|(id, _)| *id).collect();
                if let Some(attempt) = open.get(which % open.len().max(1)).copied() {
                    let reader = self.readers.get_mut(&attempt).unwrap();
                    (reader.over, reader.stopped) = (Some(Over::Cancelled), Some(now));
                    self.control.cancel(at(now), attempt);
                }
            }
            Op::Cut { up, down, millis } => {
                if up {
                    self.up_cut = self.up_cut.max(now + millis);
                }
                if down {
                    self.down_cut = self.down_cut.max(now + millis);
                }
            }
            Op::Reset { half_open } => self.reset(half_open),
            Op::Refuse { millis } => self.refused = now + millis,
            Op::LosePosts { millis } => self.posts_lost = now + millis,
            Op::LoseAnswers { millis } => self.answers_lost = now + millis,
            Op::LatePosts { millis } => self.posts_late = now + millis,
            Op::Stall { millis } => self.stalled = now + millis,
            Op::Full { millis } => self.full = now + millis,
            Op::Stick { which, millis } => {
                let running = self.host.runs.len();
                let stuck = self.host.runs.iter_mut().nth(which % running.max(1));
                if let Some((attempt, run)) = stuck {
                    run.stuck = true;
                    let attempt = *attempt;
                    self.after(millis, Event::Unstick(attempt));
                }
            }
            Op::Misread { which, again } => self.host.misread(which, again),
            Op::Flap { millis, mute } => self.flap(millis, mute),
            Op::RestartControl => self.restart_control(),
            Op::RestartNode => {
                self.boot += 1;
                self.node = node(self.boot);
                let accepted = std::mem::take(&mut self.host.accepted);
                let last_run = self.host.last_run;
                self.host = Host { accepted, last_run, ..Host::default() };
                for which in 0..self.connections.len() {
                    self.connections[which].node_open = false;
                    self.push_down(which, None);
                }
                self.after(400, Event::Registers);
            }
            Op::Credential => {
                for which in 0..self.connections.len() {
                    if let Some(id) =
                        self.connections[which].node.filter(|_| self.connections[which].node_open)
                    {
                        self.node.credential(at(now), id, false);
                    }
                }
            }
            Op::Leave => {
                self.node.leave();
                self.after(2_500, Event::Do(Op::RestartNode));
            }
        }
    }

    fn flap(&mut self, millis: u64, mute: bool) {
        if self.now >= self.flaps {
            self.flaps_since = self.now;
        }
        (self.flaps, self.flaps_mute) = (self.now + millis, mute);
        for which in 0..self.connections.len() {
            self.connections[which].hello_left = Some(0);
            if !mute {
                self.after(5, Event::Breaks(which));
            }
        }
    }

    fn reset(&mut self, half_open: bool) {
        for which in 0..self.connections.len() {
            let connection = &mut self.connections[which];
            connection.down.clear();
            let (n, of) = (connection.n, connection.life);
            if !half_open {
                self.node_hears(which);
            }
            if std::mem::take(&mut self.connections[which].control_open) && of == self.life {
                self.control.closed(at(self.now), n, ConnectionEnd::Broken);
            }
        }
    }

    /// The control plane dies and comes back without its memory.
    fn restart_control(&mut self) {
        for reader in self.readers.values_mut() {
            reader.over.get_or_insert(Over::Forgotten);
            reader.stopped = None;
        }
        for which in 0..self.connections.len() {
            if std::mem::take(&mut self.connections[which].control_open) && self.chance(70) {
                self.node_hears(which);
            }
        }
        self.life += 1;
        self.suspected = false;
        self.control = ControlLane::new(at(self.now), life(self.life), 0, boot(self.boot));
        let wait = self.draw(800);
        self.after(wait, Event::Registers);
    }

    fn start(&mut self, frames: u32, every: u64, keep: bool, size: u8) {
        self.last_attempt += 1;
        let id = self.last_attempt;
        let attempt = AttemptId(Uuid::from_u128(id));
        let began = self.now;
        self.readers.insert(attempt, Reader { began, ..Reader::default() });
        self.plans.insert(attempt, (frames, every, size));
        let prompt = if size == 2 { "x".repeat(80_000) } else { "hello".into() };
        let mut start = start(id, &prompt);
        start.facts.keep = keep;
        self.control.start(at(self.now), start).unwrap();
    }
}
