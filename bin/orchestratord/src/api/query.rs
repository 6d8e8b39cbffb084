//! Queries of which every parameter must be known: a filter that is misspelt would list too much.

use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;
use daemon_kit::ApiError;
use daemon_kit::config::nearest;
use pool_registry_types::ErrorCode;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use utoipa::IntoParams;
use utoipa::openapi::path::{Parameter, ParameterIn};

use super::checked;

/// The query of a request, or `INVALID_PARAMS` with what is wrong in it, an unknown parameter with the name
/// that was probably meant.
#[derive(Debug)]
pub(crate) struct Known<T>(pub(crate) T);

/// A query without parameters.
#[derive(Debug, Deserialize)]
pub(crate) struct NoParameters {}

impl IntoParams for NoParameters {
    fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        Vec::new()
    }
}

impl<T: DeserializeOwned + IntoParams, S: Send + Sync> FromRequestParts<S> for Known<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        if parts.uri.query().is_some_and(|query| !query.is_empty()) {
            let Query(given) = Query::<Vec<(String, String)>>::try_from_uri(&parts.uri)
                .map_err(|error| ApiError::new(ErrorCode::InvalidParams, format!("query: {error}")))?;
            refuse_unknown::<T>(given.iter().map(|(name, _)| name.as_str()))?;
        }
        checked(Query::try_from_uri(&parts.uri)).map(Self)
    }
}

fn refuse_unknown<'q, T: IntoParams>(mut given: impl Iterator<Item = &'q str>) -> Result<(), ApiError> {
    let known = T::into_params(|| Some(ParameterIn::Query));
    let known: Vec<&str> = known.iter().map(|parameter| parameter.name.as_str()).collect();
    let Some(name) = given.find(|name| !known.contains(name)) else { return Ok(()) };
    let shown: String = name.chars().take(64).collect();
    let instead = match nearest(name, &known) {
        Some(nearest) => format!("is {nearest} meant?"),
        None => "this path takes none".into(),
    };
    let message = format!("query: no parameter is called {shown:?}, {instead}");
    Err(ApiError::new(ErrorCode::InvalidParams, message))
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    #[derive(Debug, Deserialize, IntoParams)]
    #[into_params(parameter_in = Query)]
    struct Filter {
        #[serde(default)]
        limit: Option<u32>,
        #[serde(default)]
        node_id: Option<String>,
    }

    async fn read<T: DeserializeOwned + IntoParams>(query: &str) -> Result<T, String> {
        let (mut parts, ()) = Request::get(format!("/v2/tasks{query}")).body(()).unwrap().into_parts();
        let read = Known::<T>::from_request_parts(&mut parts, &()).await;
        read.map(|Known(query)| query).map_err(|error| error.0.to_string())
    }

    // CLOUD-2983
    #[tokio::test]
    async fn an_unknown_parameter_is_refused_with_the_nearest_name() {
        let filter = read::<Filter>("?limit=5&node_id=a%20b").await.unwrap();
        assert_eq!((filter.limit, filter.node_id.as_deref()), (Some(5), Some("a b")));
        assert!(read::<Filter>("").await.is_ok() && read::<Filter>("?").await.is_ok());
        let misspelt = read::<Filter>("?limit=5&nodeid=a").await.unwrap_err();
        let message = "INVALID_PARAMS: query: no parameter is called \"nodeid\", is node_id meant?";
        assert_eq!(misspelt, message);
        assert!(read::<Filter>("?limit=many").await.unwrap_err().starts_with("INVALID_PARAMS: query: "));
        assert!(read::<NoParameters>("").await.is_ok());
        assert!(
            read::<NoParameters>("?limit=5").await.unwrap_err().ends_with("\"limit\", this path takes none")
        );
        let long = read::<NoParameters>(&format!("?{}", "x".repeat(4_000))).await.unwrap_err();
        assert!(long.len() < 200, "{long}");
    }
}
