//! Whose a task or a session is that a request names.
//!
//! A client knows its own only: another's is not found, whatever else is asked of it. Whoever sees
//! those of all holders gets its own first, or else the only one of that id, and may say whose it means.

use std::sync::Arc;

use daemon_kit::{ApiError, Caller};
use pool_registry_types::{ErrorBody, ErrorCode, HolderId, SessionId, SessionKey, TaskId};
use serde::Deserialize;
use task_scheduler::TaskRecord;
use utoipa::IntoParams;

use crate::app::state::AppState;

/// Which of several things of one id.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct OfHolder {
    /// The name of its holder: needed where several have one of this id, and whoever asks sees them all.
    #[param(value_type = String, required = false)]
    pub(crate) holder: Option<String>,
}

/// What is asked of the thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// What operators may see and do of everybody's things.
    Metadata,
    /// What only `admin` may of another's.
    Contents,
}

impl Reach {
    fn includes_others(self, caller: &Caller) -> bool {
        match self {
            Self::Metadata => caller.sees_all(),
            Self::Contents => caller.is_admin(),
        }
    }
}

/// The holder that is meant. It need not have the thing.
fn holder(
    state: &AppState,
    caller: &Caller,
    reach: Reach,
    of: &OfHolder,
    candidates: impl FnOnce() -> Vec<HolderId>,
) -> Result<HolderId, ApiError> {
    let own = caller.holder_id();
    if !reach.includes_others(caller) {
        return Ok(own);
    }
    if let Some(name) = &of.holder {
        return Ok(state.tokens.holder_named(name));
    }
    let candidates = candidates();
    match candidates.as_slice() {
        [only] => Ok(*only),
        [] => Ok(own),
        several if several.contains(&own) => Ok(own),
        several => {
            let names: Vec<String> = several.iter().filter_map(|id| state.tokens.name_of(*id)).collect();
            let message =
                format!("several holders have this id: say whose with ?holder= ({})", names.join(", "));
            Err(ApiError::new(ErrorCode::HolderAmbiguous, message))
        }
    }
}

pub(super) fn no_task(id: TaskId) -> ErrorBody {
    ErrorBody::new(ErrorCode::NotFound, format!("no task {id}"))
}

/// The task that is meant.
///
/// # Errors
/// `NOT_FOUND`, also for another holder's; `HOLDER_AMBIGUOUS`.
pub(super) fn task(
    state: &AppState,
    caller: &Caller,
    reach: Reach,
    id: TaskId,
    of: &OfHolder,
) -> Result<Arc<TaskRecord>, ApiError> {
    let published = &state.control.published;
    let holder = holder(state, caller, reach, of, || published.holders_of_task(id))?;
    published.task(holder, id).ok_or_else(|| no_task(id).into())
}

/// The session that is meant, which need not be there.
///
/// # Errors
/// `HOLDER_AMBIGUOUS`.
pub(super) fn session(
    state: &AppState,
    caller: &Caller,
    reach: Reach,
    session_id: SessionId,
    of: &OfHolder,
) -> Result<SessionKey, ApiError> {
    let candidates = || state.control.published.holders_of_session(session_id);
    Ok(SessionKey { holder: holder(state, caller, reach, of, candidates)?, session_id })
}
