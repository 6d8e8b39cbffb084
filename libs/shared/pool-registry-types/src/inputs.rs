//! What kind of work a task is; what is embedded or ranked, and what comes of it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::ErrorBody;

/// Most texts that one task embeds, and most documents that it ranks.
pub const MAX_INPUTS: usize = 2048;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    /// Of a prompt or of messages: a stream of tokens.
    #[default]
    Completion,
    /// One vector for each text.
    Embedding,
    /// Documents in the order in which they answer a query.
    Rerank,
}

impl Workload {
    pub const ALL: [Self; 3] = [Self::Completion, Self::Embedding, Self::Rerank];
}

/// For the documents only: their way of saying that a text is not empty.
#[derive(Debug, ToSchema)]
#[schema(value_type = String, min_length = 1)]
pub struct NonEmptyText(#[expect(dead_code, reason = "it is never made")] String);

/// What is embedded or ranked. Each form belongs to the workload of its name:
/// `{"embedding": ["…", "…"]}` or `{"rerank": {"query": "…", "documents": ["…"]}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Inputs {
    /// 1 to [`MAX_INPUTS`] texts.
    Embedding(Vec<String>),
    Rerank(RerankInputs),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RerankInputs {
    #[schema(min_length = 1)]
    pub query: String,
    /// 1 to [`MAX_INPUTS`] texts.
    #[schema(value_type = Vec<NonEmptyText>, min_items = 1, max_items = 2048)]
    pub documents: Vec<String>,
}

impl Inputs {
    /// The texts that are embedded or ranked: there is one result for each.
    pub fn texts(&self) -> &[String] {
        match self {
            Self::Embedding(texts) => texts,
            Self::Rerank(rerank) => &rerank.documents,
        }
    }

    /// Errors: `INVALID_PARAMS`, naming the field.
    pub(crate) fn check(&self, workload: Workload) -> Result<(), ErrorBody> {
        let name = match (self, workload) {
            (Self::Embedding(_), Workload::Embedding) => "inputs.embedding",
            (Self::Rerank(rerank), Workload::Rerank) => {
                if rerank.query.is_empty() {
                    return Err(ErrorBody::invalid("inputs.rerank.query: an empty text ranks nothing"));
                }
                "inputs.rerank.documents"
            }
            _ => return Err(ErrorBody::invalid("inputs: must be those of the workload")),
        };
        let texts = self.texts();
        if !(1..=MAX_INPUTS).contains(&texts.len()) {
            return Err(ErrorBody::invalid(format!("{name}: must be 1 to {MAX_INPUTS} texts")));
        }
        match texts.iter().position(String::is_empty) {
            Some(n) => Err(ErrorBody::invalid(format!("{name}[{n}]: must not be empty"))),
            None => Ok(()),
        }
    }
}

/// Event `result` of an embedding: one for each text, in their order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EmbeddingResult {
    /// The number of the text in `inputs`.
    pub i: u64,
    pub embedding: Vec<f32>,
}

/// Event `result` of a rerank: one for each document, the best first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RerankResult {
    /// 0 for the best.
    pub i: u64,
    /// The number of the document in `inputs`.
    pub document: u64,
    /// The engine's own; comparable within one answer only.
    pub score: f64,
}
