//! Answers that are one JSON document: embeddings and ranks, the same with every engine that has
//! them.
//!
//! A document is read whole, within a bound, and must answer all that was asked, once: what is
//! missing cannot be asked again for a part. There is room for so many bytes of them at a time
//! ([`DocumentRoom`]), and whoever finds none waits: an answer that begins to be read is read to its end.

use std::sync::Arc;

use hyper::body::Body as _;
use node_registration::body::BodyError;
use owned_tasks::Panicked;
use pool_registry_types::task::{EmbeddingResult, Inputs, MAX_RESULT_BYTES, RerankResult};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::answer::{EngineEvent, Reader, Reply};
use super::client::{Answer, with_causes};
use super::dialect::EngineRequest;
use super::json::{Object, typed};

/// `/v1/embeddings`.
pub(crate) static EMBEDDING: Reply = Reply {
    name: "an embedding",
    is_document: true,
    ends_by_closing: false,
    read: no_stream,
    token_ids: None,
};
/// `/v1/rerank`.
pub(crate) static RERANK: Reply =
    Reply { name: "a ranking", is_document: true, ends_by_closing: false, read: no_stream, token_ids: None };

fn no_stream(_: &mut Reader, _: &Object<'_>) -> EngineEvent {
    EngineEvent::Failed("it streams what is one document".into())
}

/// Longest document that is read, bytes: the most texts that a task may have, with vectors of a
/// thousand numbers written in full, take about as much.
const MAX_DOCUMENT_BYTES: usize = 64 * 1024 * 1024;
/// Most values that one has: twice as many as a task's results can have, which take four bytes each.
const MAX_DOCUMENT_VALUES: usize = MAX_RESULT_BYTES / 2;
/// What a document takes while it is read and parsed, in lengths of its own.
const COST: usize = 2;
/// The unit in which room is counted, bytes.
const ROOM_UNIT: usize = 1024;

/// Room for the documents of all attempts of a node together, and the turns in which they are parsed.
#[derive(Debug)]
pub(crate) struct DocumentRoom {
    units: Semaphore,
    most: usize,
    parsing: Semaphore,
}

/// The room that one document takes, until it is dropped.
#[derive(Debug)]
pub(crate) struct DocumentPermit<'r> {
    _units: Option<SemaphorePermit<'r>>,
    /// What it takes.
    pub(crate) bytes: usize,
}

impl DocumentRoom {
    /// Half of what a node keeps of its attempts: what is asked of engines and streams have the rest.
    pub(crate) fn within(held_bytes: usize) -> Arc<Self> {
        let most = (held_bytes / 2 / ROOM_UNIT).clamp(1, u32::MAX as usize);
        Arc::new(Self { units: Semaphore::new(most), most, parsing: Semaphore::new(1) })
    }

    /// Room for an answer, which announces its length or may have as much as any; of all, where that is less.
    /// Those who wait get it in their order.
    pub(crate) async fn take(&self, answer: &Answer) -> DocumentPermit<'_> {
        let announced = answer.response.body().size_hint().exact();
        let length = announced.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(usize::MAX);
        let units = (length.min(MAX_DOCUMENT_BYTES) * COST).div_ceil(ROOM_UNIT).min(self.most);
        let permit = self.units.acquire_many(u32::try_from(units).unwrap_or(u32::MAX)).await;
        // It is never closed.
        DocumentPermit { _units: permit.ok(), bytes: units * ROOM_UNIT }
    }
}

/// What a document says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Document {
    /// The data of one `result` event each.
    pub results: Vec<String>,
    /// Tokens of the inputs, where the engine says.
    pub tokens_in: Option<u64>,
}

/// Why there is no document.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DocumentError {
    /// The connection broke.
    #[error("{}", with_causes(.0))]
    Lost(BodyError),
    /// Fewer inputs make a shorter one.
    #[error("its answer is longer than {MAX_DOCUMENT_BYTES} bytes")]
    TooLong,
    /// As many of them would not be kept.
    #[error("its answer has more than {MAX_DOCUMENT_VALUES} values")]
    TooMany,
    /// It is whole, and not what was asked for.
    #[error("its answer is unreadable: {0}")]
    Unreadable(Unreadable),
}

/// What is amiss with a whole document.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unreadable {
    #[error("{0}")]
    Json(serde_json::Error),
    #[error("{count} results for {asked} inputs, or one of them twice")]
    Count { count: usize, asked: usize },
    #[error("its vectors are empty, of different lengths, or no numbers")]
    Vectors,
    #[error("{0}")]
    Panicked(Panicked),
}

pub(super) fn request(model: &str, inputs: &Inputs) -> EngineRequest {
    match inputs {
        Inputs::Embedding(texts) => {
            let body = json!({ "model": model, "input": texts, "encoding_format": "float" });
            EngineRequest::whole("/v1/embeddings", body, &EMBEDDING)
        }
        Inputs::Rerank(rerank) => {
            let body = json!({ "model": model, "query": rerank.query, "documents": rerank.documents });
            EngineRequest::whole("/v1/rerank", body, &RERANK)
        }
    }
}

/// Reads the answer to a request for `asked` results, for which there is room.
pub(crate) async fn read(
    answer: Answer,
    reply: &'static Reply,
    asked: usize,
    room: &DocumentRoom,
) -> Result<Document, DocumentError> {
    let body = answer.bytes(MAX_DOCUMENT_BYTES).await.map_err(|error| match error {
        BodyError::TooLong { .. } => DocumentError::TooLong,
        BodyError::Lost(_) => DocumentError::Lost(error),
    })?;
    if body.iter().filter(|byte| **byte == b',').count() > MAX_DOCUMENT_VALUES {
        return Err(DocumentError::TooMany);
    }
    // What a text becomes while it is parsed may be some times as long: one after the other.
    let _turn = room.parsing.acquire().await;
    // A document of this length takes a good part of a second.
    let parsing = owned_tasks::blocking("answer of an engine", move || parse(reply, asked, &body));
    let parsed = parsing.await.unwrap_or_else(|panicked| Err(Unreadable::Panicked(panicked)));
    parsed.map_err(DocumentError::Unreadable)
}

#[derive(Debug, Deserialize)]
struct Embeddings {
    data: Vec<Embedding>,
    #[serde(default)]
    usage: Option<Usage>,
}

#[derive(Debug, Deserialize)]
struct Embedding {
    index: usize,
    embedding: Vec<f32>,
}

#[derive(Debug, Deserialize)]
struct Ranks {
    results: Vec<Rank>,
    #[serde(default)]
    usage: Option<Usage>,
}

#[derive(Debug, Deserialize)]
struct Rank {
    index: usize,
    relevance_score: f64,
}

#[derive(Debug, Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: Option<u64>,
    #[serde(default)]
    total_tokens: Option<u64>,
}

impl Usage {
    fn tokens_in(usage: Option<Self>) -> Option<u64> {
        let usage = usage?;
        usage.prompt_tokens.filter(|tokens| *tokens > 0).or(usage.total_tokens)
    }
}

fn parse(reply: &Reply, asked: usize, body: &[u8]) -> Result<Document, Unreadable> {
    let (results, tokens_in) = if *reply == EMBEDDING {
        let answer: Embeddings = typed(body).map_err(Unreadable::Json)?;
        (embeddings(answer.data, asked)?, Usage::tokens_in(answer.usage))
    } else {
        let answer: Ranks = typed(body).map_err(Unreadable::Json)?;
        (ranks(answer.results, asked)?, Usage::tokens_in(answer.usage))
    };
    Ok(Document { results, tokens_in })
}

fn embeddings(mut data: Vec<Embedding>, asked: usize) -> Result<Vec<String>, Unreadable> {
    data.sort_by_key(|embedding| embedding.index);
    each_once(data.iter().map(|embedding| embedding.index), asked)?;
    let length = data.first().map_or(0, |first| first.embedding.len());
    let whole = |vector: &Vec<f32>| vector.len() == length && vector.iter().all(|x| x.is_finite());
    if length == 0 || !data.iter().all(|embedding| whole(&embedding.embedding)) {
        return Err(Unreadable::Vectors);
    }
    let results = data
        .into_iter()
        .zip(0..)
        .map(|(embedding, i)| serde_json::to_string(&EmbeddingResult { i, embedding: embedding.embedding }));
    results.collect::<Result<_, _>>().map_err(Unreadable::Json)
}

fn ranks(mut results: Vec<Rank>, asked: usize) -> Result<Vec<String>, Unreadable> {
    results.sort_by_key(|rank| rank.index);
    each_once(results.iter().map(|rank| rank.index), asked)?;
    // Equal ones stay in the order in which they were given.
    results.sort_by(|a, b| b.relevance_score.total_cmp(&a.relevance_score));
    let results = results.into_iter().zip(0..).map(|(rank, i)| {
        let document = rank.index as u64;
        serde_json::to_string(&RerankResult { i, document, score: rank.relevance_score })
    });
    results.collect::<Result<_, _>>().map_err(Unreadable::Json)
}

/// Sorted indices that are 0, 1, 2 … `asked` − 1.
fn each_once(indices: impl ExactSizeIterator<Item = usize>, asked: usize) -> Result<(), Unreadable> {
    let count = indices.len();
    if count != asked || !indices.eq(0..asked) {
        return Err(Unreadable::Count { count, asked });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reported(reply: &Reply, asked: usize, body: &str) -> Option<Document> {
        parse(reply, asked, body.as_bytes()).ok()
    }

    // CLOUD-2482
    #[test]
    fn embeddings_come_in_the_order_of_their_texts() {
        let body = r#"{"object":"list","model":"m","data":[
            {"object":"embedding","index":1,"embedding":[0.5,-1.0]},
            {"object":"embedding","index":0,"embedding":[0.1,2.0]}],
            "usage":{"prompt_tokens":7,"total_tokens":7}}"#;
        let results =
            vec![r#"{"i":0,"embedding":[0.1,2.0]}"#.into(), r#"{"i":1,"embedding":[0.5,-1.0]}"#.into()];
        assert_eq!(reported(&EMBEDDING, 2, body), Some(Document { results, tokens_in: Some(7) }));
    }

    // CLOUD-1522
    #[test]
    fn what_stands_beside_the_results_is_stepped_over_and_they_are_not() {
        let beside = "\u{feff}{\"x\":NaN,\"data\":[{\"index\":0,\"embedding\":[1.5],\"y\":Infinity}]}";
        let results = vec![r#"{"i":0,"embedding":[1.5]}"#.into()];
        assert_eq!(reported(&EMBEDDING, 1, beside), Some(Document { results, tokens_in: None }));
        assert!(reported(&EMBEDDING, 1, r#"{"data":[{"index":0,"embedding":[NaN]}]}"#).is_none());
    }

    // CLOUD-2482
    #[test]
    fn ranks_come_best_first_and_name_their_documents() {
        let body = r#"{"results":[{"index":0,"relevance_score":0.1},
            {"index":1,"document":{"text":"b"},"relevance_score":0.9}],"usage":{"total_tokens":5}}"#;
        let results =
            vec![r#"{"i":0,"document":1,"score":0.9}"#.into(), r#"{"i":1,"document":0,"score":0.1}"#.into()];
        assert_eq!(reported(&RERANK, 2, body), Some(Document { results, tokens_in: Some(5) }));
    }

    // CLOUD-2482
    #[test]
    fn an_answer_that_is_not_to_all_that_was_asked_is_none() {
        let one = r#"{"data":[{"index":0,"embedding":[1.0]}]}"#;
        let twice = r#"{"data":[{"index":0,"embedding":[1.0]},{"index":0,"embedding":[1.0]}]}"#;
        let uneven = r#"{"data":[{"index":0,"embedding":[1.0]},{"index":1,"embedding":[1.0,2.0]}]}"#;
        let of_tokens = r#"{"data":[{"index":0,"embedding":[[1.0],[2.0]]}]}"#;
        for (asked, body) in [(2, one), (2, twice), (2, uneven), (1, of_tokens), (1, "{"), (1, "{}")] {
            assert!(reported(&EMBEDDING, asked, body).is_none(), "{body}");
        }
        assert!(reported(&RERANK, 1, r#"{"results":[]}"#).is_none());
    }
}
