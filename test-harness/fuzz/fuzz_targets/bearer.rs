//! Bearer tokens: every configured one is accepted, and nothing else ever is.
//!
//! An input is text in lines: the first is `LLORCH_API_TOKEN`, each other one an `Authorization`
//! header of one request.

#![no_main]

use axum::http::{HeaderMap, HeaderValue, header};
use daemon_kit::Tokens;
use daemon_kit::tokens::MIN_TOKEN_BYTES;
use jiff::Timestamp;
use libfuzzer_sys::fuzz_target;

fn load(list: &str) -> Option<Tokens> {
    Tokens::load(Some(list.into()), None).ok()
}

fn is_accepted(tokens: &Tokens, headers: &HeaderMap) -> bool {
    tokens.authenticate(headers, Timestamp::now()).is_ok()
}

fn shows(tokens: &Tokens, value: &str) -> bool {
    let Ok(value) = HeaderValue::from_str(value) else { return false };
    is_accepted(tokens, &HeaderMap::from_iter([(header::AUTHORIZATION, value)]))
}

/// Whether the header's bytes are `bearer`, white space, and one of the tokens.
fn names_one(value: &[u8], known: &[&str]) -> bool {
    known.iter().any(|token| {
        let trimmed = value.trim_ascii_end();
        trimmed.strip_suffix(token.as_bytes()).is_some_and(|scheme| {
            let word = scheme.trim_ascii_end();
            word.len() < scheme.len() && word.eq_ignore_ascii_case(b"bearer")
        })
    })
}

fuzz_target!(|input: &[u8]| {
    let mut lines = input.split(|byte| *byte == b'\n');
    let Some(Ok(list)) = lines.next().map(std::str::from_utf8) else { return };
    let Some(tokens) = load(list) else { return };
    let known: Vec<&str> = list.split(',').map(str::trim).filter(|token| !token.is_empty()).collect();
    assert!(!known.is_empty() && !tokens.is_empty(), "a list without a token was taken");
    assert!(!is_accepted(&tokens, &HeaderMap::new()), "nothing was shown and accepted");

    for token in &known {
        assert!(
            token.len() >= MIN_TOKEN_BYTES && token.bytes().all(|byte| byte.is_ascii_graphic()),
            "{token:?}"
        );
        assert!(shows(&tokens, &format!("Bearer {token}")), "{token:?} is configured and refused");
        // Of its neighbours only those that are tokens themselves.
        let (shorter, longer) = (&token[..token.len() - 1], format!("{token}x"));
        let (lower, upper) = (token.to_ascii_lowercase(), token.to_ascii_uppercase());
        let twice = format!("{token} {token}");
        for near in [shorter, &longer, &lower, &upper, &twice, ""] {
            let accepted = shows(&tokens, &format!("Bearer {near}"));
            assert_eq!(accepted, known.contains(&near), "{near:?}");
        }
        assert!(!shows(&tokens, token) && !shows(&tokens, &format!("Basic {token}")), "without its scheme");
    }

    let mut headers = HeaderMap::new();
    for value in lines.take(8).filter_map(|line| HeaderValue::from_bytes(line).ok()) {
        headers.append(header::AUTHORIZATION, value);
    }
    let values: Vec<&HeaderValue> = headers.get_all(header::AUTHORIZATION).iter().collect();
    let may = matches!(values.as_slice(), [value] if names_one(value.as_bytes(), &known));
    assert!(may || !is_accepted(&tokens, &headers), "{values:?} is accepted");
});
