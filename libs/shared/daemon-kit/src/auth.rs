//! The bearer token: one layer for both daemons.
//!
//! Tokens are compared as SHA-256 digests in constant time, so neither content nor length of
//! a token can be measured. The first of several is sent, all are accepted. Open without a
//! token: the liveness and readiness probes and the static API page, which asks for the token
//! itself.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use pool_registry_types::{ErrorCode, routes};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::answer::ApiError;

/// Shortest token that is taken, bytes.
pub const MIN_TOKEN_BYTES: usize = 8;

/// Why the configured tokens are no tokens.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("{origin}: a token must be at least {MIN_TOKEN_BYTES} visible ASCII characters without a comma")]
    Malformed { origin: &'static str },
    #[error("LLORCH_API_TOKEN_FILE: {path} cannot be read")]
    Unreadable {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{origin} holds no token")]
    Empty { origin: &'static str },
}

/// The tokens of a daemon. Never printed.
#[derive(Clone, Default)]
pub struct Tokens {
    first: Option<Arc<str>>,
    digests: Arc<[[u8; 32]]>,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokens({})", self.digests.len())
    }
}

impl Tokens {
    /// From `LLORCH_API_TOKEN` (comma-separated) and `LLORCH_API_TOKEN_FILE` (one a line, `#`
    /// comments). Neither given: none.
    pub fn load(list: Option<&str>, file: Option<&Path>) -> Result<Self, TokenError> {
        let mut tokens: Vec<String> = Vec::new();
        if let Some(list) = list {
            let found = list.split(',').map(str::trim).filter(|token| !token.is_empty());
            gather(&mut tokens, found, "LLORCH_API_TOKEN")?;
        }
        if let Some(path) = file {
            let text = std::fs::read_to_string(path)
                .map_err(|source| TokenError::Unreadable { path: path.display().to_string(), source })?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
            gather(&mut tokens, lines, "LLORCH_API_TOKEN_FILE")?;
        }
        let digests = tokens.iter().map(|token| digest(token)).collect();
        Ok(Self { first: tokens.first().map(|token| Arc::from(token.as_str())), digests })
    }

    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// The token to send to the other daemon.
    pub fn to_send(&self) -> Option<&str> {
        self.first.as_deref()
    }

    fn accept(&self, token: &str) -> bool {
        let given = digest(token);
        // Every digest is compared, whichever matches.
        self.digests.iter().fold(false, |found, known| found | bool::from(known.ct_eq(&given)))
    }

    fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let missing =
            || ApiError::new(ErrorCode::MissingToken, "send the header Authorization: Bearer <token>");
        let bad = || ApiError::new(ErrorCode::BadToken, "this token is not known");
        let mut values = headers.get_all(header::AUTHORIZATION).iter();
        let value = values.next().ok_or_else(missing)?;
        if values.next().is_some() {
            return Err(bad());
        }
        let value = value.to_str().map_err(|_| bad())?;
        let (scheme, token) = value.split_once(' ').ok_or_else(bad)?;
        if !scheme.eq_ignore_ascii_case("bearer") || !self.accept(token.trim()) {
            return Err(bad());
        }
        Ok(())
    }
}

fn gather<'a>(
    tokens: &mut Vec<String>,
    found: impl Iterator<Item = &'a str>,
    origin: &'static str,
) -> Result<(), TokenError> {
    let before = tokens.len();
    for token in found {
        let good = token.len() >= MIN_TOKEN_BYTES && token.bytes().all(|b| b.is_ascii_graphic() && b != b',');
        if !good {
            return Err(TokenError::Malformed { origin });
        }
        tokens.push(token.to_owned());
    }
    if tokens.len() == before { Err(TokenError::Empty { origin }) } else { Ok(()) }
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

fn is_open(path: &str) -> bool {
    path == routes::HEALTH_LIVE
        || path == routes::HEALTH_READY
        || path == routes::API_PAGE
        || path.strip_prefix(routes::API_PAGE).is_some_and(|rest| rest.starts_with('/'))
}

/// Refuses requests without a known token. Without configured tokens everything is open; that
/// this is allowed is decided at the start.
pub async fn layer(State(tokens): State<Tokens>, request: Request, next: Next) -> Response {
    if tokens.is_empty() || is_open(request.uri().path()) {
        return next.run(request).await;
    }
    match tokens.check(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn code(tokens: &Tokens, values: &[&str]) -> Option<ErrorCode> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        tokens.check(&headers).err().map(|error| error.0.code)
    }

    // CLOUD-1110
    #[test]
    fn any_configured_token_is_accepted_and_nothing_else() {
        let tokens = Tokens::load(Some("first-token, second-token"), None).unwrap();
        assert_eq!(tokens.to_send(), Some("first-token"));
        assert_eq!(code(&tokens, &["Bearer first-token"]), None);
        assert_eq!(code(&tokens, &["bearer second-token"]), None);
        assert_eq!(code(&tokens, &[]), Some(ErrorCode::MissingToken));
        for bad in [
            "Bearer",
            "Bearer ",
            "first-token",
            "Basic first-token",
            "Bearer first-toke",
            "Bearer first-token2",
        ] {
            assert_eq!(code(&tokens, &[bad]), Some(ErrorCode::BadToken), "{bad}");
        }
        assert_eq!(code(&tokens, &["Bearer first-token", "Bearer first-token"]), Some(ErrorCode::BadToken));
    }

    // CLOUD-1111
    #[test]
    fn a_short_or_empty_token_stops_the_start() {
        for bad in ["short", "", " , ", "with space", "tökenxxxxx"] {
            assert!(Tokens::load(Some(bad), None).is_err(), "{bad:?}");
        }
        assert!(Tokens::load(None, None).unwrap().is_empty());
    }

    // CLOUD-1112
    #[test]
    fn tokens_are_not_printed() {
        let tokens = Tokens::load(Some("very-secret"), None).unwrap();
        assert!(!format!("{tokens:?}").contains("secret"));
    }
}
