//! All routes with their document, made from the same handlers.

use std::sync::Arc;

use axum::Router;
use axum::extract::Extension;
use axum::http::{Method, header};
use axum::response::IntoResponse;
use axum::routing::get;
use daemon_kit::auth::Need;
use daemon_kit::tokens::Scope;
use pool_registry_types::routes as paths;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use utoipa_swagger_ui::{Config, SwaggerUi};

use crate::api::{artifacts, catalog, meta, nodes, observe, pools, sessions, tasks};
use crate::app::state::AppState;

#[derive(OpenApi)]
#[openapi(
    info(title = "llama-orch", description = "The control plane: tasks in, tokens out. Every error has the body ErrorBody; its code is the contract."),
    tags((name = "tasks"), (name = "sessions"), (name = "nodes"), (name = "pools"), (name = "catalog"), (name = "artifacts"),
        (name = "meta"), (name = "observe"))
)]
struct Document;

fn parts() -> (Router<AppState>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(tasks::submit, tasks::list))
        .routes(routes!(tasks::get))
        .routes(routes!(tasks::events))
        .routes(routes!(tasks::cancel))
        .routes(routes!(tasks::explain))
        .routes(routes!(tasks::explain_request))
        .routes(routes!(sessions::get, sessions::delete))
        .routes(routes!(nodes::list))
        .routes(routes!(nodes::register))
        .routes(routes!(nodes::heartbeat))
        .routes(routes!(nodes::get, nodes::deregister))
        .routes(routes!(nodes::drain))
        .routes(routes!(nodes::resume))
        .routes(routes!(pools::list))
        .routes(routes!(pools::health))
        .routes(routes!(pools::drain))
        .routes(routes!(pools::reload))
        .routes(routes!(pools::purge))
        .routes(routes!(pools::logs))
        .routes(routes!(catalog::availability))
        .routes(routes!(catalog::create, catalog::list))
        .routes(routes!(catalog::get, catalog::delete))
        .routes(routes!(catalog::verify))
        .routes(routes!(catalog::set_state))
        .routes(routes!(artifacts::create))
        .routes(routes!(artifacts::get))
        .routes(routes!(meta::version))
        .routes(routes!(meta::capabilities))
        .routes(routes!(observe::live))
        .routes(routes!(observe::ready))
        .routes(routes!(observe::metrics))
        .routes(routes!(observe::events))
        .split_for_parts()
}

/// The OpenAPI document, as JSON.
pub(crate) fn document() -> String {
    complete(&parts().1)
}

fn complete(document: &utoipa::openapi::OpenApi) -> String {
    let document = serde_json::to_value(document).expect("the document is always JSON");
    format!("{:#}", daemon_kit::document::finish(document, needs))
}

pub(crate) fn router(state: AppState) -> Router {
    let (routes, document) = parts();
    let json = complete(&document);
    let page = SwaggerUi::new(paths::API_PAGE).config(Config::new([paths::OPENAPI]));
    let page: Router<AppState> = page.into();
    let bodies = Arc::clone(&state.bodies);
    routes
        .route(
            paths::OPENAPI,
            get(move || async move { ([(header::CONTENT_TYPE, "application/json")], json) }),
        )
        .merge(page)
        .route(&format!("{}/swagger-initializer.js", paths::API_PAGE), get(initializer))
        .layer(Extension(bodies))
        .with_state(state)
}

/// What a client is shown of its own, and an operator of everything.
const LOOK: Need = Need::Either([Scope::Client, Scope::Operator]);

/// What each route needs. What is not named needs everything.
pub(crate) fn needs(method: &Method, path: &str) -> Need {
    let reads = method == Method::GET || method == Method::HEAD;
    match path {
        paths::METRICS | paths::OPENAPI | paths::META_VERSION | paths::META_CAPABILITIES => Need::Any,
        paths::NODE_REGISTER | paths::NODE_HEARTBEAT => Need::Scope(Scope::Node),
        // A node leaves by itself; an operator may send it away.
        paths::NODE if *method == Method::DELETE => Need::Scope(Scope::Node),
        paths::TASK | paths::TASK_CANCEL | paths::TASK_EXPLAIN | paths::PLACEMENT_EXPLAIN => LOOK,
        paths::TASKS
        | paths::SESSION
        | paths::NODES
        | paths::NODE
        | paths::POOLS
        | paths::POOL_HEALTH
        | paths::CATALOG_AVAILABILITY
        | paths::CATALOG_MODELS
        | paths::CATALOG_MODEL
        | paths::EVENTS
            if reads =>
        {
            LOOK
        }
        paths::TASKS | paths::TASK_EVENTS | paths::SESSION | paths::ARTIFACTS | paths::ARTIFACT => {
            Need::Scope(Scope::Client)
        }
        paths::POOL_LOGS if reads => Need::Scope(Scope::Operator),
        paths::NODE_DRAIN | paths::NODE_RESUME | paths::POOL_DRAIN | paths::POOL_RELOAD => {
            Need::Scope(Scope::Operator)
        }
        _ => Need::Scope(Scope::Admin),
    }
}

/// Whether a request is one for a task's stream, by its method and path.
pub(crate) fn is_stream(method: &Method, path: &str) -> bool {
    let submits = *method == Method::POST && path == paths::TASKS;
    let reads = *method == Method::GET && path.starts_with(paths::TASKS) && path.ends_with("/events");
    submits || reads
}

/// The second listener: the metrics and the probes.
pub(crate) fn metrics(state: AppState) -> Router {
    Router::new()
        .route(paths::METRICS, get(observe::metrics))
        .route(paths::HEALTH_LIVE, get(observe::live))
        .route(paths::HEALTH_READY, get(observe::ready))
        .with_state(state)
}

/// The page asks for the token once and sends it along; it keeps it for the browser's session.
async fn initializer() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/javascript")], include_str!("api_page.js"))
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2700
    #[test]
    fn an_operator_looks_drains_resumes_reloads_and_cancels_and_does_nothing_else() {
        let admits = |method: &Method, path: &str| match needs(method, path) {
            Need::Open | Need::Any => true,
            Need::Scope(scope) => scope == Scope::Operator,
            Need::Either(scopes) => scopes.contains(&Scope::Operator),
        };
        let (mut reads, mut orders) = (Vec::new(), Vec::new());
        let (_, document) = parts();
        for (path, item) in &document.paths.paths {
            // The probes are open in every daemon.
            if item.get.is_some() && !path.starts_with("/health") && !admits(&Method::GET, path) {
                reads.push(path.as_str());
            }
            if item.post.is_some() && admits(&Method::POST, path) {
                orders.push(path.as_str());
            }
            assert!(item.delete.is_none() || !admits(&Method::DELETE, path), "DELETE {path}");
        }
        reads.sort_unstable();
        orders.sort_unstable();
        assert_eq!(reads, [paths::ARTIFACT, paths::TASK_EVENTS], "contents are not an operator's");
        let may = [
            paths::NODE_DRAIN,
            paths::NODE_RESUME,
            paths::PLACEMENT_EXPLAIN,
            paths::POOL_DRAIN,
            paths::POOL_RELOAD,
            paths::TASK_CANCEL,
        ];
        assert_eq!(orders, may);
    }
}
