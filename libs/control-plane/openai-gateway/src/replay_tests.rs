//! Two attempts at one text, cut and dressed differently, and a death everywhere.

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use task_stream::OpenAiRoute;

use super::*;
use crate::events::EventReader;

/// What a request makes, whichever replica works on it.
#[derive(Debug, Clone)]
pub(super) struct Script {
    pub(super) is_chat: bool,
    reasoning: String,
    pub(super) content: String,
    finish: &'static str,
    has_usage: bool,
}

impl Script {
    /// The same with other words.
    pub(super) fn saying(&self, content: String) -> Self {
        Self { content, ..self.clone() }
    }
}

/// How an engine writes it.
#[derive(Debug, Clone)]
pub(super) struct Dress {
    cuts: Vec<usize>,
    role_with_text: bool,
    finish_with_text: bool,
    usage_with_finish: bool,
    usage_everywhere: bool,
    line_end: &'static str,
    is_ascii: bool,
    has_comments: bool,
}

pub(super) fn scripts() -> impl Strategy<Value = Script> {
    let text = || prop::string::string_regex("[a-c\"\\\\\né€😀]{0,12}").unwrap();
    (any::<bool>(), text(), text(), prop::sample::select(vec!["stop", "length"]), any::<bool>()).prop_map(
        |(is_chat, reasoning, content, finish, has_usage)| Script {
            reasoning: if is_chat { reasoning } else { String::new() },
            is_chat,
            content,
            finish,
            has_usage,
        },
    )
}

pub(super) fn dresses() -> impl Strategy<Value = Dress> {
    let line_end = prop::sample::select(vec!["\n", "\r\n"]);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (prop::collection::vec(1_usize..5, 1..8), line_end, flags).prop_map(|(cuts, line_end, flags)| Dress {
        cuts,
        role_with_text: flags.0,
        finish_with_text: flags.1,
        usage_with_finish: flags.2,
        usage_everywhere: flags.3,
        line_end,
        is_ascii: flags.4,
        has_comments: flags.5,
    })
}

/// Writes JSON as Python does by default.
fn ascii(text: &str) -> String {
    let escape = |character: char| {
        let mut units = [0; 2];
        character.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")).collect::<String>()
    };
    text.chars().map(|c| if c.is_ascii() { c.to_string() } else { escape(c) }).collect()
}

/// The chunks of an attempt, without their names: `(choice, usage)`.
fn chunks(script: &Script, dress: &Dress) -> Vec<(Option<Value>, bool)> {
    let mut texts = Vec::new();
    let mut cuts = dress.cuts.iter().cycle();
    for (field, text) in [("reasoning_content", &script.reasoning), ("content", &script.content)] {
        let characters: Vec<char> = text.chars().collect();
        let mut rest = &characters[..];
        while !rest.is_empty() {
            let (piece, after) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
            texts.push((field, piece.iter().collect::<String>()));
            rest = after;
        }
    }
    let mut made: Vec<Value> = Vec::new();
    if script.is_chat {
        if !dress.role_with_text || texts.is_empty() {
            made.push(
                json!({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}),
            );
        }
        made.extend(texts.iter().map(|(field, text)| {
            let delta: Map<String, Value> =
                [((*field).to_owned(), Value::from(text.as_str()))].into_iter().collect();
            json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": null})
        }));
        if dress.role_with_text {
            made[0]["delta"]["role"] = "assistant".into();
        }
    } else {
        made.extend(texts.iter().map(|(_, text)| json!({"index": 0, "text": text, "finish_reason": null})));
    }
    let end = if script.is_chat { json!({"index": 0, "delta": {}}) } else { json!({"index": 0, "text": ""}) };
    if made.is_empty() || !dress.finish_with_text {
        made.push(end);
    }
    made.last_mut().unwrap()["finish_reason"] = script.finish.into();
    let last = made.len() - 1;
    let mut chunks: Vec<(Option<Value>, bool)> = made
        .into_iter()
        .enumerate()
        .map(|(n, choice)| {
            let with_finish = n == last && dress.usage_with_finish;
            (Some(choice), script.has_usage && (with_finish || n != last && dress.usage_everywhere))
        })
        .collect();
    if script.has_usage && !dress.usage_with_finish {
        chunks.push((None, true));
    }
    chunks
}

pub(super) fn stream(script: &Script, dress: &Dress, name: &str) -> Vec<Vec<u8>> {
    let mut events = Vec::new();
    for (n, (choice, usage)) in chunks(script, dress).into_iter().enumerate() {
        if dress.has_comments && n % 2 == 0 {
            events.push(format!(": {name}{0}{0}", dress.line_end).into_bytes());
        }
        let mut data = json!({"id": name, "created": name.len(), "model": format!("m-{name}"),
            "choices": choice.into_iter().collect::<Vec<_>>(), "system_fingerprint": format!("f {name}")});
        if usage {
            data["usage"] = json!({"prompt_tokens": 3, "completion_tokens": n});
        }
        let data = data.to_string();
        let data = if dress.is_ascii { ascii(&data) } else { data };
        events.push(format!("data: {data}{0}{0}", dress.line_end).into_bytes());
    }
    events.push(format!("data: [DONE]{0}{0}", dress.line_end).into_bytes());
    events
}

pub(super) fn read(script: &Script, bytes: &[u8], cut: usize) -> Vec<StreamEvent> {
    let route = if script.is_chat { OpenAiRoute::ChatCompletions } else { OpenAiRoute::Completions };
    let mut reader = EventReader::new(route);
    let mut events = Vec::new();
    for piece in bytes.chunks(cut) {
        reader.feed(Bytes::copy_from_slice(piece));
        while let Some(event) = reader.next_event().unwrap() {
            events.push(event);
        }
    }
    events
}

/// What an SDK makes of a stream.
#[derive(Debug, Default, PartialEq, Eq, Clone)]
pub(super) struct Client {
    pub(super) texts: [String; 3],
    roles: usize,
    finish: Vec<String>,
    usages: usize,
    ends: usize,
    names: BTreeSet<String>,
}

impl Client {
    pub(super) fn take(&mut self, bytes: &[u8]) {
        let text = std::str::from_utf8(bytes).unwrap();
        let Some(data) = text.lines().find_map(|line| line.strip_prefix("data: ")) else { return };
        assert_eq!(self.ends, 0, "nothing follows the end");
        if data == "[DONE]" {
            self.ends += 1;
            return;
        }
        let data: Value = serde_json::from_str(data).unwrap_or_else(|error| panic!("{data}: {error}"));
        for name in IDENTITY {
            self.names.insert(format!("{name} {}", data[name]));
        }
        let choice = &data["choices"][0];
        let fields = [&choice["delta"]["reasoning_content"], &choice["delta"]["content"], &choice["text"]];
        for (text, more) in self.texts.iter_mut().zip(fields) {
            assert!(
                self.finish.is_empty() || more.as_str().is_none_or(str::is_empty),
                "a text behind its end"
            );
            text.push_str(more.as_str().unwrap_or_default());
        }
        self.roles += usize::from(choice["delta"]["role"].is_string());
        self.finish.extend(choice["finish_reason"].as_str().map(str::to_owned));
        self.usages += usize::from(data["usage"].is_object() && !self.finish.is_empty());
    }
}

fn follow(events: &[StreamEvent]) -> (Replay, Client) {
    let (mut replay, mut client) = (Replay::new(), Client::default());
    for event in events {
        replay.passed(event);
        client.take(&event.bytes);
    }
    (replay, client)
}

pub(super) fn whole(script: &Script, dress: &Dress, name: &str) -> Client {
    let mut client = Client::default();
    stream(script, dress, name).iter().for_each(|event| client.take(event));
    client
}

proptest! {
    // CLOUD-2816
    // CLOUD-2817
    #[test]
    fn a_death_at_any_byte_is_not_seen_by_a_client(
        script in scripts(), first in dresses(), second in dresses(),
        cut in 1_usize..40, second_cut in 1_usize..40,
    ) {
        let bytes = stream(&script, &first, "a").concat();
        let again = read(&script, &stream(&script, &second, "bb").concat(), second_cut);
        let expected = whole(&script, &first, "a");
        let mut tried = 0;
        for death in 0..bytes.len() {
            let before = read(&script, &bytes[..death], cut);
            let is_new = before.len() > tried && before.iter().any(|event| event.kind == EventKind::Content);
            if !is_new {
                continue;
            }
            tried = before.len();
            let (mut replay, mut client) = follow(&before);
            prop_assert_eq!(replay.begin(), Ok(()));
            for event in &again {
                match replay.compare(event) {
                    Compared::Known => prop_assert!(!replay.has_caught_up()),
                    Compared::Pass(bytes) => client.take(&bytes),
                    Compared::Differs(difference) => prop_assert!(false, "{} at byte {}", difference, death),
                }
            }
            prop_assert_eq!(&client, &expected, "death at byte {}", death);
        }
        prop_assert!(tried > 0);
    }

    // CLOUD-2818
    #[test]
    fn of_another_text_nothing_is_passed_on(
        script in scripts(), first in dresses(), second in dresses(),
        death in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), is_cut in any::<bool>(),
    ) {
        let events = stream(&script, &first, "a");
        let before = &events[..=death.index(events.len() - 1)];
        let (mut replay, client) = follow(&read(&script, &before.concat(), 1000));
        let known = &client.texts[if script.is_chat { 1 } else { 2 }];
        prop_assume!(!known.is_empty());
        let mut other: Vec<char> = script.content.chars().collect();
        let at = at.index(known.chars().count());
        if is_cut {
            other.truncate(at);
        } else {
            other[at] = 'z';
        }
        let other = script.saying(other.into_iter().collect());
        replay.begin().unwrap();
        let mut differs = false;
        for event in read(&script, &stream(&other, &second, "b").concat(), 1000) {
            match replay.compare(&event) {
                Compared::Known => {}
                Compared::Differs(_) => {
                    differs = true;
                    break;
                }
                Compared::Pass(bytes) => prop_assert!(false, "passed {}", String::from_utf8_lossy(&bytes)),
            }
        }
        prop_assert!(differs);
    }
}

fn event(data: &str) -> StreamEvent {
    let mut reader = EventReader::new(OpenAiRoute::ChatCompletions);
    reader.feed(Bytes::from(format!("data: {data}\n\n")));
    reader.next_event().unwrap().unwrap()
}

fn delta(delta: &str) -> StreamEvent {
    event(&format!(r#"{{"choices":[{{"index":0,"delta":{{{delta}}}}}]}}"#))
}

fn begun(passed: &[StreamEvent]) -> Replay {
    let (mut replay, _) = follow(passed);
    replay.begin().unwrap();
    replay
}

// CLOUD-2816
#[test]
fn of_an_event_that_straddles_every_other_byte_is_kept() {
    let mut replay = begun(&[event(
        r#"{"id":"a","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":"hé😀"}}]}"#,
    )]);
    let straddles = r#"{ "id" : "b","x":1.50,"choices":[{"index":0, "delta":{"content" : "h\u00e9\ud83d\ude00\u00fc\/"},"y":null}],"created":2,"model":"n"}"#;
    let kept = r#"{ "id" : "a","x":1.50,"choices":[{"index":0, "delta":{"content" : "\u00fc\/"},"y":null}],"created":1,"model":"m"}"#;
    assert_eq!(replay.compare(&event(straddles)), Compared::Pass(format!("data: {kept}\n\n").into()));
    assert!(replay.has_caught_up());
    let later = event(r#"{"id":"b","choices":[{"index":0,"delta":{"content":"hé"}}]}"#);
    let named = "data: {\"id\":\"a\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"hé\"}}]}\n\n";
    assert_eq!(replay.compare(&later), Compared::Pass(named.into()));
}

// CLOUD-2816
#[test]
fn data_of_several_lines_is_cut_in_its_line() {
    let mut replay = begun(&[delta(r#""content":"ab""#)]);
    let second = event("{\"choices\":[\ndata:{\"index\":0,\r\ndata: \"delta\":{\"content\":\"abc\"}}]}");
    let bytes = "data: {\"choices\":[\ndata:{\"index\":0,\r\ndata: \"delta\":{\"content\":\"c\"}}]}\n\n";
    assert_eq!(replay.compare(&second), Compared::Pass(bytes.into()));
}

// CLOUD-2817
#[test]
fn an_engines_error_passes_once_and_ends() {
    let mut replay = begun(&[delta(r#""content":"ab""#)]);
    let error = event(r#"{"error":{"message":"x"}}"#);
    assert_eq!(replay.compare(&error), Compared::Pass(error.bytes.clone()));
    assert!(matches!(replay.compare(&error), Compared::Differs(_)));
}

// CLOUD-2818
#[test]
fn what_goes_on_differently_is_named() {
    let text = |text: &str| delta(&format!(r#""content":"{text}""#));
    let end = |reason: &str| {
        event(&format!(r#"{{"choices":[{{"index":0,"delta":{{}},"finish_reason":"{reason}"}}]}}"#))
    };
    let cases = [
        (vec![text("abc")], vec![text("ab"), text("x")], Difference::Text { at: 2 }),
        (vec![text("abc")], vec![text("ab"), end("stop")], Difference::Shorter),
        (vec![text("a"), end("stop")], vec![text("ab")], Difference::Longer),
        (vec![text("a"), end("stop")], vec![text("a"), end("length")], Difference::FinishReason),
        (
            vec![delta(r#""reasoning_content":"r""#), text("a")],
            vec![delta(r#""reasoning_content":"rs""#)],
            Difference::Order,
        ),
        (vec![text("abc")], vec![delta(r#""tool_calls":[{}]"#)], Difference::Incomparable),
        (vec![text("abc")], vec![delta(r#""content":"\ud800""#)], Difference::Incomparable),
        (vec![text("abc")], vec![event("no JSON")], Difference::Incomparable),
    ];
    for (passed, again, difference) in cases {
        let mut replay = begun(&passed);
        let compared: Vec<Compared> = again.iter().map(|event| replay.compare(event)).collect();
        assert_eq!(compared[again.len() - 1], Compared::Differs(difference));
        assert!(matches!(replay.compare(&text("abc")), Compared::Differs(_)), "there is no way back");
    }
}

// CLOUD-2815
#[test]
fn a_stream_with_more_than_text_or_too_much_of_it_is_not_replayed() {
    for (more, why) in [
        (delta(r#""tool_calls":[{"index":0}]"#), NotReplayed::MoreThanText),
        (delta(r#""content":"a","content":"b""#), NotReplayed::MoreThanText),
        (event(r#"{"choices":[{"index":1,"delta":{"content":"a"}}]}"#), NotReplayed::MoreThanText),
        (event(r#"{"choices":[{"delta":{}},{"delta":{}}]}"#), NotReplayed::MoreThanText),
        (event(r#"{"choices":[{"index":0,"delta":{},"logprobs":{}}]}"#), NotReplayed::MoreThanText),
        (event("x"), NotReplayed::Unreadable),
        (delta(r#""content":"\udead""#), NotReplayed::Unreadable),
        (event("[DONE]"), NotReplayed::Ended),
        (event(r#"{"error":{}}"#), NotReplayed::Ended),
        (delta(&format!(r#""content":"{}""#, "a".repeat(MAX_REPLAY_BYTES + 1))), NotReplayed::TooLong),
    ] {
        let mut replay = Replay::new();
        replay.passed(&delta(r#""content":"a""#));
        replay.passed(&more);
        assert_eq!(replay.begin(), Err(why));
        assert_eq!(replay.passed.texts.concat(), "", "what is not needed is not kept");
    }
    let mut replay = Replay::new();
    for _ in 0..MAX_REPLAY_TOKENS {
        replay.passed(&delta(r#""content":"a""#));
    }
    assert_eq!(replay.impossible(), None);
    replay.passed(&delta(r#""content":"a""#));
    assert_eq!(replay.impossible(), Some(NotReplayed::TooLong));
}

// CLOUD-2815
#[test]
fn there_is_one_replay() {
    let mut replay = begun(&[delta(r#""content":"a""#)]);
    assert_eq!(replay.begin(), Err(NotReplayed::Again));
}
