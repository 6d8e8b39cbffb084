//! What engines compile: any bytes are measured without memory of their own, but for a table of a
//! grammar's rules, and what is accepted is as small as a slower look at it says.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pool_registry_types::constraints::{
    DecodingConstraint, ConstraintTooLarge, MAX_BYTES, MAX_NESTING, check, check_json,
};
use serde_json::Value;

const ALL: [DecodingConstraint; 4] =
    [DecodingConstraint::Grammar, DecodingConstraint::JsonSchema, DecodingConstraint::Regex, DecodingConstraint::StopList];

/// What a table of rules takes at least, bytes.
const TABLE: usize = 4096;

/// The deepest nesting of these brackets, wherever they stand.
fn deepest(text: &[u8], open: &[u8], close: &[u8]) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    for byte in text {
        if open.contains(byte) {
            depth += 1;
        } else if close.contains(byte) {
            depth = depth.saturating_sub(1);
        }
        deepest = depth.max(deepest);
    }
    deepest
}

fn height(value: &Value) -> usize {
    match value {
        Value::Array(values) => 1 + values.iter().map(height).max().unwrap_or(0),
        Value::Object(members) => 1 + members.values().map(height).max().unwrap_or(0),
        _ => 0,
    }
}

fn nested(levels: usize) -> Result<(), ConstraintTooLarge> {
    if levels > MAX_NESTING { Err(ConstraintTooLarge::Nested { levels }) } else { Ok(()) }
}

fuzz_target!(|text: &[u8]| {
    for kind in ALL {
        let (verdicts, spent) = fuzz::measure(|| (check(kind, text), check_json(kind, text)));
        let most = if kind == DecodingConstraint::Grammar { TABLE + 128 * text.len() } else { 0 };
        assert!(spent.highest <= most, "{kind:?} takes {} bytes for {}", spent.highest, text.len());
        if text.len() > MAX_BYTES {
            assert!(verdicts.0.is_err(), "{kind:?}");
        }
    }
    if text.len() > MAX_BYTES {
        return;
    }
    assert_eq!(check(DecodingConstraint::StopList, text), Ok(()));
    // Where nothing can hide a bracket and nothing repeats, the brackets are all there is.
    if !text.iter().any(|byte| b"\"[]#</{*+?=".contains(byte)) {
        assert_eq!(check(DecodingConstraint::Grammar, text), nested(deepest(text, b"(", b")")));
    }
    if !text.iter().any(|byte| b"\\[]{*+?".contains(byte)) {
        assert_eq!(check(DecodingConstraint::Regex, text), nested(deepest(text, b"(", b")")));
    }
    if !text.contains(&b'"') {
        assert_eq!(check(DecodingConstraint::JsonSchema, text), nested(deepest(text, b"{[", b"}]")));
    }
    // A text in a body is the same text.
    if let Ok(plain) = std::str::from_utf8(text) {
        let raw = serde_json::to_vec(plain).expect("a string can be written");
        for kind in [DecodingConstraint::Grammar, DecodingConstraint::Regex] {
            assert_eq!(check_json(kind, &raw), check(kind, text), "{kind:?}");
        }
    }
    if let Ok(value) = serde_json::from_slice::<Value>(text)
        && height(&value) > MAX_NESTING
    {
        assert!(check(DecodingConstraint::JsonSchema, text).is_err(), "JSON deeper than it was measured");
    }
});
