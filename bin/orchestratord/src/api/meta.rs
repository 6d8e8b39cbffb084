//! What this server is and can do.

use axum::Json;
use axum::extract::State;
use pool_registry_types::engines::{self, EngineCapabilities};
use pool_registry_types::pool::EngineKind;
use pool_registry_types::task::{MAX_BODY_BYTES, Workload};
use pool_registry_types::{ErrorBody, routes as paths};
use serde::Serialize;
use utoipa::ToSchema;

use crate::app::state::AppState;

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Version {
    /// Of this daemon.
    version: &'static str,
    api: &'static str,
}

/// Shows the version of the daemon and of the API.
#[utoipa::path(get, path = paths::META_VERSION, tag = "meta", responses((status = 200, body = Version), (status = 401, body = ErrorBody)))]
pub(crate) async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION"), api: "v2" })
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ServerCapabilities {
    profile: &'static str,
    engines: Vec<EngineKind>,
    /// What each of them can do.
    engine_capabilities: Vec<EngineCapabilities>,
    workloads: Vec<Workload>,
    max_body_bytes: usize,
}

/// Shows what can be asked of this server.
#[utoipa::path(get, path = paths::META_CAPABILITIES, tag = "meta", responses((status = 200, body = ServerCapabilities), (status = 401, body = ErrorBody)))]
pub(crate) async fn capabilities(State(state): State<AppState>) -> Json<ServerCapabilities> {
    Json(ServerCapabilities {
        profile: if state.cloud_profile { "cloud" } else { "home" },
        engines: EngineKind::ALL.to_vec(),
        engine_capabilities: EngineKind::ALL.map(engines::capabilities).to_vec(),
        workloads: Workload::ALL.to_vec(),
        max_body_bytes: MAX_BODY_BYTES,
    })
}
