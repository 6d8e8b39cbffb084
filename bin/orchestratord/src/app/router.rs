//! All routes with their document, made from the same handlers.

use std::sync::Arc;

use axum::Router;
use axum::extract::Extension;
use axum::http::{Method, header};
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse;
use axum::routing::get;
use bytes::Bytes;
use daemon_kit::auth::Need;
use daemon_kit::tokens::Scope;
use pool_registry_types::routes as paths;
use pool_registry_types::task::{EmbeddingResult, End, Metrics, RerankResult, Started, Token};
use pool_registry_types::view::ClusterChange;
use task_stream::OpenAiRoute;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use utoipa_swagger_ui::{Config, SwaggerUi};

use crate::api::turns::{self, Turns};
use crate::api::{artifacts, catalog, meta, nodes, observe, pools, sessions, tasks, v1};
use crate::app::examples;
use crate::app::state::AppState;

#[derive(OpenApi)]
#[openapi(
    info(title = "llama-orch", description = "The control plane: tasks in, tokens out. Every error has the body ErrorBody; its code is the contract."),
    components(schemas(Metrics, Started, Token, EmbeddingResult, RerankResult, End, ClusterChange)),
    tags((name = "tasks"), (name = "sessions"), (name = "nodes"), (name = "pools"), (name = "catalog"), (name = "artifacts"),
        (name = "meta"), (name = "observe"), (name = "openai"))
)]
struct Document;

fn parts() -> (Router<AppState>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(tasks::submit))
        .routes(routes!(tasks::get))
        .routes(routes!(tasks::events))
        .routes(routes!(tasks::cancel))
        .routes(routes!(sessions::get, sessions::delete))
        .routes(routes!(v1::chat_completions))
        .routes(routes!(v1::completions))
        .routes(routes!(v1::embeddings))
        .routes(routes!(v1::rerank))
        .routes(routes!(v1::messages))
        .routes(routes!(v1::count_tokens))
        .routes(routes!(v1::responses))
        .routes(routes!(v1::tokenize))
        .routes(routes!(v1::detokenize))
        .routes(routes!(v1::apply_template))
        .routes(routes!(nodes::register))
        .routes(routes!(nodes::heartbeat))
        .routes(routes!(nodes::deregister))
        .routes(routes!(nodes::drain))
        .routes(routes!(nodes::resume))
        .routes(routes!(pools::drain))
        .routes(routes!(pools::reload))
        .routes(routes!(pools::purge))
        .routes(routes!(pools::logs))
        .routes(routes!(catalog::create))
        .routes(routes!(catalog::get, catalog::delete))
        .routes(routes!(catalog::set_state))
        .routes(routes!(artifacts::create))
        .routes(routes!(artifacts::get))
        .routes(routes!(meta::version))
        .routes(routes!(meta::capabilities))
        .routes(routes!(daemon_kit::log_level::put_log_level))
        .routes(routes!(observe::live))
        .routes(routes!(observe::ready))
        .routes(routes!(observe::events))
        .merge(made_in_turn())
        .split_for_parts()
}

/// What is read of the whole cluster, or of all tasks or models: the more there is, the longer it takes.
fn made_in_turn() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(tasks::list))
        .routes(routes!(tasks::explain))
        .routes(routes!(tasks::explain_request))
        .routes(routes!(v1::list))
        .routes(routes!(v1::get))
        .routes(routes!(nodes::list))
        .routes(routes!(nodes::get))
        .routes(routes!(pools::list))
        .routes(routes!(pools::health))
        .routes(routes!(catalog::availability))
        .routes(routes!(catalog::list))
        .routes(routes!(catalog::verify))
        .routes(routes!(observe::metrics))
        .routes(routes!(observe::targets))
        .route_layer(from_fn_with_state(Turns::default(), turns::in_turn))
}

/// The OpenAPI document, as JSON.
pub(crate) fn document() -> String {
    complete(&parts().1)
}

fn complete(document: &utoipa::openapi::OpenApi) -> String {
    let mut document = serde_json::to_value(document).expect("the document is always JSON");
    // A name of a model may have slashes, for which the document has no word.
    if let Some(all) = document["paths"].as_object_mut()
        && let Some(item) = all.remove("/v1/models/{*model}")
    {
        all.insert("/v1/models/{model}".to_owned(), item);
    }
    let mut document = daemon_kit::document::finish(document, needs);
    examples::add(&mut document);
    format!("{document:#}")
}

pub(crate) fn router(state: AppState) -> Router {
    let (routes, document) = parts();
    // Shared by all who are given it, and so by all who do not take it.
    let json = Bytes::from(complete(&document));
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
        paths::METRICS | paths::TARGETS | paths::OPENAPI | paths::META_VERSION | paths::META_CAPABILITIES => {
            Need::Any
        }
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
        // The routes of engines, and the list of their models.
        _ if v1::is_ours(path) && reads => LOOK,
        _ if v1::is_ours(path) => Need::Scope(Scope::Client),
        _ => Need::Scope(Scope::Admin),
    }
}

/// Whether a request is one for a task's stream, by its method and path.
pub(crate) fn is_stream(method: &Method, path: &str) -> bool {
    let passes = || OpenAiRoute::of_path(path).is_some_and(OpenAiRoute::takes_slot);
    let submits = *method == Method::POST && (path == paths::TASKS || passes());
    let reads = *method == Method::GET && path.starts_with(paths::TASKS) && path.ends_with("/events");
    submits || reads
}

/// The second listener: the metrics and the probes.
pub(crate) fn metrics(state: AppState) -> Router {
    Router::new()
        .route(paths::METRICS, get(observe::metrics))
        .route_layer(from_fn_with_state(Turns::default(), turns::in_turn))
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
    use serde_json::Value;

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

    // CLOUD-2840
    #[test]
    fn the_document_has_the_routes_of_other_apis_with_what_they_need_and_their_own_errors() {
        let document: Value = serde_json::from_str(&document()).unwrap();
        let paths = &document["paths"];
        for path in ["/v1/chat/completions", "/v1/messages", "/tokenize"] {
            let refused = &paths[path]["post"]["responses"]["401"]["content"]["application/json"]["schema"];
            assert_eq!(refused["$ref"], "#/components/schemas/GatewayError", "{path}");
            assert_eq!(needs(&Method::POST, path), Need::Scope(Scope::Client));
            assert_eq!(is_stream(&Method::POST, path), path != "/tokenize", "{path}");
            assert!(!is_stream(&Method::GET, path), "{path}");
        }
        assert!(document["components"]["schemas"]["GatewayError"].is_object());
        assert!(paths["/v1/models/{model}"]["get"].is_object() && paths["/v1/models/{*model}"].is_null());
        assert_eq!(needs(&Method::GET, "/v1/models/{*model}"), LOOK);
    }
}
