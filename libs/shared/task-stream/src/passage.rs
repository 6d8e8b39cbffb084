//! Requests that go to an engine as they came, and answers that come back so.

use bytes::Bytes;
use pool_registry_types::NodeId;
use pool_registry_types::engines::{EngineKind, capabilities};
use serde::{Deserialize, Serialize};

use crate::openai_route::OpenAiRoute;

/// Longest event of a stream that is passed on, bytes. Source: .specs/01 CLOUD-2858.
pub const MAX_PASSED_EVENT_BYTES: usize = 8 * 1024 * 1024;

/// How a body goes to the engine's own route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passage {
    pub route: OpenAiRoute,
    /// The client asks for a stream.
    #[serde(default)]
    pub stream: bool,
    /// Without its question mark.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query: Option<String>,
    /// Those of the client's headers that the engine is to have, in lower case.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<(String, String)>,
    /// Where the value of the body's `model` stands, quotes included: a node writes the engine's own
    /// name there where that is another one. Absent: the body has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_at: Option<(u32, u32)>,
}

impl Passage {
    /// The body with this name of the model; shared where there is nothing to change. Nothing where the
    /// place of the name is none of the body's.
    pub fn with_model(&self, body: &Bytes, model: &str) -> Option<Bytes> {
        let Some((from, to)) = self.model_at else { return Some(body.clone()) };
        let (from, to) = (usize::try_from(from).ok()?, usize::try_from(to).ok()?);
        let before = body.get(..from)?;
        let (value, after) = (body.get(from..to)?, body.get(to..)?);
        if serde_json::from_slice::<String>(value).ok()? == model {
            return Some(body.clone());
        }
        let name = serde_json::to_vec(model).ok()?;
        Some([before, &name, after].concat().into())
    }
}

impl OpenAiRoute {
    /// Whether engines of the kind have the route. What is not proven is not claimed.
    pub const fn is_of(self, engine: EngineKind) -> bool {
        let can = capabilities(engine);
        let is_llama = matches!(engine, EngineKind::LlamaCpp);
        let is_plain = matches!(engine, EngineKind::LlamaCpp | EngineKind::Vllm | EngineKind::OpenAi);
        match self {
            Self::ChatCompletions => can.chat,
            Self::Completions => is_plain && can.completion,
            Self::Embeddings => can.embedding,
            Self::Rerank => can.rerank,
            Self::Messages | Self::Responses | Self::CountTokens => is_plain,
            Self::Tokenize | Self::Detokenize => is_llama || matches!(engine, EngineKind::Vllm),
            Self::ApplyTemplate => is_llama,
        }
    }
}

/// Status and headers of an engine's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerHead {
    pub status: u16,
    /// In the order in which they came.
    #[serde(default)]
    pub headers: Vec<(String, String)>,
}

impl AnswerHead {
    /// Whether what follows is a stream of events; else it is counted in bytes.
    pub fn is_event_stream(&self) -> bool {
        self.headers.iter().any(|(name, value)| {
            let kind = value.split(';').next().unwrap_or_default().trim();
            name.eq_ignore_ascii_case("content-type") && kind.eq_ignore_ascii_case("text/event-stream")
        })
    }
}

/// The head of the answer that stands in a log, and whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedHead {
    pub head: AnswerHead,
    pub node_id: NodeId,
}

/// Whether these whole events are comments only, which are no answer yet.
pub(crate) fn is_comments(events: &[u8]) -> bool {
    events.split(|byte| matches!(byte, b'\n' | b'\r')).all(|line| line.is_empty() || line.starts_with(b":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passage(model_at: Option<(u32, u32)>) -> Passage {
        Passage { route: OpenAiRoute::Completions, stream: false, query: None, headers: Vec::new(), model_at }
    }

    // CLOUD-2831
    #[test]
    fn only_the_value_of_the_model_is_changed_and_only_where_it_is_another_one() {
        let body = Bytes::from_static(b"{ \"model\" : \"a\\u002fb\",\"x\": 1.50}");
        let named = passage(Some((12, 22)));
        let same = named.with_model(&body, "a/b").unwrap();
        assert_eq!(same.as_ptr(), body.as_ptr());
        assert_eq!(
            named.with_model(&body, "own \"c\"").unwrap(),
            "{ \"model\" : \"own \\\"c\\\"\",\"x\": 1.50}"
        );
        assert_eq!(passage(None).with_model(&body, "c").unwrap(), body);
        for wrong in [(12, 400), (22, 12), (0, 5)] {
            assert_eq!(passage(Some(wrong)).with_model(&body, "c"), None, "{wrong:?}");
        }
    }

    #[test]
    fn an_event_stream_is_known_by_its_content_type() {
        for (kind, is) in [
            ("text/event-stream; charset=utf-8", true),
            ("Text/Event-Stream", true),
            ("application/json", false),
        ] {
            let head = AnswerHead { status: 200, headers: vec![("Content-Type".into(), kind.into())] };
            assert_eq!(head.is_event_stream(), is, "{kind}");
        }
        assert!(!AnswerHead { status: 200, headers: vec![] }.is_event_stream());
    }

    #[test]
    fn comments_are_known_from_events() {
        assert!(is_comments(b": a\r\n\r\n:\n\n") && !is_comments(b": a\n\ndata: x\n\n"));
    }
}
