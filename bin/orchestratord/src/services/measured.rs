//! What is counted while it happens, for the metrics: what tasks waited for, how their tokens came, and how
//! they ended.
//!
//! No label is a client's word: a model counts under its name once a node had it, and no more of them than
//! there is room for; all others are `other`.

use std::collections::HashSet;
use std::time::Duration;

use daemon_kit::metrics::Page;
use parking_lot::Mutex;
use pool_registry_types::{ErrorCode, ModelRef};
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec};
use task_scheduler::TaskEnd;
use tokio::time::Instant;

use crate::metrics::{
    CALLER_TASKS_ENDED, CALLER_TOKENS_OUT, HOP, INTER_TOKEN, PLACEMENT, QUEUE_WAIT, TASK_DURATION,
    TASKS_ENDED, TIME_TO_FIRST_TOKEN, TOKENS_IN, TOKENS_OUT, task_state,
};

/// Models that have series of their own.
const MODELS: usize = 512;
/// Names of tokens that have, where callers are told apart.
const CALLERS: usize = 512;
/// The label of all others.
pub(crate) const OTHER: &str = "other";
/// The label of what is not there.
const NONE: &str = "none";

/// Names that have series, as many as there is room for.
#[derive(Debug, Default)]
struct Names(Mutex<HashSet<String>>);

impl Names {
    /// The label of a name. `is_known`: it may have a series of its own from now on.
    fn label<'n>(&self, name: &'n str, is_known: bool, most: usize) -> &'n str {
        let mut names = self.0.lock();
        if !names.contains(name) {
            if !is_known || names.len() >= most {
                return OTHER;
            }
            names.insert(name.to_owned());
        }
        name
    }
}

/// All of it.
#[derive(Debug)]
pub(crate) struct Measured {
    models: Names,
    /// Models that nodes had when the metrics were last shown; they take no place in `models` before a task.
    reported: Mutex<HashSet<String>>,
    queue_wait: HistogramVec,
    first_token: HistogramVec,
    inter_token: HistogramVec,
    duration: HistogramVec,
    placement: HistogramVec,
    hop: HistogramVec,
    ended: IntCounterVec,
    tokens_in: IntCounterVec,
    tokens_out: IntCounterVec,
    callers: Option<Callers>,
}

/// Who has caused it, where that is to be told.
#[derive(Debug)]
struct Callers {
    names: Names,
    ended: IntCounterVec,
    tokens_out: IntCounterVec,
}

/// Those series of a model that its tasks' tokens count in.
#[derive(Debug, Clone)]
pub(crate) struct ModelSeries {
    has_tokens: bool,
    inter_token: Histogram,
    tokens_in: IntCounter,
    tokens_out: IntCounter,
}

/// How far a task's tokens were counted.
#[derive(Debug, Default)]
pub(crate) struct CountedTokens {
    tokens: u64,
    came: Option<Instant>,
}

impl Measured {
    /// `callers`: names of tokens are labels too.
    pub(crate) fn new(callers: bool) -> Self {
        let callers = callers.then(|| Callers {
            names: Names::default(),
            ended: CALLER_TASKS_ENDED.counter(),
            tokens_out: CALLER_TOKENS_OUT.counter(),
        });
        Self {
            models: Names::default(),
            reported: Mutex::default(),
            queue_wait: QUEUE_WAIT.histogram(),
            first_token: TIME_TO_FIRST_TOKEN.histogram(),
            inter_token: INTER_TOKEN.histogram(),
            duration: TASK_DURATION.histogram(),
            placement: PLACEMENT.histogram(),
            hop: HOP.histogram(),
            ended: TASKS_ENDED.counter(),
            tokens_in: TOKENS_IN.counter(),
            tokens_out: TOKENS_OUT.counter(),
            callers,
        }
    }

    /// Nodes have these models now.
    pub(crate) fn reported<'m>(&self, models: impl Iterator<Item = &'m ModelRef>) {
        let models = models.map(|model| model.as_str().to_owned()).collect();
        *self.reported.lock() = models;
    }

    /// The label of a model. `is_had`: some node has it, or had it.
    pub(crate) fn model<'m>(&self, model: &'m ModelRef, is_had: bool) -> &'m str {
        let is_had = is_had || self.reported.lock().contains(model.as_str());
        self.models.label(model.as_str(), is_had, MODELS)
    }

    /// Of a model that a node has. `has_tokens`: what comes are tokens, and no vectors or ranks.
    pub(crate) fn series(&self, model: &ModelRef, has_tokens: bool) -> ModelSeries {
        let labels = [self.model(model, true)];
        ModelSeries {
            has_tokens,
            inter_token: self.inter_token.with_label_values(&labels),
            tokens_in: self.tokens_in.with_label_values(&labels),
            tokens_out: self.tokens_out.with_label_values(&labels),
        }
    }

    /// Attempts were sent after the control loop had thought for so long.
    pub(crate) fn placed(&self, took: Duration) {
        self.placement.with_label_values(&[] as &[&str]).observe(took.as_secs_f64());
    }

    /// A node has said that it has an attempt, so long after it was sent.
    pub(crate) fn accepted(&self, took: Duration) {
        self.hop.with_label_values(&[] as &[&str]).observe(took.as_secs_f64());
    }

    pub(crate) fn ended(&self, end: &TaskEnd) {
        let model = self.model(&end.spec.model_ref, end.pool.is_some());
        let (outcome, code) = (task_state(end.state), end.code.map_or(NONE, ErrorCode::as_str));
        self.ended.with_label_values(&[model, outcome, code, fault(end, model)]).inc();
        let seconds = |millis: u64| Duration::from_millis(millis).as_secs_f64();
        self.queue_wait.with_label_values(&[model]).observe(seconds(end.queue_wait_ms));
        self.duration.with_label_values(&[model]).observe(seconds(end.elapsed_ms));
        if let Some(millis) = end.first_token_ms {
            self.first_token.with_label_values(&[model]).observe(seconds(millis));
        }
        if let Some(callers) = &self.callers {
            let name = end.spec.caller.as_ref().map_or(NONE, |caller| caller.name.as_str());
            let name = callers.names.label(name, true, CALLERS);
            callers.ended.with_label_values(&[name, outcome]).inc();
            callers.tokens_out.with_label_values(&[name]).inc_by(end.sent);
        }
    }

    pub(crate) fn show(&self, page: &mut Page) {
        page.held(&self.queue_wait).held(&self.first_token).held(&self.inter_token).held(&self.duration);
        page.held(&self.placement).held(&self.hop);
        page.held(&self.ended).held(&self.tokens_in).held(&self.tokens_out);
        if let Some(callers) = &self.callers {
            page.held(&callers.ended).held(&callers.tokens_out);
        }
    }
}

impl ModelSeries {
    /// So many tokens of a task have come by now.
    pub(crate) fn count(&self, counted: &mut CountedTokens, tokens: u64) {
        if !self.has_tokens || tokens <= counted.tokens {
            return;
        }
        self.tokens_out.inc_by(tokens - counted.tokens);
        counted.tokens = tokens;
        let now = Instant::now();
        if let Some(before) = counted.came.replace(now) {
            self.inter_token.observe(now.saturating_duration_since(before).as_secs_f64());
        }
    }

    /// The task has ended, and its engine may have counted otherwise.
    pub(crate) fn total(&self, counted: &mut CountedTokens, tokens_in: Option<u64>, tokens_out: Option<u64>) {
        self.tokens_in.inc_by(tokens_in.unwrap_or_default());
        let more = tokens_out.unwrap_or_default().saturating_sub(counted.tokens);
        self.tokens_out.inc_by(more);
        counted.tokens += more;
    }
}

/// Whose an error mostly is. `model`: its label.
fn fault(end: &TaskEnd, model: &str) -> &'static str {
    use ErrorCode as C;
    match end.code {
        None => NONE,
        // Of a model that no node ever had, or of a time that the client has set.
        Some(C::ModelNotAvailable) if model == OTHER => "client",
        Some(C::DeadlineExceeded) if end.spec.deadline_ms.is_some_and(|most| end.elapsed_ms >= most) => {
            "client"
        }
        Some(
            C::InvalidParams
            | C::Unsupported
            | C::ContextTooLong
            | C::MissingToken
            | C::BadToken
            | C::Forbidden
            | C::NotFound
            | C::MethodNotAllowed
            | C::TaskConflict
            | C::EventsExpired
            | C::PayloadTooLarge
            | C::RateLimited
            | C::BudgetExceeded
            | C::PoolAmbiguous
            | C::HolderAmbiguous
            | C::CloudProfileDisabled
            | C::Canceled,
        ) => "client",
        Some(C::DecodeTimeout | C::WorkerReset) => "engine",
        Some(
            C::NodeUnknown
            | C::NodeIdConflict
            | C::WrongNode
            | C::StaleLink
            | C::AttemptDuplicate
            | C::AdmissionReject
            | C::QueueFullDropLru
            | C::NodeUnavailable
            | C::ModelNotAvailable
            | C::PoolUnready
            | C::PoolUnavailable
            | C::ReplicaExhausted
            | C::Overloaded
            | C::Draining
            | C::DeadlineExceeded
            | C::Internal
            | C::Unknown,
        ) => "cluster",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2712
    #[tokio::test(start_paused = true)]
    async fn ten_thousand_invented_models_are_one_and_tokens_count_once_as_they_come() {
        let measured = Measured::new(false);
        let model = |name: String| ModelRef::new(&name).unwrap();
        let invented = (0..10_000).map(|n| model(format!("invented-{n}")));
        assert!(invented.into_iter().all(|name| measured.model(&name, false) == OTHER));
        let had = (0..1_000).map(|n| model(format!("had-{n}")));
        let shown = had.into_iter().filter(|name| measured.model(name, true) != OTHER).count();
        assert_eq!(shown, MODELS);
        let (name, mut counted) = (model("had-1".into()), CountedTokens::default());
        assert_eq!(measured.model(&name, false), "had-1", "a node had it");
        let series = measured.series(&name, true);
        for tokens in [1, 3, 3, 4] {
            series.count(&mut counted, tokens);
            tokio::time::advance(Duration::from_millis(40)).await;
        }
        series.total(&mut counted, Some(7), Some(6));
        series.total(&mut counted, None, Some(6));
        assert_eq!((series.tokens_out.get(), series.tokens_in.get()), (6, 7));
        assert_eq!(series.inter_token.get_sample_count(), 2, "what came together came once");
        assert!((series.inter_token.get_sample_sum() - 0.12).abs() < 1e-9);
    }
}
