//! Every shape of a stream that was tried, as a table that the test itself writes.
//!
//! Each dialect's answer " a b" goes through every way in which servers of the field frame their
//! events, through fields that nobody asked for, and through its own ways to end and to fail. Each
//! is read in pieces of several lengths. `cargo nextest run -p node-agent shapes --no-capture`
//! prints the table.

#![expect(clippy::print_stdout, reason = "the table is the result")]

use pool_registry_types::ErrorCode;
use pool_registry_types::sse::{Decoder, MAX_FRAME_BYTES, SseError};
use pool_registry_types::task::FinishReason;
use proptest::prelude::*;

use super::answer::{EngineEvent, Reader, Reply};
use super::thoughts::Delta;
use super::{llamacpp, openai, tgi, triton};

/// How a stream is taken.
#[derive(Debug, Clone, PartialEq)]
enum Taken {
    Whole {
        thought: String,
        text: String,
        reason: FinishReason,
    },
    Failed,
    /// No end came: the engine is dead.
    Died,
    Refused(ErrorCode),
    TooLong,
}

/// Reads a stream as an attempt does. `in_order`: the message ends, it does not break.
fn take(reply: &'static Reply, bytes: &[u8], piece: usize, in_order: bool) -> Taken {
    let (mut decoder, mut reader) = (Decoder::lossy(), Reader::new(reply, false).bounded_by(Some(9)));
    let mut all = Delta::default();
    let mut step = |reported: EngineEvent| match reported {
        EngineEvent::Nothing => None,
        EngineEvent::Delta(Delta { thought, text }) => {
            all.thought += &thought;
            all.text += &text;
            None
        }
        EngineEvent::End { delta: Delta { thought, text }, finish_reason, .. } => {
            let thought = format!("{}{thought}", all.thought);
            Some(Taken::Whole { thought, text: format!("{}{text}", all.text), reason: finish_reason })
        }
        EngineEvent::Failed(_) => Some(Taken::Failed),
        EngineEvent::Refused(refusal) => Some(Taken::Refused(refusal.error.code)),
    };
    for piece in bytes.chunks(piece) {
        decoder.push(piece);
        loop {
            let reported = match decoder.next_frame() {
                Ok(Some(frame)) => reader.read(&frame),
                Ok(None) => break,
                Err(SseError::TooLong) => return Taken::TooLong,
                Err(SseError::NotUtf8) => return Taken::Failed,
            };
            if let Some(taken) = step(reported) {
                return taken;
            }
        }
    }
    if in_order
        && let Some(frame) = decoder.last_frame().unwrap()
        && let Some(taken) = step(reader.read_last(&frame))
    {
        return taken;
    }
    let end = if in_order { reader.closed() } else { reader.lost() };
    end.and_then(step).unwrap_or(Taken::Died)
}

fn whole(text: &str, reason: FinishReason) -> Taken {
    Taken::Whole { thought: String::new(), text: text.into(), reason }
}

/// What each event of the answer " a b" holds, and the reason that it ends for.
fn answer(reply: &'static Reply) -> (Vec<String>, FinishReason) {
    let events: &[&str] = match reply.name {
        "llama.cpp's completion" => &[
            r#"{"content":" a","stop":false}"#,
            r#"{"content":" b","stop":false}"#,
            r#"{"content":"","stop":true,"stop_type":"limit","tokens_predicted":2}"#,
        ],
        "OpenAI's completion" => &[
            r#"{"choices":[{"text":" a","finish_reason":null}]}"#,
            r#"{"choices":[{"text":" b","finish_reason":null}]}"#,
            r#"{"choices":[{"text":"","finish_reason":"length"}]}"#,
            r#"{"choices":[],"usage":{"completion_tokens":2}}"#,
            "[DONE]",
        ],
        "OpenAI's chat" => &[
            r#"{"choices":[{"delta":{"role":"assistant","content":null}}]}"#,
            r#"{"choices":[{"delta":{"content":" a"},"finish_reason":null}]}"#,
            r#"{"choices":[{"delta":{"content":" b"},"finish_reason":null}]}"#,
            r#"{"choices":[{"delta":{},"finish_reason":"length"}]}"#,
            r#"{"choices":[],"usage":{"completion_tokens":2}}"#,
            "[DONE]",
        ],
        "TGI's generate_stream" => &[
            r#"{"token":{"id":5,"text":" a","special":false},"generated_text":null,"details":null}"#,
            r#"{"token":{"id":6,"text":" b","special":false},"generated_text":" a b","details":{"finish_reason":"length","generated_tokens":2}}"#,
        ],
        "Triton's generate_stream" => &[r#"{"text_output":" a"}"#, r#"{"text_output":" b"}"#],
        other => unreachable!("{other}"),
    };
    let reason = if *reply == triton::GENERATE { FinishReason::Stop } else { FinishReason::Length };
    (events.iter().map(|event| (*event).to_owned()).collect(), reason)
}

fn dialects() -> [&'static Reply; 5] {
    [&llamacpp::COMPLETION, &openai::COMPLETION, &openai::CHAT, &tgi::GENERATE, &triton::GENERATE]
}

fn framed(events: &[String], before: &str, after: &str) -> String {
    events.iter().map(|event| format!("{before}{event}{after}")).collect()
}

/// The ways in which events are framed.
fn framings(events: &[String]) -> Vec<(&'static str, Vec<u8>)> {
    let plain = framed(events, "data: ", "\n\n");
    let between = |what: &str| plain.replace("\n\n", &format!("\n\n{what}\n\n"));
    let (last, others) = events.split_last().unwrap();
    let others = framed(others, "data: ", "\n\n");
    let texts = [
        ("as the standard has it", plain.clone()),
        ("no space after the colon", framed(events, "data:", "\n\n")),
        ("two spaces after the colon", framed(events, "data:  ", "\n\n")),
        ("white space after the event", framed(events, "data: ", " \t\n\n")),
        ("CRLF", plain.replace('\n', "\r\n")),
        ("CR", plain.replace('\n', "\r")),
        ("mixed line ends", framed(events, "data: ", "\r\n\n")),
        ("a byte order mark", format!("\u{feff}{plain}")),
        ("empty lines before the first event", format!("\n\r\n\n{plain}")),
        ("several empty lines between events", plain.replace("\n\n", "\n\n\n\n")),
        ("comments between events", between(": ping - 2026-11-25")),
        ("empty comments", between(":")),
        ("a comment in the event", framed(events, ": OPENROUTER PROCESSING\ndata: ", "\n\n")),
        ("a comment as data", between("data: : OPENROUTER PROCESSING")),
        ("data without anything", between("data:")),
        ("an event without data", between("event: ping")),
        ("the event's name", framed(events, "event: message\ndata: ", "\n\n")),
        ("a foreign event with an object", format!("event: ping\ndata: {{\"type\":\"ping\"}}\n\n{plain}")),
        ("ids", framed(events, "id: 7\ndata: ", "\n\n")),
        ("retry", format!("retry: 3000\n\n{plain}")),
        ("a field that nobody knows", framed(events, "foo: {bar}\ndata: ", "\n\n")),
        (
            "a line separator of Unicode beside the text",
            framed(events, "data: ", "\n\n").replace("{\"", "{\"\u{2028}\":1,\""),
        ),
        ("events over several lines", framed(events, "data: ", "\n\n").replace(",\"", ",\ndata: \"")),
        ("the last event without its empty line", format!("{others}data: {last}\n")),
        ("the last event without a line end", format!("{others}data: {last}")),
        ("the last event ended by half a line end", format!("{others}data: {last}\r")),
    ];
    texts.into_iter().map(|(name, text)| (name, text.into_bytes())).collect()
}

/// What stands where nobody looks.
const BESIDE: [&str; 20] = [
    r#""x":null"#,
    r#""x":NaN"#,
    r#""x":-Infinity"#,
    r#""x":[Infinity,{"y":NaN}]"#,
    r#""x":1e999"#,
    r#""x":18446744073709551612"#,
    r#""x":"\ud83d""#,
    r#""x":"\q""#,
    r#""x":{"error":{"message":"not this one"}}"#,
    r#""x":"data: [DONE]""#,
    r#""x":[[],{},[{}]]"#,
    r#""x":1,"x":2"#,
    r#""error":null"#,
    r#""error":"""#,
    r#""error":{}"#,
    r#""id":null,"object":"","created":1.5,"model":7"#,
    r#""usage":null"#,
    r#""usage":[]"#,
    r#""timings":{"predicted_ms":NaN}"#,
    r#""system_fingerprint":{},"prompt_filter_results":[{"jailbreak":{"filtered":false}}]"#,
];

fn beside(events: &[String], what: &str, last: bool) -> Vec<u8> {
    let with = |event: &String| match event.strip_prefix('{') {
        Some(_) if last => format!("{},{what}}}", event.strip_suffix('}').unwrap()),
        Some(rest) => format!("{{{what},{rest}"),
        None => event.clone(),
    };
    framed(&events.iter().map(with).collect::<Vec<_>>(), "data: ", "\n\n").into_bytes()
}

/// Shapes of one dialect's own, with how each is taken.
fn own(reply: &'static Reply) -> Vec<(&'static str, &'static str, Taken)> {
    use FinishReason::{Length, Stop};
    let thoughts =
        |thought: &str, text: &str| Taken::Whole { thought: thought.into(), text: text.into(), reason: Stop };
    match reply.name {
        "llama.cpp's completion" => vec![
            ("no end", r#"data: {"content":" a","stop":false}\n\n"#, Taken::Died),
            (
                "a text in the last event",
                r#"data: {"content":" a","stop":true,"stop_type":"eos"}\n\n"#,
                whole(" a", Stop),
            ),
            (
                "older: stopped_limit",
                r#"data: {"content":" a","stop":true,"stopped_limit":true}\n\n"#,
                whole(" a", Length),
            ),
            (
                "a count beyond all measure",
                r#"data: {"content":" a","stop":true,"tokens_predicted":18446744073709551612}\n\n"#,
                whole(" a", Stop),
            ),
            (
                "content: null",
                r#"data: {"content":null,"stop":false}\n\ndata: {"content":"a","stop":true}\n\n"#,
                whole("a", Stop),
            ),
            (
                "half a pair in the text",
                r#"data: {"content":"a\ud83d","stop":false}\n\ndata: {"stop":true}\n\n"#,
                whole("a\u{fffd}", Stop),
            ),
            (
                "an error",
                r#"data: {"error":{"code":500,"message":"out of memory","type":"server_error"}}\n\n"#,
                Taken::Failed,
            ),
            (
                "older: an error field",
                r#"error: {"code":400,"message":"bad grammar","type":"invalid_request_error"}\n\ndata: [DONE]\n\n"#,
                Taken::Refused(ErrorCode::InvalidParams),
            ),
            (
                "a marker that is none of its own",
                r#"data: {"content":" a","stop":false}\n\ndata: [DONE]\n\n"#,
                whole(" a", Stop),
            ),
            (
                "cut in the middle of an event",
                r#"data: {"content":" a","stop":false}\n\ndata: {"conte"#,
                Taken::Died,
            ),
        ],
        "OpenAI's completion" => vec![
            (
                "text: null",
                r#"data: {"choices":[{"text":null}]}\n\ndata: {"choices":[{"text":"a"}]}\n\ndata: [DONE]\n\n"#,
                whole("a", Stop),
            ),
            ("no finish_reason", r#"data: {"choices":[{"text":"a"}]}\n\ndata: [DONE]\n\n"#, whole("a", Stop)),
            (
                "no marker",
                r#"data: {"choices":[{"text":"a","finish_reason":"length"}]}\n\n"#,
                whole("a", Length),
            ),
            ("neither", r#"data: {"choices":[{"text":"a"}]}\n\n"#, Taken::Died),
            (
                "an empty finish_reason each time",
                r#"data: {"choices":[{"text":"a","finish_reason":""}]}\n\ndata: [DONE]\n\n"#,
                whole("a", Stop),
            ),
            ("an error as a text", r#"data: {"error":"out of memory"}\n\n"#, Taken::Failed),
        ],
        "OpenAI's chat" => vec![
            (
                "no marker, as TGI up to 2.1",
                r#"data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n"#,
                whole("a", Stop),
            ),
            (
                "no finish_reason",
                r#"data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: [DONE]\n\n"#,
                whole("a", Stop),
            ),
            ("neither", r#"data: {"choices":[{"delta":{"content":"a"}}]}\n\n"#, Taken::Died),
            ("nothing but a marker", r#"data: [DONE]\n\n"#, Taken::Failed),
            (
                "an error without its empty line",
                r#"data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"error":{"message":"boom"}}\n"#,
                Taken::Failed,
            ),
            ("an error that is a number", r#"data: {"error":500,"message":"boom"}\n\n"#, Taken::Failed),
            ("an error that is a yes", r#"data: {"error":true}\n\ndata: [DONE]\n\n"#, Taken::Failed),
            (
                "a quoted marker",
                r#"data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: "[DONE]"\n\n"#,
                whole("a", Stop),
            ),
            (
                "a bare marker",
                r#"data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: DONE\n\n"#,
                whole("a", Stop),
            ),
            (
                "a marker inside the text",
                r#"data: {"choices":[{"delta":{"content":"[DONE]"},"finish_reason":"stop"}]}\n\n"#,
                whole("[DONE]", Stop),
            ),
            (
                "choices: null",
                r#"data: {"choices":null}\n\ndata: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n"#,
                whole("a", Stop),
            ),
            (
                "choices: [{}] with usage",
                r#"data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: {"choices":[{}],"usage":{}}\n\n"#,
                whole("a", Stop),
            ),
            (
                "Azure's filters",
                r#"data: {"id":"","choices":[],"prompt_filter_results":[{}]}\n\ndata: {"choices":[{"content_filter_offsets":{}}]}\n\ndata: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n"#,
                whole("a", Stop),
            ),
            (
                "delta: null at the end",
                r#"data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"choices":[{"delta":null,"finish_reason":"length"}]}\n\n"#,
                whole("a", Length),
            ),
            (
                "a number as content",
                r#"data: {"choices":[{"delta":{"content":6},"finish_reason":"stop"}]}\n\n"#,
                whole("6", Stop),
            ),
            (
                "content as parts",
                r#"data: {"choices":[{"delta":{"content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},"finish_reason":"stop"}]}\n\n"#,
                whole("ab", Stop),
            ),
            (
                "parts that think",
                r#"data: {"choices":[{"delta":{"content":[{"type":"thinking","thinking":[{"type":"text","text":"t"}]},{"type":"text","text":"a"}]},"finish_reason":"stop"}]}\n\n"#,
                thoughts("t", "a"),
            ),
            (
                "thoughts as reasoning_content",
                r#"data: {"choices":[{"delta":{"content":null,"reasoning_content":"t"}}]}\n\ndata: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n"#,
                thoughts("t", "a"),
            ),
            (
                "thoughts as reasoning",
                r#"data: {"choices":[{"delta":{"content":"","reasoning":"t"}}]}\n\ndata: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n"#,
                thoughts("t", "a"),
            ),
            (
                "thoughts under two names",
                r#"data: {"choices":[{"delta":{"reasoning":"t","reasoning_details":[{"type":"reasoning.text","text":"t"}]}}]}\n\ndata: {"choices":[{"delta":{"reasoning_details":[{"text":"t"}]}}]}\n\ndata: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n"#,
                thoughts("t", "a"),
            ),
            (
                "thoughts in an object",
                r#"data: {"choices":[{"delta":{"reasoning_content":{"text":"t"}}}]}\n\ndata: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n"#,
                thoughts("t", "a"),
            ),
            (
                "thoughts and text in one delta",
                r#"data: {"choices":[{"delta":{"reasoning":"t","content":"a"},"finish_reason":"stop"}]}\n\n"#,
                thoughts("t", "a"),
            ),
            (
                "nothing but thoughts",
                r#"data: {"choices":[{"delta":{"reasoning":"t"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n"#,
                thoughts("t", ""),
            ),
            (
                "tool calls are no text",
                r#"data: {"choices":[{"delta":{"tool_calls":[{"id":null}]}}]}\n\ndata: {"choices":[{"delta":{"content":"a"},"finish_reason":"tool_calls"}]}\n\n"#,
                whole("a", Stop),
            ),
            (
                "a refusal is no text",
                r#"data: {"choices":[{"delta":{"refusal":"no","content":"a"},"finish_reason":"stop"}]}\n\n"#,
                whole("a", Stop),
            ),
            (
                "text after the reason",
                r#"data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: {"choices":[{"delta":{"content":"b"}}]}\n\ndata: [DONE]\n\n"#,
                whole("ab", Stop),
            ),
            (
                "a whole answer",
                r#"data: {"choices":[{"message":{"role":"assistant","content":"a"},"finish_reason":"stop"}]}\n\n"#,
                whole("a", Stop),
            ),
            (
                "the whole text once more",
                r#"data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"choices":[{"message":{"content":"a"},"finish_reason":"stop"}]}\n\n"#,
                whole("a", Stop),
            ),
            (
                "usage in every event, absurd",
                r#"data: {"choices":[{"delta":{"content":"a"}}],"usage":{"completion_tokens":-35}}\n\ndata: {"choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"completion_tokens":"many"}}\n\n"#,
                whole("a", Stop),
            ),
            (
                "given up",
                r#"data: {"choices":[{"delta":{"content":"a"},"finish_reason":"abort"}]}\n\ndata: [DONE]\n\n"#,
                Taken::Failed,
            ),
            (
                "an error beside choices",
                r#"data: {"error":{"code":"server_error","message":"x"},"choices":[{"delta":{"content":""},"finish_reason":"error"}]}\n\n"#,
                Taken::Failed,
            ),
            (
                "an error, then a marker",
                r#"data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"error":{"message":"EngineCore died","code":500}}\n\ndata: [DONE]\n\n"#,
                Taken::Failed,
            ),
            (
                "an older flat error",
                r#"data: {"object":"error","message":"too hot","code":400}\n\n"#,
                Taken::Refused(ErrorCode::InvalidParams),
            ),
            (
                "an event named error",
                r#"event: error\ndata: {"code":400,"details":"no"}\n\n"#,
                Taken::Refused(ErrorCode::InvalidParams),
            ),
            ("an error without data:", r#"{"error":{"message":"x"}}\n\n"#, Taken::Failed),
            ("an error as words", r#"data: error: it broke\n\n"#, Taken::Failed),
            (
                "events run together",
                r#"data: {"choices":[{"delta":{"content":"adata: {"id":1}\n\n"#,
                Taken::Failed,
            ),
        ],
        "TGI's generate_stream" => vec![
            (
                "a whole answer",
                r#"data: {"generated_text":"Hello","details":null}\n\n"#,
                whole("Hello", Stop),
            ),
            (
                "no end",
                r#"data: {"token":{"text":"a","special":false},"generated_text":null,"details":null}\n\n"#,
                Taken::Died,
            ),
            (
                "no details",
                r#"data: {"token":{"text":"a","special":false},"generated_text":"a"}\n\n"#,
                whole("a", Stop),
            ),
            (
                "a special token",
                r#"data: {"token":{"text":"</s>","special":true},"generated_text":"","details":{"finish_reason":"eos_token"}}\n\n"#,
                whole("", Stop),
            ),
            (
                "no token at the end",
                r#"data: {"token":{"text":"a"}}\n\ndata: {"token":null,"generated_text":"a"}\n\n"#,
                whole("a", Stop),
            ),
            (
                "an error of validation",
                r#"data: {"error":"`top_p` must be < 1.0","error_type":"validation"}\n\n"#,
                Taken::Refused(ErrorCode::InvalidParams),
            ),
            (
                "an error of its own",
                r#"data: {"error":"Request failed during generation","error_type":"generation"}\n\n"#,
                Taken::Failed,
            ),
        ],
        _ => vec![
            (
                "an error without its empty line",
                r#"data: {"text_output":"a"}\n\ndata: {"error":"boom"}\n"#,
                Taken::Failed,
            ),
            (
                "half an event at an orderly end",
                r#"data: {"text_output":"a"}\n\ndata: {"text_out"#,
                Taken::Failed,
            ),
            (
                "a prompt that is too long, in words",
                r#"data: {"error":"Encountered an error when fetching new request: Prompt length (9000) exceeds maximum input length (8192)"}\n\n"#,
                Taken::Refused(ErrorCode::ContextTooLong),
            ),
            ("a list of one text", r#"data: {"text_output":["a"]}\n\n"#, whole("a", Stop)),
            (
                "an empty text",
                r#"data: {"text_output":"a"}\n\ndata: {"text_output":""}\n\n"#,
                whole("a", Stop),
            ),
            ("nothing at all", "", Taken::Died),
            ("an error", r#"data: {"error":"Executor failed"}\n\n"#, Taken::Failed),
            ("null", r#"data: null\n\n"#, Taken::Failed),
        ],
    }
}

// CLOUD-1522
#[test]
fn every_shape_that_was_tried_is_taken_for_what_it_says() {
    let mut tried = 0;
    for reply in dialects() {
        let (events, reason) = answer(reply);
        let good = whole(" a b", reason);
        let mut rows: Vec<(String, Vec<u8>, Taken)> = Vec::new();
        let framings =
            framings(&events).into_iter().map(|(name, bytes)| (name.to_owned(), bytes, good.clone()));
        rows.extend(framings);
        for what in BESIDE {
            rows.push((format!("before: {what}"), beside(&events, what, false), good.clone()));
            rows.push((format!("behind: {what}"), beside(&events, what, true), good.clone()));
        }
        let raw = framed(&events, "data: ", "\n\n").replace(" a", " a\u{0}\u{0}");
        let raw = raw.into_bytes().into_iter().map(|byte| if byte == 0 { 0xff } else { byte }).collect();
        rows.push(("bytes that are no text".into(), raw, whole(" a\u{fffd}\u{fffd} b", reason)));
        let long = format!("data: {{\"x\":\"{}\"}}\n\n", "y".repeat(MAX_FRAME_BYTES));
        rows.push(("one event over 1 MiB".into(), long.into_bytes(), Taken::TooLong));
        for (name, text, taken) in own(reply) {
            rows.push((name.to_owned(), text.replace("\\n", "\n").into_bytes(), taken));
        }
        assert!(rows.len() >= 40, "{}: {} shapes", reply.name, rows.len());
        for (name, bytes, expected) in &rows {
            let smallest = if bytes.len() > 10_000 { 4_096 } else { 1 };
            for piece in [smallest, 7.max(smallest), bytes.len().max(1)] {
                let taken = take(reply, bytes, piece, true);
                assert_eq!(taken, *expected, "{}: {name}, by {piece}", reply.name);
            }
            println!("{} | {name} | {expected:?}", reply.name);
        }
        tried += rows.len();
    }
    println!("{tried} shapes");
}

// CLOUD-1516
#[test]
fn a_connection_that_breaks_ends_only_what_had_said_why_it_ends() {
    for reply in dialects() {
        let (events, reason) = answer(reply);
        let first = framed(&events[..1], "data: ", "\n\n");
        assert_eq!(take(reply, first.as_bytes(), 64, false), Taken::Died, "{}", reply.name);
        let all = framed(&events, "data: ", "\n\n").replace("data: [DONE]\n\n", "");
        let expected = if reply.ends_by_closing { Taken::Died } else { whole(" a b", reason) };
        assert_eq!(take(reply, all.as_bytes(), 64, false), expected, "{}", reply.name);
    }
}

proptest! {
    // CLOUD-1522
    #[test]
    fn fields_that_nobody_asked_for_change_no_token(
        which in 0_usize..5,
        names in prop::collection::vec("[a-z_]{1,8}", 1..4),
        values in prop::collection::vec(prop_oneof![
            Just("null".to_owned()), Just("NaN".to_owned()), Just("-Infinity".to_owned()), Just("{}".to_owned()),
            Just("[]".to_owned()), "-?[0-9]{1,30}", "\"[ -!#-\\[\\]-~]{0,12}\"", Just("{\"content\":[\"x\"]}".to_owned()),
        ], 4),
        last in any::<bool>(),
    ) {
        let reply = dialects()[which];
        let (events, reason) = answer(reply);
        // What is asked for is not "unknown".
        let asked = ["choices", "usage", "error", "object", "content", "stop", "token", "details", "text_output"];
        prop_assume!(names.iter().all(|name| !asked.contains(&name.as_str())));
        let fields: Vec<String> = names.iter().zip(&values).map(|(name, value)| format!("\"{name}\":{value}")).collect();
        let bytes = beside(&events, &fields.join(","), last);
        prop_assert_eq!(take(reply, &bytes, 16, true), whole(" a b", reason));
    }
}
