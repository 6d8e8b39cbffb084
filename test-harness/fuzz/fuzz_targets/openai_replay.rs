//! The comparer of a replay: of two attempts whatever they are, what a client has in the end is the
//! text of the second one, or what it had of the first before it was told of a difference.
//!
//! Both streams stand in the input, with a byte of 0 between them.

#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use openai_gateway::events::{EventKind, EventReader, StreamEvent};
use openai_gateway::replay::{Compared, Replay};
use serde_json::Value;
use task_stream::OpenAiRoute;

fn events(stream: &[u8]) -> Vec<StreamEvent> {
    let mut reader = EventReader::new(OpenAiRoute::ChatCompletions);
    reader.feed(Bytes::copy_from_slice(stream));
    let mut events = Vec::new();
    while let Some(event) = reader.next_event().expect("an input is shorter than an event may be") {
        events.push(event);
    }
    events
}

/// The texts of an answer, as a client reads them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Texts([String; 4]);

impl Texts {
    /// None for what serde_json does not take, as half of a pair or a number beyond a float.
    fn take(&mut self, event: &[u8]) -> Option<()> {
        let text = std::str::from_utf8(event).ok()?;
        let lines = text.split(['\n', '\r']).filter_map(|line| line.strip_prefix("data"));
        let data = lines.filter_map(|line| line.strip_prefix(':').or(line.is_empty().then_some("")));
        let data: Vec<&str> = data.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
        let value: Value = serde_json::from_str(&data.join("\n")).ok()?;
        let choice = &value["choices"][0];
        let delta = if choice["delta"].is_null() { &choice["message"] } else { &choice["delta"] };
        let more = [&delta["content"], &delta["reasoning_content"], &delta["reasoning"], &choice["text"]];
        for (text, more) in self.0.iter_mut().zip(more) {
            text.push_str(more.as_str().unwrap_or_default());
        }
        Some(())
    }
}

fuzz_target!(|input: &[u8]| {
    let Some(at) = input.iter().position(|byte| *byte == 0) else { return };
    let (first, second) = (events(&input[..at]), events(&input[at + 1..]));
    let mut replay = Replay::new();
    let (mut client, mut whole) = (Texts::default(), Texts::default());
    for event in &first {
        replay.passed(event);
        let is_read = event.kind != EventKind::Content || client.take(&event.bytes).is_some();
        if replay.impossible().is_some() || !is_read {
            return;
        }
    }
    replay.begin().expect("it is possible");
    let mut has_differed = false;
    for event in &second {
        let compared = replay.compare(event);
        assert!(!has_differed || matches!(compared, Compared::Differs(_)), "something passes after a difference");
        has_differed = matches!(compared, Compared::Differs(_));
        if has_differed || event.kind != EventKind::Content {
            continue;
        }
        if whole.take(&event.bytes).is_none() {
            return;
        }
        if let Compared::Pass(bytes) = compared {
            client.take(&bytes).expect("what was JSON is JSON still");
            assert_eq!(client, whole, "a splice");
        }
    }
});
