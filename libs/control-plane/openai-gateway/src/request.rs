//! A client's body: what is read of it, and the one change that is made to it.
//!
//! A body goes on to the engine as it came, so what is read here has to be what the engine will read:
//! names are compared by what their escapes stand for, of a field that is given twice the last counts,
//! as engines have it, and a body that readers may take for different things is refused. A `null` is
//! a field that is absent. Not known here: what a conversation says, and whether the engine takes it.

mod constrained;
pub(crate) mod scan;

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use pool_registry_types::ErrorBody;
use pool_registry_types::constraints::ConstraintTooLarge;
use task_stream::OpenAiRoute;

pub use constrained::MAX_TOOLS_BYTES;
use constrained::{hold, hold_tools, is_empty, of_field};
pub use scan::BadJson;
use scan::{Scanner, text};

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// llama.cpp's word for a seed that it draws.
const DRAWN_SEED: i64 = 0xffff_ffff;

/// Why a body is refused. The message names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("the body is empty")]
    Empty,
    #[error("the body begins with a byte order mark, which JSON has not")]
    ByteOrderMark,
    #[error("the body is not UTF-8 at byte {at}")]
    NotUtf8 { at: usize },
    #[error("the body is no JSON object")]
    NotAnObject,
    #[error("the body has more than one JSON value, from byte {at} on")]
    Trailing { at: usize },
    #[error("the body {0}")]
    Json(#[from] BadJson),
    #[error("model: given twice")]
    TwoModels,
    #[error("{field}: must be {wanted}")]
    Type { field: &'static str, wanted: &'static str },
    #[error("{field}: {large}")]
    TooLarge { field: &'static str, large: ConstraintTooLarge },
    #[error("{field}: {bytes} bytes of tools together, at most {MAX_TOOLS_BYTES}")]
    Tools { field: &'static str, bytes: usize },
}

impl RequestError {
    /// The field at fault, OpenAI's `param`.
    pub const fn field(&self) -> Option<&'static str> {
        match self {
            Self::TwoModels => Some("model"),
            Self::Type { field, .. } | Self::TooLarge { field, .. } | Self::Tools { field, .. } => {
                Some(field)
            }
            Self::Empty
            | Self::ByteOrderMark
            | Self::NotUtf8 { .. }
            | Self::NotAnObject
            | Self::Trailing { .. }
            | Self::Json(_) => None,
        }
    }

    pub fn body(&self) -> ErrorBody {
        ErrorBody::invalid(self.to_string())
    }
}

/// What is known of a body. Fields have the names of the body's.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestFacts {
    pub model: Option<String>,
    /// Asked for, on a route that may stream.
    pub stream: bool,
    pub user: Option<String>,
    pub prompt_cache_key: Option<String>,
    pub previous_response_id: Option<String>,
    /// Tokens; a negative number, which means no bound to some engines, is absent.
    pub max_tokens: Option<u64>,
    pub max_completion_tokens: Option<u64>,
    pub max_output_tokens: Option<u64>,
    /// llama.cpp's name of the same.
    pub n_predict: Option<u64>,
    pub temperature: Option<f64>,
    pub seed: Option<i64>,
    pub n: Option<u64>,
    pub has_tools: bool,
    pub has_logprobs: bool,
    pub has_echo: bool,
    /// More than one answer by other words than `n`: several prompts, or a search.
    is_many: bool,
    /// The stream has more for each token than its text, or no text.
    is_more_than_text: bool,
    model_at: ModelAt,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum ModelAt {
    /// The bytes of the value.
    Value(Range<usize>),
    /// Behind the brace of an object that has no such field.
    Absent { at: usize, alone: bool },
}

impl RequestFacts {
    /// The most tokens that the answer may have, where the body bounds it.
    pub fn output_bound(&self) -> Option<u64> {
        let bounds = [self.max_tokens, self.max_completion_tokens, self.max_output_tokens, self.n_predict];
        bounds.into_iter().flatten().max()
    }

    /// Where the value of `model` stands in the body, quotes included; nothing where there is none.
    pub fn model_place(&self) -> Option<Range<usize>> {
        match &self.model_at {
            ModelAt::Value(range) if self.model.is_some() => Some(range.clone()),
            _ => None,
        }
    }

    /// Whether the same body makes the same text, by its own words.
    pub fn is_deterministic(&self) -> bool {
        let is_greedy = self.temperature == Some(0.0);
        is_greedy || self.seed.is_some_and(|seed| seed >= 0 && seed != DRAWN_SEED)
    }

    /// Why a stream of this body is not continued by a replay; none where it is. Source: .specs/01
    /// CLOUD-2806.
    pub fn not_replayed(&self, route: OpenAiRoute) -> Option<&'static str> {
        let is_chat_or_text = matches!(route, OpenAiRoute::ChatCompletions | OpenAiRoute::Completions);
        let reasons = [
            (!is_chat_or_text, "the route is neither chat nor text completions"),
            (!self.stream, "it is no stream"),
            (!self.is_deterministic(), "it has neither temperature 0 nor a seed"),
            (self.n.is_some_and(|n| n != 1) || self.is_many, "it has more than one choice"),
            (self.has_tools, "it has tools"),
            (self.has_logprobs, "it has logprobs"),
            (self.has_echo, "it has echo"),
            (self.is_more_than_text, "it asks for more than text"),
        ];
        reasons.into_iter().find_map(|(is, reason)| is.then_some(reason))
    }
}

/// Reads a body in one pass.
pub fn read(route: OpenAiRoute, body: &[u8]) -> Result<RequestFacts, RequestError> {
    if body.starts_with(BYTE_ORDER_MARK) {
        return Err(RequestError::ByteOrderMark);
    }
    let body =
        std::str::from_utf8(body).map_err(|error| RequestError::NotUtf8 { at: error.valid_up_to() })?;
    let mut scanner = Scanner::new(body);
    match scanner.peek() {
        Ok(b'{') => {}
        Ok(_) => return Err(RequestError::NotAnObject),
        Err(_) => return Err(RequestError::Empty),
    }
    let mut reading = Reading::new(route, scanner.at() + 1);
    scanner.object(|scanner, name| reading.member(&name.text()?, scanner))?;
    if scanner.peek().is_ok() {
        return Err(RequestError::Trailing { at: scanner.at() });
    }
    Ok(reading.facts)
}

/// The body with `name` as its model, and no other byte changed. `facts` were read of this body.
pub fn with_model(body: &[u8], facts: &RequestFacts, name: &str) -> Bytes {
    let name = serde_json::Value::from(name).to_string();
    let (replaced, before, after) = match &facts.model_at {
        ModelAt::Value(range) => (range.clone(), "", ""),
        ModelAt::Absent { at, alone } => (*at..*at, "\"model\":", if *alone { "" } else { "," }),
    };
    let pieces: [&[u8]; 5] = [
        &body[..replaced.start],
        before.as_bytes(),
        name.as_bytes(),
        after.as_bytes(),
        &body[replaced.end..],
    ];
    let mut changed = BytesMut::with_capacity(pieces.iter().map(|piece| piece.len()).sum());
    for piece in pieces {
        changed.extend_from_slice(piece);
    }
    changed.freeze()
}

struct Reading {
    route: OpenAiRoute,
    facts: RequestFacts,
    tools_bytes: usize,
}

impl Reading {
    /// `at` is behind the object's brace.
    fn new(route: OpenAiRoute, at: usize) -> Self {
        let facts = RequestFacts {
            model: None,
            stream: false,
            user: None,
            prompt_cache_key: None,
            previous_response_id: None,
            max_tokens: None,
            max_completion_tokens: None,
            max_output_tokens: None,
            n_predict: None,
            temperature: None,
            seed: None,
            n: None,
            has_tools: false,
            has_logprobs: false,
            has_echo: false,
            is_many: false,
            is_more_than_text: false,
            model_at: ModelAt::Absent { at, alone: true },
        };
        Self { route, facts, tools_bytes: 0 }
    }

    /// Takes the value of a top-level field.
    fn member(&mut self, name: &str, scanner: &mut Scanner<'_>) -> Result<(), RequestError> {
        let facts = &mut self.facts;
        if let ModelAt::Absent { alone, .. } = &mut facts.model_at {
            *alone = false;
        }
        match name {
            "model" => {
                if matches!(facts.model_at, ModelAt::Value(_)) {
                    return Err(RequestError::TwoModels);
                }
                let from = scanner.at();
                facts.model = optional_text("model", scanner.value()?)?;
                facts.model_at = ModelAt::Value(from..scanner.at());
            }
            "stream" => facts.stream = flag("stream", scanner.value()?)? && self.route.may_stream(),
            "user" => facts.user = optional_text("user", scanner.value()?)?,
            "prompt_cache_key" => {
                facts.prompt_cache_key = optional_text("prompt_cache_key", scanner.value()?)?;
            }
            "previous_response_id" => {
                facts.previous_response_id = optional_text("previous_response_id", scanner.value()?)?;
            }
            "max_tokens" => facts.max_tokens = bound("max_tokens", scanner.value()?)?,
            "max_completion_tokens" => {
                facts.max_completion_tokens = bound("max_completion_tokens", scanner.value()?)?;
            }
            "max_output_tokens" => facts.max_output_tokens = bound("max_output_tokens", scanner.value()?)?,
            "n_predict" => facts.n_predict = bound("n_predict", scanner.value()?)?,
            "temperature" => facts.temperature = number("temperature", scanner.value()?)?,
            "seed" => facts.seed = whole("seed", scanner.value()?)?.map(saturated),
            "n" => facts.n = bound("n", scanner.value()?)?,
            "echo" => facts.has_echo = flag("echo", scanner.value()?)?,
            "tools" => self.tools("tools", scanner)?,
            "functions" => self.tools("functions", scanner)?,
            "prompt" => self.prompt(scanner)?,
            "logprobs" | "prompt_logprobs" | "n_probs" => {
                let is_asked = !matches!(scanner.value()?, "null" | "false");
                facts.has_logprobs |= is_asked;
            }
            "best_of" | "n_cmpl" | "use_beam_search" => {
                let is_asked = !matches!(scanner.value()?, "null" | "false" | "1");
                facts.is_many |= is_asked;
            }
            "return_token_ids" | "return_tokens" | "return_tokens_as_token_ids" | "audio" | "modalities" => {
                let is_asked = !matches!(scanner.value()?, "null" | "false");
                facts.is_more_than_text |= is_asked;
            }
            _ => {
                let raw = scanner.value()?;
                if let Some((field, kind)) = of_field(self.route, name) {
                    hold(field, kind, raw)?;
                }
            }
        }
        Ok(())
    }

    fn tools(&mut self, field: &'static str, scanner: &mut Scanner<'_>) -> Result<(), RequestError> {
        let raw = scanner.value()?;
        if raw == "null" {
            return Ok(());
        }
        if !raw.starts_with('[') {
            return Err(RequestError::Type { field, wanted: "a list" });
        }
        self.tools_bytes += raw.len();
        if self.tools_bytes > MAX_TOOLS_BYTES {
            return Err(RequestError::Tools { field, bytes: self.tools_bytes });
        }
        self.facts.has_tools |= !is_empty(raw)?;
        hold_tools(field, &mut Scanner::new(raw))
    }

    /// A list of texts, or of lists of tokens, is a prompt each.
    fn prompt(&mut self, scanner: &mut Scanner<'_>) -> Result<(), RequestError> {
        if scanner.peek()? != b'[' {
            return Ok(scanner.value().map(drop)?);
        }
        let mut prompts = 0_usize;
        scanner.array::<RequestError>(|scanner| {
            prompts += usize::from(matches!(scanner.peek()?, b'"' | b'[' | b'{'));
            Ok(scanner.value().map(drop)?)
        })?;
        self.facts.is_many |= prompts > 1;
        Ok(())
    }
}

fn optional_text(field: &'static str, raw: &str) -> Result<Option<String>, RequestError> {
    if raw == "null" {
        return Ok(None);
    }
    let read = if raw.starts_with('"') { text(raw) } else { None };
    read.map(|read| Some(read.into_owned())).ok_or(RequestError::Type { field, wanted: "text" })
}

fn flag(field: &'static str, raw: &str) -> Result<bool, RequestError> {
    match raw {
        "true" => Ok(true),
        "false" | "null" => Ok(false),
        _ => Err(RequestError::Type { field, wanted: "true or false" }),
    }
}

fn number(field: &'static str, raw: &str) -> Result<Option<f64>, RequestError> {
    if raw == "null" {
        return Ok(None);
    }
    // A word or a text is none, and neither is a number beyond all bounds.
    let read =
        raw.parse().ok().filter(|number: &f64| number.is_finite() && !raw.starts_with(['n', 'i', 'N', 'I']));
    read.map(Some).ok_or(RequestError::Type { field, wanted: "a number" })
}

/// A whole number, also one that is written as `1e3` or `3.0`; what is beyond its type is its bound.
fn whole(field: &'static str, raw: &str) -> Result<Option<i128>, RequestError> {
    if let Ok(read) = raw.parse() {
        return Ok(Some(read));
    }
    let wrong = RequestError::Type { field, wanted: "a whole number" };
    match number(field, raw) {
        Ok(None) => Ok(None),
        Ok(Some(read)) if read.fract() == 0.0 => {
            let beyond = if read < 0.0 { i128::MIN } else { i128::MAX };
            Ok(Some(format!("{read:.0}").parse().unwrap_or(beyond)))
        }
        _ => Err(wrong),
    }
}

fn bound(field: &'static str, raw: &str) -> Result<Option<u64>, RequestError> {
    let read = whole(field, raw)?.filter(|read| *read >= 0);
    Ok(read.map(|read| u64::try_from(read).unwrap_or(u64::MAX)))
}

fn saturated(number: i128) -> i64 {
    i64::try_from(number).unwrap_or(if number < 0 { i64::MIN } else { i64::MAX })
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
