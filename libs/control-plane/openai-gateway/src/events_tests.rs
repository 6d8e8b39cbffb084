//! Streams of engines, cut anywhere.

use proptest::prelude::*;

use super::*;

const CHAT: OpenAiRoute = OpenAiRoute::ChatCompletions;

fn events(route: OpenAiRoute, chunks: &[&[u8]]) -> Vec<StreamEvent> {
    let mut reader = EventReader::new(route);
    let mut events = Vec::new();
    for chunk in chunks {
        reader.feed(Bytes::copy_from_slice(chunk));
        while let Some(event) = reader.next_event().unwrap() {
            events.push(event);
        }
    }
    events.extend(reader.last_event());
    events
}

fn event(route: OpenAiRoute, bytes: &str) -> StreamEvent {
    let mut all = events(route, &[bytes.as_bytes()]);
    assert_eq!(all.len(), 1, "{bytes}");
    all.remove(0)
}

// CLOUD-2811
#[test]
fn an_event_is_known_for_what_it_is() {
    let responses = OpenAiRoute::Responses;
    for (route, bytes, kind) in [
        (CHAT, ": ping\n\n", EventKind::Comment),
        (CHAT, "\n", EventKind::Comment),
        (CHAT, ":\r\n: x\r\n\r\n", EventKind::Comment),
        (CHAT, ": x\ndata: {}\n\n", EventKind::Content),
        (CHAT, "data: no JSON\n\n", EventKind::Content),
        (CHAT, "data: [DONE]\n\n", EventKind::End),
        (CHAT, "data:[DONE]\r\r", EventKind::End),
        (CHAT, "data: {\"choices\":[{\"delta\":{\"content\":\"[DONE]\"}}]}\n\n", EventKind::Content),
        (CHAT, "data: {\"error\":null,\"choices\":[]}\n\n", EventKind::Content),
        (CHAT, "data: {\"choices\":[{\"error\":1}]}\n\n", EventKind::Content),
        (CHAT, "data: {\"\\u0065rror\":{\"message\":\"x\"}}\n\n", EventKind::Error),
        (CHAT, "data: {\"object\":\"error\",\"message\":\"x\"}\n\n", EventKind::Error),
        (CHAT, "error: {\"message\":\"x\"}\n\n", EventKind::Error),
        (CHAT, "event: message_stop\ndata: {}\n\n", EventKind::Content),
        (OpenAiRoute::Messages, "data: [DONE]\n\n", EventKind::Content),
        (OpenAiRoute::Messages, "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n", EventKind::End),
        (OpenAiRoute::Messages, "data: {\"type\":\"message_stop\"}\n\n", EventKind::End),
        (
            OpenAiRoute::Messages,
            "event: error\ndata: {\"type\":\"error\",\"error\":{}}\n\n",
            EventKind::Error,
        ),
        (OpenAiRoute::Messages, "event: ping\ndata: {\"type\":\"ping\"}\n\n", EventKind::Content),
        (responses, "data: {\"type\":\"response.completed\"}\n\n", EventKind::End),
        (
            responses,
            "event: response.failed\ndata: {\"type\":\"response.failed\",\"response\":{\"error\":{}}}\n\n",
            EventKind::End,
        ),
        (responses, "event: response.incomplete\ndata: {}\n\n", EventKind::End),
        (responses, "data: {\"type\":\"response.created\"}\n\n", EventKind::Content),
        (responses, "data: {\"type\":\"error\",\"message\":\"x\"}\n\n", EventKind::Error),
    ] {
        assert_eq!(event(route, bytes).kind, kind, "{route:?} {bytes}");
    }
}

// CLOUD-2812
#[test]
fn tokens_usage_and_the_reason_to_finish_are_read_in_each_dialect() {
    let chat = event(
        CHAT,
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\\n\",\"reasoning_content\":\"b\"},\
         \"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}}\n\n",
    );
    assert_eq!((chat.text_bytes(TextField::Content), chat.text_bytes(TextField::ReasoningContent)), (3, 1));
    assert_eq!(chat.usage(), Some(Usage { tokens_in: Some(3), tokens_out: Some(2) }));
    assert_eq!(chat.finish_reason(), Some("stop"));
    assert!(chat.has_token());
    for (route, data, has_token) in [
        (CHAT, r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#, false),
        (CHAT, r#"{"choices":[{"delta":{"content":null,"tool_calls":[]},"finish_reason":null}]}"#, false),
        (CHAT, r#"{"choices":[{"delta":{"tool_calls":[{"function":{"arguments":"{"}}]}}]}"#, true),
        (OpenAiRoute::Completions, r#"{"choices":[{"text":"a"}]}"#, true),
        (
            OpenAiRoute::Messages,
            r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":"a"}}"#,
            true,
        ),
        (OpenAiRoute::Messages, r#"{"type":"content_block_delta","delta":{"thinking":"a"}}"#, true),
        (OpenAiRoute::Messages, r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"}}"#, false),
        (OpenAiRoute::Responses, r#"{"type":"response.output_text.delta","delta":"a"}"#, true),
        (OpenAiRoute::Responses, r#"{"type":"response.output_text.done","text":"a"}"#, false),
    ] {
        assert_eq!(event(route, &format!("data: {data}\n\n")).has_token(), has_token, "{data}");
    }
    let mut usage = Usage::default();
    for data in [
        r#"{"type":"message_start","message":{"usage":{"input_tokens":9,"output_tokens":1}}}"#,
        r#"{"type":"message_delta","delta":{"stop_reason":"max_tokens"},"usage":{"output_tokens":5}}"#,
    ] {
        usage.update(event(OpenAiRoute::Messages, &format!("data: {data}\n\n")).usage().unwrap());
    }
    assert_eq!(usage, Usage { tokens_in: Some(9), tokens_out: Some(5) });
    let last = r#"{"type":"response.completed","response":{"usage":{"input_tokens":4,"output_tokens":6}}}"#;
    let last = event(OpenAiRoute::Responses, &format!("data: {last}\n\n"));
    assert_eq!(last.usage(), Some(Usage { tokens_in: Some(4), tokens_out: Some(6) }));
}

// CLOUD-2812
#[test]
fn a_whole_answer_is_read_like_an_event() {
    let answer =
        br#"{"choices":[{"message":{"content":"a"},"finish_reason":"length"}],"usage":{"prompt_tokens":1}}"#;
    let facts = read_answer(answer);
    assert_eq!(facts.finish_reason.as_deref(), Some("length"));
    assert_eq!(facts.usage, Some(Usage { tokens_in: Some(1), tokens_out: None }));
    assert_eq!(read_answer(br#"{"stop_reason":"end_turn"}"#).finish_reason.as_deref(), Some("end_turn"));
    assert_eq!(read_answer(b"<html>\xff"), AnswerFacts::default());
}

// CLOUD-2810
#[test]
fn an_event_that_came_whole_is_a_slice_of_what_came() {
    let fed = Bytes::from_static(b"data: {\"a\":1}\n\n: x\n\ndata: b\n\nda");
    let mut reader = EventReader::new(CHAT);
    reader.feed(fed.clone());
    let range = fed.as_ptr_range();
    for _ in 0..3 {
        let event = reader.next_event().unwrap().unwrap();
        assert!(range.contains(&event.bytes.as_ptr()));
    }
    assert_eq!(reader.next_event(), Ok(None));
    assert_eq!(reader.last_event(), None, "half an event is none");
}

// CLOUD-2810
#[test]
fn events_are_bounded_and_long_ones_pass() {
    let long = format!("data: {{\"x\":\"{}\"}}\n\n", "y".repeat(300_000));
    assert_eq!(events(CHAT, &long.as_bytes().chunks(1000).collect::<Vec<_>>())[0].bytes, long.as_bytes());
    let mut reader = EventReader::new(CHAT);
    reader.feed(vec![b'x'; MAX_EVENT_BYTES].into());
    assert_eq!(reader.next_event(), Ok(None));
    reader.feed(Bytes::from_static(b"x"));
    assert_eq!(reader.next_event(), Err(EventTooLong));
}

// CLOUD-2810
#[test]
fn an_end_without_its_empty_line_counts_when_the_stream_ends() {
    for end in ["data: [DONE]", "data: [DONE]\n", "data: [DONE]\r\n", "data: [DONE]\r"] {
        let all = events(CHAT, &[b"data: a\n\n", end.as_bytes()]);
        assert_eq!(all.len(), 2, "{end:?}");
        assert_eq!((all[1].kind, &all[1].bytes[..]), (EventKind::End, end.as_bytes()));
    }
    assert_eq!(events(CHAT, &[b"data: {\"choices\":[]}"]).len(), 0);
    assert_eq!(events(CHAT, &[b"data: {\"choices\":[]}\r\r"]).len(), 1);
}

fn piece() -> impl Strategy<Value = Vec<u8>> {
    let line_end = prop::sample::select(vec!["\n", "\r\n", "\r"]);
    let line = prop::sample::select(vec![
        "data: {\"choices\":[{\"delta\":{\"content\":\"ß\"}}]}".as_bytes(),
        b"data: \xc3",
        b": comment",
        b"event: error",
        b"data: [DONE]",
        b"id: 5",
        b"data: {\"usage\":",
        b"data: {\"prompt_tokens\":1}}",
    ]);
    (prop::collection::vec(line, 0..4), line_end).prop_map(|(lines, end)| {
        let mut event: Vec<u8> = lines.into_iter().flat_map(|line| [line, end.as_bytes()].concat()).collect();
        event.extend_from_slice(end.as_bytes());
        event
    })
}

proptest! {
    // CLOUD-2810
    #[test]
    fn events_are_the_same_wherever_their_bytes_are_cut(
        pieces in prop::collection::vec(piece(), 0..10),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let bytes = pieces.concat();
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        at.extend([0, bytes.len()]);
        at.sort_unstable();
        let chunks: Vec<&[u8]> = at.windows(2).map(|cut| &bytes[cut[0]..cut[1]]).collect();
        let cut = events(CHAT, &chunks);
        let whole = events(CHAT, &[&bytes]);
        prop_assert_eq!(&cut, &whole);
        let all: Vec<u8> = cut.iter().flat_map(|event| event.bytes.to_vec()).collect();
        // A lone carriage return at the very end is no event.
        prop_assert!(bytes.starts_with(&all) && bytes.len() - all.len() <= 1);
    }
}
