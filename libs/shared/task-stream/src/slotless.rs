//! Requests that take no slot, on their way between the daemons: a line of JSON that says what the bytes
//! behind it are, and these bytes as they came. The answer goes back in the same form.

use bytes::Bytes;
use pool_registry_types::ModelRef;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::passage::Passage;

/// Longest line before the bytes: the client's headers and the query, mostly.
const MAX_LINE_BYTES: usize = 256 * 1024;

/// A request that goes to an engine without a place in a queue and without a slot; the body stands behind
/// it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotlessRequest {
    /// The name by which tasks ask for the model.
    pub model: ModelRef,
    pub passage: Passage,
}

/// Why bytes are nothing of this kind.
#[derive(Debug, thiserror::Error)]
pub enum Unframed {
    #[error("it has no line of at most {MAX_LINE_BYTES} bytes before its bytes")]
    NoLine,
    #[error("its line is unreadable")]
    Line(#[source] serde_json::Error),
}

/// What comes before the bytes.
pub fn line_of(about: &impl Serialize) -> Bytes {
    let mut line = serde_json::to_vec(about).expect("plain values are always JSON");
    line.push(b'\n');
    line.into()
}

/// The line's value and the bytes behind it, which are shared.
pub fn unframed<T: DeserializeOwned>(framed: &Bytes) -> Result<(T, Bytes), Unframed> {
    let within = &framed[..framed.len().min(MAX_LINE_BYTES)];
    let end = within.iter().position(|byte| *byte == b'\n').ok_or(Unframed::NoLine)?;
    let about = serde_json::from_slice(&framed[..end]).map_err(Unframed::Line)?;
    Ok((about, framed.slice(end + 1..)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai_route::OpenAiRoute;
    use crate::passage::AnswerHead;

    // CLOUD-2906
    #[test]
    fn bytes_travel_behind_a_line_that_says_what_they_are() {
        let line = r#"{"model":"org/m:1","passage":{"route":"tokenize","query":"a=b","headers":[["x-title","t\n"]],"model_at":[9,16]}}"#;
        let framed = Bytes::from(format!("{line}\n{{\"model\":\n\"x\"}}"));
        let (request, body): (SlotlessRequest, Bytes) = unframed(&framed).unwrap();
        assert_eq!((request.passage.route, request.passage.model_at), (OpenAiRoute::Tokenize, Some((9, 16))));
        assert_eq!(body, "{\"model\":\n\"x\"}");
        let again = Bytes::from([&line_of(&request)[..], &body].concat());
        assert_eq!(unframed::<SlotlessRequest>(&again).unwrap(), (request, body));
        let head = AnswerHead { status: 200, headers: vec![("a".into(), "b".into())] };
        assert_eq!(unframed::<AnswerHead>(&line_of(&head)).unwrap(), (head, Bytes::new()));
    }

    #[test]
    fn what_has_no_line_or_an_unreadable_one_is_refused() {
        for bad in [Bytes::from_static(b"{}"), Bytes::from(vec![b' '; MAX_LINE_BYTES + 1])] {
            assert!(matches!(unframed::<AnswerHead>(&bad), Err(Unframed::NoLine)));
        }
        assert!(matches!(unframed::<AnswerHead>(&Bytes::from_static(b"{}\nx")), Err(Unframed::Line(_))));
    }
}
