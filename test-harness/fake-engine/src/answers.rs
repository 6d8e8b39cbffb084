//! Answers that are one document: embeddings and ranks.
//!
//! The vector of a text begins with its length in bytes, and a document's score is how many of
//! the query's words it has, so that a reader sees at once whether one is missing or misplaced.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Json, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream;
use serde_json::{Value, json};

use crate::engine::{Engine, Kind};
use crate::fault::Fault;
use crate::stream::{Dialect, refusal};

pub(crate) async fn embeddings(State(engine): State<Arc<Engine>>, Json(body): Json<Value>) -> Response {
    let texts = texts(&body["input"]);
    let data = texts
        .iter()
        .enumerate()
        .map(|(index, text)| json!({"object": "embedding", "index": index, "embedding": vector(text)}));
    let tokens = words(&texts);
    let answer = json!({
        "object": "list",
        "model": body["model"],
        "data": data.collect::<Vec<_>>(),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    });
    document(engine, answer).await
}

pub(crate) async fn rerank(State(engine): State<Arc<Engine>>, Json(body): Json<Value>) -> Response {
    let (query, documents) = (body["query"].as_str().unwrap_or_default(), texts(&body["documents"]));
    let mut results: Vec<(usize, usize)> =
        documents.iter().map(|document| score(query, document)).enumerate().collect();
    // vLLM sorts them, llama.cpp has not always done so.
    if engine.kind == Kind::Vllm {
        results.sort_by_key(|(_, score)| std::cmp::Reverse(*score));
    }
    let results: Vec<Value> = results
        .into_iter()
        .map(|(index, score)| {
            let mut result = json!({"index": index, "relevance_score": score});
            if engine.kind == Kind::Vllm {
                result["document"] = json!({"text": documents[index]});
            }
            result
        })
        .collect();
    let answer =
        json!({"model": body["model"], "results": results, "usage": {"total_tokens": words(&documents)}});
    document(engine, answer).await
}

fn texts(list: &Value) -> Vec<String> {
    let listed = list.as_array().into_iter().flatten().chain(list.is_string().then_some(list));
    listed.filter_map(|text| text.as_str().map(str::to_owned)).collect()
}

fn words(texts: &[String]) -> usize {
    texts.iter().map(|text| text.split_whitespace().count()).sum()
}

fn vector(text: &str) -> [f64; 4] {
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    [f64::from(length), 0.5, -1.25, 0.0]
}

fn score(query: &str, document: &str) -> usize {
    let has = |word: &&str| document.split_whitespace().any(|other| other == *word);
    query.split_whitespace().filter(has).count()
}

/// Answers with the document, or with the fault that is set.
async fn document(engine: Arc<Engine>, answer: Value) -> Response {
    let fault = *engine.fault.lock();
    if let Some(refusal) = refusal(&engine, Dialect::Completion, fault) {
        return refusal;
    }
    let _slot = engine.slots.take().await;
    let pace = match fault {
        Fault::Slow { pace_ms } => Duration::from_millis(pace_ms),
        _ => engine.first_token,
    };
    tokio::time::sleep(pace).await;
    engine.thawed().await;
    let text = answer.to_string();
    let half = text.get(..text.len() / 2).unwrap_or_default().to_owned();
    let body = match fault {
        Fault::Hang { .. } => std::future::pending().await,
        Fault::Cut { .. } => {
            let cut = std::io::Error::other("cut on demand");
            Body::from_stream(stream::iter([Ok(Bytes::from(half)), Err(cut)]))
        }
        Fault::CleanClose { .. } => Body::from(half),
        _ => Body::from(text),
    };
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_with_more_of_the_query_scores_higher() {
        assert!(score("red fox", "the red fox") > score("red fox", "the red hen"));
        assert_eq!(vector("abc")[0], 3.0);
        assert_eq!(texts(&json!("one")), ["one"]);
    }
}
