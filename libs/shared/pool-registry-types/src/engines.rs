//! What each kind of engine can do: one table, read by whoever admits, places or runs a task.
//!
//! The table speaks of kinds, not of engines that run: an engine of a kind that embeds may serve
//! a model that does not, and says so itself. What is not proven is not claimed.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

use crate::newer;

/// The engines whose dialects the nodes speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    LlamaCpp,
    Vllm,
    /// Hugging Face's text-generation-inference.
    Tgi,
    /// Triton's generate extension.
    Triton,
    /// Any server with OpenAI's API.
    OpenAi,
}

impl EngineKind {
    pub const ALL: [Self; 5] = [Self::LlamaCpp, Self::Vllm, Self::Tgi, Self::Triton, Self::OpenAi];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::LlamaCpp => "llamacpp",
            Self::Vllm => "vllm",
            Self::Tgi => "tgi",
            Self::Triton => "triton",
            Self::OpenAi => "openai",
        }
    }
}

impl std::fmt::Display for EngineKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The language of grammars that an engine takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum GrammarForm {
    None,
    /// llama.cpp's.
    Gbnf,
    /// What the engine's own guide makes of it: close to GBNF, but not the same. Taken only by
    /// tasks that name the engine.
    Ebnf,
}

/// What engines of one kind can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EngineCapabilities {
    pub engine: EngineKind,
    /// Goes on from a prompt.
    pub completion: bool,
    /// Takes messages.
    pub chat: bool,
    pub embedding: bool,
    pub rerank: bool,
    pub grammar: GrammarForm,
    pub seed: bool,
    pub top_k: bool,
    pub min_p: bool,
    /// Stops computing when its stream is dropped.
    pub cancel: bool,
    /// A lost stream of a prompt goes on from what had been sent.
    pub continues_prompt: bool,
    /// A lost stream of messages does.
    pub continues_messages: bool,
    /// Gives the ids of its tokens, and goes on from them.
    pub token_ids: bool,
    /// Says how many tokens it made; else the node counts the pieces.
    pub counts_tokens: bool,
    /// Says how many requests it works on.
    pub tells_busy: bool,
    /// Needs a bound on the tokens: the task's, or the context that its handoff names.
    pub needs_bound: bool,
}

/// What engines of the kind can do.
pub const fn capabilities(engine: EngineKind) -> EngineCapabilities {
    /// A server with OpenAI's API and nothing beside it.
    const PLAIN: EngineCapabilities = EngineCapabilities {
        engine: EngineKind::OpenAi,
        completion: true,
        chat: true,
        embedding: true,
        rerank: true,
        grammar: GrammarForm::None,
        seed: true,
        top_k: false,
        min_p: false,
        cancel: true,
        continues_prompt: true,
        continues_messages: false,
        token_ids: false,
        counts_tokens: false,
        tells_busy: false,
        needs_bound: false,
    };
    match engine {
        EngineKind::OpenAi => PLAIN,
        EngineKind::LlamaCpp => EngineCapabilities {
            engine,
            grammar: GrammarForm::Gbnf,
            top_k: true,
            min_p: true,
            continues_messages: true,
            token_ids: true,
            counts_tokens: true,
            tells_busy: true,
            ..PLAIN
        },
        EngineKind::Vllm => EngineCapabilities {
            engine,
            grammar: GrammarForm::Ebnf,
            top_k: true,
            min_p: true,
            counts_tokens: true,
            tells_busy: true,
            ..PLAIN
        },
        EngineKind::Tgi => EngineCapabilities {
            engine,
            embedding: false,
            rerank: false,
            // With a prompt; its chat has no such option.
            top_k: true,
            counts_tokens: true,
            tells_busy: true,
            ..PLAIN
        },
        EngineKind::Triton => EngineCapabilities {
            engine,
            chat: false,
            embedding: false,
            rerank: false,
            top_k: true,
            cancel: false,
            needs_bound: true,
            ..PLAIN
        },
    }
}

/// Some of the kinds of engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EngineSet(u8);

impl EngineSet {
    /// Every kind, also those that come later.
    pub const ALL: Self = Self(u8::MAX);

    const fn bit(engine: EngineKind) -> u8 {
        match engine {
            EngineKind::LlamaCpp => 1,
            EngineKind::Vllm => 1 << 1,
            EngineKind::Tgi => 1 << 2,
            EngineKind::Triton => 1 << 3,
            EngineKind::OpenAi => 1 << 4,
        }
    }

    pub const fn contains(self, engine: EngineKind) -> bool {
        self.0 & Self::bit(engine) != 0
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl FromIterator<EngineKind> for EngineSet {
    fn from_iter<I: IntoIterator<Item = EngineKind>>(engines: I) -> Self {
        Self(engines.into_iter().fold(0, |bits, engine| bits | Self::bit(engine)))
    }
}

/// As a list of names.
impl Serialize for EngineSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(EngineKind::ALL.into_iter().filter(|engine| self.contains(*engine)))
    }
}

/// Kinds that this reader does not know are left out.
impl<'de> Deserialize<'de> for EngineSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        newer::entries::<D, EngineKind>(deserializer).map(Self::from_iter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_of_the_table_is_of_its_engine() {
        for engine in EngineKind::ALL {
            assert_eq!(capabilities(engine).engine, engine);
        }
    }

    #[test]
    fn each_kind_has_its_own_place_in_a_set() {
        for engine in EngineKind::ALL {
            let set: EngineSet = [engine].into_iter().collect();
            let held: Vec<EngineKind> = EngineKind::ALL.into_iter().filter(|e| set.contains(*e)).collect();
            assert_eq!(held, [engine]);
            assert!(EngineSet::ALL.contains(engine) && !EngineSet::from_iter([]).contains(engine));
        }
    }
}
