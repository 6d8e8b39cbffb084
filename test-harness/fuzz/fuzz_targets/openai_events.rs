//! Streams of engines for the OpenAI-compatible gateway: the same events wherever the bytes are cut.
//!
//! The first byte says of which route, and how long the pieces are.

#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use openai_gateway::events::{EventKind, EventReader, StreamEvent};
use task_stream::OpenAiRoute;

fn events(route: OpenAiRoute, stream: &[u8], piece: usize) -> Vec<StreamEvent> {
    let mut reader = EventReader::new(route);
    let mut events = Vec::new();
    for bytes in stream.chunks(piece) {
        reader.feed(Bytes::copy_from_slice(bytes));
        while let Some(event) = reader.next_event().expect("an input is shorter than an event may be") {
            events.push(event);
        }
    }
    events.extend(reader.last_event());
    events
}

fuzz_target!(|input: &[u8]| {
    let Some((first, stream)) = input.split_first() else { return };
    let route = OpenAiRoute::ALL[usize::from(first % 10)];
    let piece = 1 + usize::from(first / 10);
    let whole = events(route, stream, stream.len().max(1));
    assert_eq!(events(route, stream, piece), whole);
    let mut rest = stream;
    for event in &whole {
        rest = rest.strip_prefix(&event.bytes[..]).expect("events are the bytes that came");
        let lines = event.bytes.split(|byte| matches!(byte, b'\n' | b'\r'));
        let is_quiet = lines.filter(|line| !line.is_empty()).all(|line| line.starts_with(b":"));
        let is_marked = event.bytes.starts_with(b"\xef\xbb\xbf");
        assert!(is_marked || is_quiet == (event.kind == EventKind::Comment));
        assert!(event.kind != EventKind::Comment || !event.has_token());
    }
});
