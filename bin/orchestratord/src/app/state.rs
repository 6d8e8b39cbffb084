//! What every handler knows.

use std::sync::Arc;

use crate::services::placement::Control;
use crate::services::streams::Streams;

/// Shared by all requests. The registry of nodes lives behind `control`, in its one owner.
#[derive(Debug, Clone)]
pub(crate) struct AppState {
    pub(crate) control: Control,
    pub(crate) streams: Arc<Streams>,
    pub(crate) cloud_profile: bool,
}
