//! What an event, or a whole answer, has of text, of an end and of usage.
//!
//! One reading serves all dialects, since their names do not collide: OpenAI's `choices`, Anthropic's
//! `delta` and `message`, the `response` and `delta` of `/v1/responses`. Places are kept and not texts,
//! so that most events are read without an allocation.

use std::ops::Range;

use crate::request::BadJson;
use crate::request::scan::{Scanner, text};

/// The fields whose texts are one after another the answer. Source: .specs/01 CLOUD-2815.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextField {
    Content,
    ReasoningContent,
    /// What newer versions of vLLM call the same.
    Reasoning,
    /// Of text completions.
    Text,
}

impl TextField {
    pub(crate) const ALL: [Self; 4] = [Self::Content, Self::ReasoningContent, Self::Reasoning, Self::Text];

    fn of_delta(name: &str) -> Option<Self> {
        match name {
            "content" => Some(Self::Content),
            "reasoning_content" => Some(Self::ReasoningContent),
            "reasoning" => Some(Self::Reasoning),
            _ => None,
        }
    }

    pub(crate) const fn place(self) -> usize {
        match self {
            Self::Content => 0,
            Self::ReasoningContent => 1,
            Self::Reasoning => 2,
            Self::Text => 3,
        }
    }
}

/// The fields that name an answer, and stand in each of its events.
pub(crate) const IDENTITY: [&str; 4] = ["id", "created", "model", "system_fingerprint"];

/// Tokens, as an engine counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    pub tokens_in: Option<u64>,
    pub tokens_out: Option<u64>,
}

impl Usage {
    /// What a later event says counts; a dialect says one half early and the other late.
    pub fn update(&mut self, later: Self) {
        self.tokens_in = later.tokens_in.or(self.tokens_in);
        self.tokens_out = later.tokens_out.or(self.tokens_out);
    }
}

/// Places are those of JSON values, strings with their quotes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Chunk {
    /// It is a JSON object.
    pub(crate) is_read: bool,
    /// By what it says of itself.
    pub(crate) is_error: bool,
    pub(crate) is_message_stop: bool,
    pub(crate) is_response_end: bool,
    has_choices: bool,
    choices: usize,
    pub(crate) texts: [Option<Range<usize>>; 4],
    pub(crate) identity: [Option<Range<usize>>; 4],
    pub(crate) role: Option<Range<usize>>,
    pub(crate) finish: Option<Range<usize>>,
    pub(crate) finish_reason: Option<String>,
    pub(crate) usage: Option<Usage>,
    /// Something is made that is no text of a [`TextField`]: a call of a tool, what is thought or said
    /// in another dialect.
    pub(crate) has_other: bool,
    /// It has more than the one choice's texts: logprobs, ids of tokens, a call, another choice.
    pub(crate) is_more_than_text: bool,
}

impl Chunk {
    /// Reads the data of an event, or a whole answer.
    pub(crate) fn read(data: &str) -> Self {
        let mut chunk = Self::default();
        let mut scanner = Scanner::new(data);
        let read = scanner.object(|scanner, name| chunk.member(&name.text()?, scanner));
        match read {
            Ok(()) if scanner.peek().is_err() => Self { is_read: true, ..chunk },
            Ok(()) | Err(_) => Self::default(),
        }
    }

    /// Takes the value of a top-level field.
    fn member(&mut self, name: &str, scanner: &mut Scanner<'_>) -> Result<(), BadJson> {
        if let Some(place) = IDENTITY.iter().position(|known| *known == name) {
            self.identity[place] = scalar(scanner)?;
            return Ok(());
        }
        match name {
            "type" => {
                let kind = scanner.value()?;
                self.is_error |= kind == "\"error\"";
                self.is_message_stop = kind == "\"message_stop\"";
                self.is_response_end = matches!(
                    kind,
                    "\"response.completed\"" | "\"response.failed\"" | "\"response.incomplete\""
                );
            }
            "object" => self.is_error |= scanner.value()? == "\"error\"",
            "error" => self.is_error |= scanner.value()? != "null",
            "choices" => {
                self.is_more_than_text |= std::mem::replace(&mut self.has_choices, true);
                if scanner.peek()? == b'[' {
                    scanner.array(|scanner| self.choice(scanner))?;
                } else {
                    scanner.value()?;
                }
            }
            "usage" => self.usage(scanner)?,
            // Of a message that begins, and of a response that ends.
            "message" | "response" if scanner.peek()? == b'{' => {
                scanner.object(|scanner, name| match &*name.text()? {
                    "usage" => self.usage(scanner),
                    _ => scanner.value().map(drop),
                })?;
            }
            "delta" => self.delta(scanner)?,
            "stop_reason" => self.finish(scanner)?,
            _ => drop(scanner.value()?),
        }
        Ok(())
    }

    fn choice(&mut self, scanner: &mut Scanner<'_>) -> Result<(), BadJson> {
        self.choices += 1;
        self.is_more_than_text |= self.choices > 1;
        if scanner.peek()? != b'{' {
            return scanner.value().map(drop);
        }
        let (mut has_message, mut has_text) = (false, false);
        scanner.object(|scanner, name| {
            match &*name.text()? {
                "index" => self.is_more_than_text |= scanner.value()? != "0",
                "delta" | "message" => {
                    // Of a field that is given twice readers may take either.
                    self.is_more_than_text |= std::mem::replace(&mut has_message, true);
                    self.message(scanner)?;
                }
                "text" => {
                    self.is_more_than_text |= std::mem::replace(&mut has_text, true);
                    self.text(TextField::Text, scanner)?;
                }
                "finish_reason" => self.finish(scanner)?,
                "logprobs" | "token_ids" => self.is_more_than_text |= scanner.value()? != "null",
                _ => drop(scanner.value()?),
            }
            Ok(())
        })
    }

    fn message(&mut self, scanner: &mut Scanner<'_>) -> Result<(), BadJson> {
        if scanner.peek()? != b'{' {
            return scanner.value().map(drop);
        }
        let mut fields = [false; 4];
        scanner.object(|scanner, name| {
            let name = name.text()?;
            match (TextField::of_delta(&name), &*name) {
                (Some(field), _) => {
                    self.is_more_than_text |= std::mem::replace(&mut fields[field.place()], true);
                    self.text(field, scanner)?;
                }
                (None, "role") => self.role = scalar(scanner)?,
                (None, _) => {
                    let raw = scanner.value()?;
                    if !matches!(raw, "null" | "[]" | "{}" | "\"\"") {
                        self.has_other = true;
                        self.is_more_than_text = true;
                    }
                }
            }
            Ok(())
        })
    }

    fn text(&mut self, field: TextField, scanner: &mut Scanner<'_>) -> Result<(), BadJson> {
        let from = scanner.at();
        match scanner.value()? {
            "null" => {}
            raw if raw.starts_with('"') => {
                self.texts[field.place()] = Some(from..scanner.at());
            }
            _ => self.is_more_than_text = true,
        }
        Ok(())
    }

    fn finish(&mut self, scanner: &mut Scanner<'_>) -> Result<(), BadJson> {
        let from = scanner.at();
        let raw = scanner.value()?;
        if raw.starts_with('"') {
            self.finish_reason = text(raw).map(std::borrow::Cow::into_owned);
            self.finish = Some(from..scanner.at());
        }
        Ok(())
    }

    /// Anthropic's, or the text itself of `/v1/responses`.
    fn delta(&mut self, scanner: &mut Scanner<'_>) -> Result<(), BadJson> {
        if scanner.peek()? != b'{' {
            let raw = scanner.value()?;
            self.has_other |= raw.starts_with('"') && raw != "\"\"";
            return Ok(());
        }
        scanner.object(|scanner, name| {
            match &*name.text()? {
                "text" | "thinking" | "partial_json" => {
                    let raw = scanner.value()?;
                    self.has_other |= raw.starts_with('"') && raw != "\"\"";
                }
                "stop_reason" => self.finish(scanner)?,
                _ => drop(scanner.value()?),
            }
            Ok(())
        })
    }

    fn usage(&mut self, scanner: &mut Scanner<'_>) -> Result<(), BadJson> {
        if scanner.peek()? != b'{' {
            return scanner.value().map(drop);
        }
        let mut usage = Usage::default();
        scanner.object::<BadJson>(|scanner, name| {
            let name = name.text()?;
            let tokens = scanner.value()?.parse().ok();
            match &*name {
                "prompt_tokens" | "input_tokens" => usage.tokens_in = tokens,
                "completion_tokens" | "output_tokens" => usage.tokens_out = tokens,
                _ => {}
            }
            Ok(())
        })?;
        self.usage.get_or_insert_default().update(usage);
        Ok(())
    }

    /// Moves each place by what `to` says of its start.
    pub(crate) fn moved(mut self, to: impl Fn(usize) -> usize) -> Self {
        let places =
            self.texts.iter_mut().chain(&mut self.identity).chain([&mut self.role, &mut self.finish]);
        for place in places.flatten() {
            let length = place.len();
            place.start = to(place.start);
            place.end = place.start + length;
        }
        self
    }
}

/// Takes a value. Returns its place, where it is a text, a number or a flag: those lie in one line.
fn scalar(scanner: &mut Scanner<'_>) -> Result<Option<Range<usize>>, BadJson> {
    let from = scanner.at();
    let raw = scanner.value()?;
    let is_scalar = raw != "null" && !raw.starts_with(['{', '[']);
    Ok(is_scalar.then(|| from..scanner.at()))
}
