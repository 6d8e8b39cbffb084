//! The engine that is played: which one, and how it is set.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use parking_lot::Mutex;

use crate::fault::Fault;
use crate::script::Scripted;
use crate::seen::Seen;
use crate::slots::Slots;
use crate::steps::Steps;

/// Tokens of prompt and answer together.
pub(crate) const CONTEXT: u64 = 8192;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    Llamacpp,
    Vllm,
    Tgi,
    Triton,
    Openai,
}

impl Kind {
    /// As a handoff names it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Llamacpp => "llamacpp",
            Self::Vllm => "vllm",
            Self::Tgi => "tgi",
            Self::Triton => "triton",
            Self::Openai => "openai",
        }
    }
}

#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) kind: Kind,
    pub(crate) model: String,
    pub(crate) slots: Arc<Slots>,
    pub(crate) first_token: Duration,
    pub(crate) pace: Duration,
    pub(crate) fault: Mutex<Fault>,
    pub(crate) key: Option<String>,
    /// Connections that were made to it.
    pub(crate) connections: AtomicU64,
    /// Traces and ids that came with its requests.
    pub(crate) seen: Seen,
    /// Answers to the byte, and what was asked.
    pub(crate) scripted: Scripted,
    /// Where its streams make their tokens all at once.
    pub(crate) steps: Steps,
}

/// How often a frozen engine looks whether it is one still.
const LOOK_EVERY: Duration = Duration::from_millis(20);

impl Engine {
    /// Returns once the engine is not frozen.
    pub(crate) async fn thawed(&self) {
        while *self.fault.lock() == Fault::Frozen {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}
