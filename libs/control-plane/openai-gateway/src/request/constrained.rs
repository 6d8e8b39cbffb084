//! What engines compile, in a body of any dialect.
//!
//! Engines give these texts many names, and read them at several depths. The one idea needed to read
//! this: a field that is constrained at all is measured whole as JSON, and then every string in it
//! that is no part of a schema by what its name says it is, by the same functions as on `/v2`. What
//! the conversation has is not looked at: nobody compiles it.

use pool_registry_types::constraints::{DecodingConstraint, check, check_json};
use task_stream::OpenAiRoute;

use super::RequestError;
use super::scan::{BadJson, Scanner, text};

/// All tools of a request, bytes. Source: .specs/01 CLOUD-2804.
pub const MAX_TOOLS_BYTES: usize = 1024 * 1024;

/// How a value is held against the bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Constrained {
    Grammar,
    Regex,
    /// A schema, or a text that is one.
    Schema,
    /// Texts that are compared, which have a length only.
    Literal,
    /// What says how an answer is to look: its members say what they are.
    Format,
    /// A member that is a grammar, a regular expression or a schema, as another one says.
    Definition,
}

const FIELDS: [(&str, Constrained); 19] = [
    ("grammar", Constrained::Grammar),
    ("ebnf", Constrained::Grammar),
    ("regex", Constrained::Regex),
    ("grammar_triggers", Constrained::Regex),
    ("json_schema", Constrained::Schema),
    ("input_schema", Constrained::Schema),
    ("stop", Constrained::Literal),
    ("stop_sequences", Constrained::Literal),
    ("response_format", Constrained::Format),
    ("structured_outputs", Constrained::Format),
    ("structural_tag", Constrained::Format),
    ("output_format", Constrained::Format),
    ("output_config", Constrained::Format),
    ("guided_grammar", Constrained::Grammar),
    ("guided_regex", Constrained::Regex),
    ("guided_whitespace_pattern", Constrained::Regex),
    ("guided_json", Constrained::Schema),
    ("guided_choice", Constrained::Literal),
    ("guided_structural_tag", Constrained::Format),
];

/// How a field of a body is constrained, by its name, which is returned too.
pub(crate) fn of_field(route: OpenAiRoute, name: &str) -> Option<(&'static str, Constrained)> {
    match FIELDS.into_iter().find(|(field, _)| *field == name) {
        Some(known) => Some(known),
        None if name.starts_with("guided_") => Some(("guided_*", Constrained::Format)),
        // Of the other routes it is what is read, or made.
        None if name == "text" && route == OpenAiRoute::Responses => Some(("text", Constrained::Format)),
        None => None,
    }
}

/// How a member of a [`Constrained::Format`] is, by its name.
fn member(name: &str) -> Constrained {
    match name {
        "grammar" | "ebnf" => Constrained::Grammar,
        "regex" | "pattern" | "whitespace_pattern" => Constrained::Regex,
        "json" | "schema" | "json_schema" | "parameters" | "input_schema" => Constrained::Schema,
        "choice" => Constrained::Literal,
        "value" | "definition" | "content" => Constrained::Definition,
        _ => Constrained::Format,
    }
}

/// Holds the value of `field` against the bounds. It is JSON, without blanks around it.
pub(crate) fn hold(field: &'static str, kind: Constrained, raw: &str) -> Result<(), RequestError> {
    let measured = match kind {
        Constrained::Literal => check(DecodingConstraint::StopList, raw.as_bytes()),
        _ if raw.starts_with('"') => return hold_text(field, kind, raw),
        _ => check(DecodingConstraint::JsonSchema, raw.as_bytes()),
    };
    measured.map_err(|large| RequestError::TooLarge { field, large })?;
    if matches!(kind, Constrained::Literal | Constrained::Schema) {
        return Ok(());
    }
    hold_inside(field, kind, &mut Scanner::new(raw))
}

/// Holds the strings of a value that was measured as JSON.
fn hold_inside(
    field: &'static str,
    kind: Constrained,
    scanner: &mut Scanner<'_>,
) -> Result<(), RequestError> {
    match scanner.peek()? {
        b'{' => scanner.object(|scanner, name| match member(&name.text()?) {
            kind @ (Constrained::Schema | Constrained::Literal) => hold(field, kind, scanner.value()?),
            kind => hold_inside(field, kind, scanner),
        }),
        b'[' => scanner.array(|scanner| hold_inside(field, kind, scanner)),
        b'"' => hold_text(field, kind, scanner.value()?),
        _ => Ok(scanner.value().map(drop)?),
    }
}

fn hold_text(field: &'static str, kind: Constrained, raw: &str) -> Result<(), RequestError> {
    let too_large = |large| RequestError::TooLarge { field, large };
    let as_json = || {
        let stands_for = text(raw).ok_or(RequestError::Type { field, wanted: "text" })?;
        check(DecodingConstraint::JsonSchema, stands_for.as_bytes()).map_err(too_large)
    };
    let as_kind = |kind| check_json(kind, raw.as_bytes()).map_err(too_large);
    match kind {
        Constrained::Grammar => as_kind(DecodingConstraint::Grammar),
        Constrained::Regex => as_kind(DecodingConstraint::Regex),
        Constrained::Schema => as_json(),
        Constrained::Literal => Ok(()),
        Constrained::Format => as_kind(DecodingConstraint::Regex).and_then(|()| as_json()),
        Constrained::Definition => as_kind(DecodingConstraint::Grammar)
            .and_then(|()| as_kind(DecodingConstraint::Regex))
            .and_then(|()| as_json()),
    }
}

/// Holds every schema and format in a list of tools, however deep it lies.
pub(crate) fn hold_tools(field: &'static str, scanner: &mut Scanner<'_>) -> Result<(), RequestError> {
    match scanner.peek()? {
        b'{' => scanner.object(|scanner, name| match &*name.text()? {
            "parameters" | "input_schema" | "schema" | "json_schema" => {
                hold(field, Constrained::Schema, scanner.value()?)
            }
            "format" | "grammar" => hold(field, Constrained::Format, scanner.value()?),
            _ => hold_tools(field, scanner),
        }),
        b'[' => scanner.array(|scanner| hold_tools(field, scanner)),
        _ => Ok(scanner.value().map(drop)?),
    }
}

/// Whether a list or an object has nothing in it.
pub(crate) fn is_empty(raw: &str) -> Result<bool, BadJson> {
    let mut scanner = Scanner::new(raw);
    let mut members = 0_usize;
    match scanner.peek()? {
        b'[' => scanner.array(|scanner| {
            members += 1;
            scanner.value().map(drop)
        })?,
        b'{' => scanner.object(|scanner, _| {
            members += 1;
            scanner.value().map(drop)
        })?,
        _ => members = 1,
    }
    Ok(members == 0)
}
