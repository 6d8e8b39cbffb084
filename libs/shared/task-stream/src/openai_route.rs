//! The routes of the OpenAI-compatible gateway, as one table.
//!
//! Both daemons read it: the control plane to take a request in, the node to ask the engine at the
//! same path and to know when its stream is whole. Bodies and answers are not known here.

use serde::{Deserialize, Serialize};

/// A route under which an engine is asked with the client's own bytes. Source: .specs/01 CLOUD-2800.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OpenAiRoute {
    ChatCompletions,
    Completions,
    Embeddings,
    Rerank,
    /// Anthropic's chat.
    Messages,
    Responses,
    CountTokens,
    Tokenize,
    Detokenize,
    ApplyTemplate,
}

/// Whose shapes the errors of a route have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ApiDialect {
    OpenAi,
    Anthropic,
}

/// How a stream of a route says that it is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndMarker {
    /// An event with the data `[DONE]`.
    Done,
    /// An event of the type `message_stop`.
    MessageStop,
    /// An event of the type `response.completed`, `response.failed` or `response.incomplete`.
    Response,
}

impl OpenAiRoute {
    pub const ALL: [Self; 10] = [
        Self::ChatCompletions,
        Self::Completions,
        Self::Embeddings,
        Self::Rerank,
        Self::Messages,
        Self::Responses,
        Self::CountTokens,
        Self::Tokenize,
        Self::Detokenize,
        Self::ApplyTemplate,
    ];

    /// The path, on the control plane and at an engine alike.
    pub const fn path(self) -> &'static str {
        match self {
            Self::ChatCompletions => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Embeddings => "/v1/embeddings",
            Self::Rerank => "/v1/rerank",
            Self::Messages => "/v1/messages",
            Self::Responses => "/v1/responses",
            Self::CountTokens => "/v1/messages/count_tokens",
            Self::Tokenize => "/tokenize",
            Self::Detokenize => "/detokenize",
            Self::ApplyTemplate => "/apply-template",
        }
    }

    /// The route of a path, which has no query.
    pub fn of_path(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|route| route.path() == path)
    }

    /// Whether a request waits in the queue for a slot and counts against quotas.
    pub const fn takes_slot(self) -> bool {
        match self {
            Self::ChatCompletions
            | Self::Completions
            | Self::Embeddings
            | Self::Rerank
            | Self::Messages
            | Self::Responses => true,
            Self::CountTokens | Self::Tokenize | Self::Detokenize | Self::ApplyTemplate => false,
        }
    }

    /// How a stream ends; none where answers are whole only, whatever the request says.
    pub const fn end_marker(self) -> Option<EndMarker> {
        match self {
            Self::ChatCompletions | Self::Completions => Some(EndMarker::Done),
            Self::Messages => Some(EndMarker::MessageStop),
            Self::Responses => Some(EndMarker::Response),
            Self::Embeddings
            | Self::Rerank
            | Self::CountTokens
            | Self::Tokenize
            | Self::Detokenize
            | Self::ApplyTemplate => None,
        }
    }

    /// Whether a request may ask for a stream.
    pub const fn may_stream(self) -> bool {
        self.end_marker().is_some()
    }

    pub const fn dialect(self) -> ApiDialect {
        match self {
            Self::Messages | Self::CountTokens => ApiDialect::Anthropic,
            _ => ApiDialect::OpenAi,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2800
    #[test]
    fn each_route_is_found_by_its_path_and_travels_by_its_name() {
        let names = [
            "chat_completions",
            "completions",
            "embeddings",
            "rerank",
            "messages",
            "responses",
            "count_tokens",
            "tokenize",
            "detokenize",
            "apply_template",
        ];
        for (route, name) in OpenAiRoute::ALL.into_iter().zip(names) {
            assert_eq!(OpenAiRoute::of_path(route.path()), Some(route));
            assert_eq!(serde_json::to_value(route).unwrap(), name);
            assert_eq!(serde_json::from_value::<OpenAiRoute>(name.into()).unwrap(), route);
        }
        assert_eq!(OpenAiRoute::of_path("/v1/audio/speech"), None);
        assert_eq!(OpenAiRoute::of_path("/v1/chat/completions/"), None);
    }

    // CLOUD-2800
    #[test]
    fn what_streams_takes_a_slot_and_tokens_are_counted_without_one() {
        for route in OpenAiRoute::ALL {
            assert!(route.takes_slot() || !route.may_stream(), "{route:?}");
        }
        assert!(OpenAiRoute::Embeddings.takes_slot());
        assert!(!OpenAiRoute::CountTokens.takes_slot());
        assert_eq!(OpenAiRoute::CountTokens.dialect(), ApiDialect::Anthropic);
        assert_eq!(OpenAiRoute::Responses.dialect(), ApiDialect::OpenAi);
    }
}
