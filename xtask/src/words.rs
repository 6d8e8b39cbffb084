//! The words that are not used any more, and what is said instead: `.docs/GLOSSARY.md` as a check.
//!
//! Identifiers are looked at in code, not in comments and texts, where most of these words have an
//! ordinary sense of their own; phrases that have none are looked for everywhere. Names of test
//! functions are sentences and may use any word.

use std::path::Path;

use crate::steps::{Failed, read, root};

/// Parts of identifiers (`told_at` and `ToldAt` have `told`), and the word that stands for each.
const RETIRED: &[(&str, &str)] = &[
    ("wish", "constraint or preference"),
    ("wishes", "constraints or preferences"),
    ("mail", "message"),
    ("said", "reported"),
    ("unsaid", "suppressed"),
    ("told", "reported"),
    ("untold", "unreported"),
    ("farewell", "deregistration"),
    ("charge", "guard_spec"),
    ("seat", "replica_key"),
    ("stirred", "dirty"),
    ("doubted", "suspect for nodes, interrupted for links"),
    ("doubtful", "suspect, or temporarily unavailable"),
    ("judge", "classify"),
    ("judged", "classified"),
    ("witness", "oracle"),
    ("shelf", "table"),
    ("standing", "availability"),
    ("noted", "instrumented, or seen"),
    ("settle", "reconcile, release, review or watch: say which"),
    ("settled", "reconciled, released or loaded: say which"),
    ("settles", "reconciles or releases: say which"),
    ("settling", "reconciling or releasing: say which"),
];
/// Whole identifiers.
const RETIRED_NAMES: &[(&str, &str)] = &[
    ("Place", "what it is a place of"),
    ("Places", "what they are places of"),
    ("Kept", "Entry, or what it is"),
    ("Mark", "RunTag, Delimiter or Marker"),
    ("MARK", "RUN_TAG"),
    ("came_true", "record_outcome"),
    ("may_speak_for", "authorize_node"),
    ("let_go", "release"),
    ("in_vain", "unanswered"),
    ("closed_after", "final_report"),
];
/// Wherever they stand.
const RETIRED_PHRASES: &[(&str, &str)] = &[
    ("farewell", "deregistration"),
    ("closing word", "final report number"),
    ("in vain", "unanswered, or not started"),
    ("cry for help", "fatal driver error"),
    ("cries for help", "fatal driver errors"),
    ("the witness", "the oracle"),
];
/// Where the words that are used stand, and the most lines that it may have.
const GLOSSARY: &str = ".docs/GLOSSARY.md";
const GLOSSARY_LINES: usize = 40;
/// A name of more words is a sentence.
const LONGEST_NAME_WORDS: usize = 5;

/// Complains of each retired word in the code, the documents and the requirements.
pub(crate) fn check(files: &[String], complaints: &mut Vec<String>) -> Result<(), Failed> {
    let lines = read(&root().join(GLOSSARY))?.lines().count();
    if lines > GLOSSARY_LINES {
        complaints.push(format!("{GLOSSARY} has {lines} lines, at most {GLOSSARY_LINES}"));
    }
    for file in files.iter().filter(|file| *file != "xtask/src/words.rs" && *file != GLOSSARY) {
        let is = |extension: &str| Path::new(file).extension().is_some_and(|its| its == extension);
        if !is("rs") && !is("md") {
            continue;
        }
        let text = read(&root().join(file))?;
        let mut found = phrases(&text);
        if is("rs") {
            found.extend(identifiers(&text));
        }
        let complain = |(line, word, instead)| format!("{file}:{line}: {word} is retired: {instead}");
        complaints.extend(found.into_iter().map(complain));
    }
    Ok(())
}

type Found = (usize, String, &'static str);

fn phrases(text: &str) -> Vec<Found> {
    let mut found = Vec::new();
    for (before, line) in text.lines().enumerate() {
        let line = line.to_lowercase();
        let used = RETIRED_PHRASES.iter().filter(|(phrase, _)| line.contains(phrase));
        found.extend(used.map(|(phrase, instead)| (before + 1, (*phrase).to_owned(), *instead)));
    }
    found
}

fn identifiers(text: &str) -> Vec<Found> {
    let mut found = Vec::new();
    for (line, name) in names(text) {
        let words = words(name);
        let whole = RETIRED_NAMES.iter().find(|(retired, _)| *retired == name);
        let part = || RETIRED.iter().find(|(retired, _)| words.iter().any(|word| word == retired));
        let retired = if words.len() > LONGEST_NAME_WORDS { None } else { whole.or_else(part) };
        found.extend(retired.map(|(_, instead)| (line, name.to_owned(), *instead)));
    }
    found
}

/// The identifiers of Rust code, each with its line: without comments and texts.
fn names(text: &str) -> Vec<(usize, &str)> {
    let (mut names, mut line, mut at) = (Vec::new(), 1, 0);
    let bytes = text.as_bytes();
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    while at < bytes.len() {
        let rest = &text[at..];
        let next = match bytes[at] {
            b'/' if rest.starts_with("//") => at + rest.find('\n').unwrap_or(rest.len()),
            b'"' => at + text_length(rest),
            b'r' if raw_hashes(rest).is_some() => {
                let hashes = raw_hashes(rest).unwrap_or(0);
                let end = format!("\"{}", "#".repeat(hashes));
                let start = hashes + 2;
                at + rest
                    .get(start..)
                    .and_then(|body| body.find(&end))
                    .map_or(rest.len(), |n| start + n + end.len())
            }
            // A character, not a lifetime.
            b'\'' if rest[1..].starts_with('\\') => at + 2 + rest[2..].find('\'').map_or(1, |n| n + 1),
            b'\'' => match rest.char_indices().nth(2) {
                Some((end, '\'')) => at + end + 1,
                _ => at + 1,
            },
            byte if is_name(byte) => {
                let length = rest.bytes().take_while(|byte| is_name(*byte)).count();
                names.push((line, &rest[..length]));
                at + length
            }
            _ => at + rest.chars().next().map_or(1, char::len_utf8),
        };
        line += text.get(at..next).map_or(0, |passed| passed.matches('\n').count());
        at = next;
    }
    names
}

/// How long the text is that begins here, with both its quotes.
fn text_length(rest: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in rest.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// The number of `#` of the raw text that begins here.
fn raw_hashes(rest: &str) -> Option<usize> {
    let hashes = rest[1..].bytes().take_while(|byte| *byte == b'#').count();
    rest[1 + hashes..].starts_with('"').then_some(hashes)
}

/// The words of a name in lower case: of `snake_case`, of `CamelCase`, of `CONSTANTS`.
fn words(name: &str) -> Vec<String> {
    let mut words = Vec::new();
    for part in name.split('_').filter(|part| !part.is_empty()) {
        if !part.contains(|c: char| c.is_ascii_lowercase()) {
            words.push(part.to_lowercase());
            continue;
        }
        let mut word = String::new();
        for character in part.chars() {
            if character.is_uppercase() && !word.is_empty() {
                words.push(std::mem::take(&mut word));
            }
            word.extend(character.to_lowercase());
        }
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retired(text: &str) -> Vec<(usize, String)> {
        identifiers(text).into_iter().map(|(line, name, _)| (line, name)).collect()
    }

    #[test]
    fn a_retired_identifier_is_found_by_its_line_in_each_spelling() {
        let text = "fn start() {\n    let told_at = 1;\n    Effect::IntentTold;\n    SETTLE_EVERY;\n    wishes.check();\n}";
        let names = ["told_at", "IntentTold", "SETTLE_EVERY", "wishes"];
        let expected: Vec<_> = (2..).zip(names.map(str::to_owned)).collect();
        assert_eq!(retired(text), expected);
        assert_eq!(retired("struct Place;\nfn place() {}"), [(1, "Place".to_owned())]);
    }

    #[test]
    fn comments_texts_and_sentences_may_use_any_word() {
        let text = r##"
            // As it was told.
            let text = "told \" told"; let raw = r#"said "told""#; let one = '"'; let told_by = '\'';
            fn a_node_that_is_told_to_stop_leaves<'told>() {}
        "##;
        assert_eq!(retired(text), [(3, "told_by".to_owned()), (4, "told".to_owned())]);
    }

    #[test]
    fn a_retired_phrase_is_found_in_a_comment_too() {
        let found = phrases("one\n/// The node's Closing Word.\n");
        assert_eq!(found, [(2, "closing word".to_owned(), "final report number")]);
    }
}
