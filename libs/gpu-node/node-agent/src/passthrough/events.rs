//! Where the events of a stream end, and which of them is its end.

use node_core::Ends;
use pool_registry_types::sse::frame_end;
use task_stream::{EndMarker, MAX_PASSED_EVENT_BYTES};

// A link carries an event as one record.
const _: () = assert!(MAX_PASSED_EVENT_BYTES <= attempt_link::records::MAX_WHOLE_BYTES);

/// The types of events by which streams end.
const ENDS: [&str; 5] =
    ["message_stop", "error", "response.completed", "response.failed", "response.incomplete"];

/// Whole events, end to end.
#[derive(Debug, Default)]
pub(super) struct Events {
    pub(super) bytes: Vec<u8>,
    pub(super) ends: Ends,
}

/// An event of more than [`MAX_PASSED_EVENT_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooLong;

/// Cuts a stream into its events. Comments count as such too.
#[derive(Debug)]
pub(super) struct EventCutter {
    /// Whether events say of themselves what they are, as those of messages and responses.
    is_typed: bool,
    /// What was not handed out, of which so much was searched for the end of an event.
    rest: Vec<u8>,
    searched: usize,
    has_ended: bool,
}

impl EventCutter {
    /// `marker`: how a stream of the route ends.
    pub(super) fn new(marker: Option<EndMarker>) -> Self {
        let is_typed = matches!(marker, Some(EndMarker::MessageStop | EndMarker::Response));
        Self { is_typed, rest: Vec::new(), searched: 0, has_ended: false }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.rest.extend_from_slice(bytes);
    }

    /// Whether its end, or an error that is its end, has come.
    pub(super) fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// The events that are whole. `is_last`: nothing follows, and an end without an empty line behind it
    /// counts.
    pub(super) fn take(&mut self, is_last: bool) -> Result<Events, TooLong> {
        let (mut ends, mut at) = (Ends::default(), 0);
        loop {
            let rest = &self.rest[at..];
            let end = match frame_end(rest, &mut self.searched) {
                Some(end) => end,
                // The line end that its last character may be a half of does not come.
                None if is_last && !rest.is_empty() && self.is_end(rest) => rest.len(),
                None => break,
            };
            if end > MAX_PASSED_EVENT_BYTES {
                return Err(TooLong);
            }
            self.has_ended |= self.is_end(&rest[..end]);
            at += end;
            self.searched = 0;
            ends.push(at);
        }
        if self.rest.len() - at > MAX_PASSED_EVENT_BYTES {
            return Err(TooLong);
        }
        if at == 0 {
            return Ok(Events::default());
        }
        let left = self.rest.split_off(at);
        Ok(Events { bytes: std::mem::replace(&mut self.rest, left), ends })
    }

    /// Whether the stream ends with this event: by its mark, or because it tells of an error.
    fn is_end(&self, event: &[u8]) -> bool {
        let mut lines = event.split(|byte| matches!(byte, b'\n' | b'\r')).filter(|line| !line.is_empty());
        lines.any(|line| {
            let (field, value) = match line.iter().position(|byte| *byte == b':') {
                Some(at) => (&line[..at], &line[at + 1..]),
                None => (line, &[][..]),
            };
            let value = value.strip_prefix(b" ").unwrap_or(value);
            match field {
                // As llama.cpp had it.
                b"error" => true,
                b"event" => ENDS.iter().any(|end| end.as_bytes() == value),
                b"data" => value.trim_ascii() == b"[DONE]" || is_end_by_its_data(value, self.is_typed),
                _ => false,
            }
        })
    }
}

/// The data's own word. It is read only where it may be one: most events are neither.
fn is_end_by_its_data(data: &[u8], is_typed: bool) -> bool {
    #[derive(serde::Deserialize)]
    struct Data<'d> {
        #[serde(default, borrow, rename = "type")]
        kind: Option<std::borrow::Cow<'d, str>>,
        #[serde(default)]
        error: Option<serde::de::IgnoredAny>,
    }
    let may = |word: &[u8]| data.windows(word.len()).any(|part| part == word);
    let begins_with_error = data
        .trim_ascii_start()
        .strip_prefix(b"{")
        .is_some_and(|rest| rest.trim_ascii_start().starts_with(b"\"error\""));
    if !begins_with_error && !(is_typed && (may(b"message_stop") || may(b"response.") || may(b"error"))) {
        return false;
    }
    let Ok(data) = serde_json::from_slice::<Data<'_>>(data) else { return false };
    let by_kind = is_typed && data.kind.is_some_and(|kind| ENDS.contains(&&*kind));
    by_kind || begins_with_error && data.error.is_some()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ends(marker: EndMarker, event: &str) -> bool {
        let mut cutter = EventCutter::new(Some(marker));
        cutter.push(event.as_bytes());
        cutter.take(false).unwrap();
        cutter.has_ended()
    }

    // CLOUD-2835
    #[test]
    fn a_stream_ends_by_the_mark_of_its_language_or_an_error_and_by_nothing_that_quotes_one() {
        let chat = EndMarker::Done;
        let cases = [
            (chat, "data: [DONE]\n\n", true),
            (chat, "data:[DONE]\r\n\r\n", true),
            (chat, "data: {\"error\":{\"message\":\"x\"}}\n\n", true),
            (chat, "error: {\"message\":\"x\"}\n\n", true),
            (chat, "data: {\"choices\":[{\"delta\":{\"content\":\"[DONE] error\"}}]}\n\n", false),
            (chat, "data: {\"error\":null,\"choices\":[]}\n\n", false),
            (EndMarker::MessageStop, "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n", true),
            (EndMarker::MessageStop, "data: {\"type\":\"message_stop\"}\n\n", true),
            (EndMarker::MessageStop, "data: {\"type\":\"ping\",\"x\":\"message_stop\"}\n\n", false),
            (EndMarker::MessageStop, "event: error\ndata: {\"type\":\"error\",\"error\":{}}\n\n", true),
            (EndMarker::Response, "event: response.completed\ndata: {}\n\n", true),
            (EndMarker::Response, "data: {\"type\":\"response.incomplete\"}\n\n", true),
            (
                EndMarker::Response,
                "data: {\"type\":\"response.output_text.delta\",\"delta\":\"\"}\n\n",
                false,
            ),
        ];
        for (marker, event, is_end) in cases {
            assert_eq!(ends(marker, event), is_end, "{event}");
        }
    }

    // CLOUD-2835
    #[test]
    fn an_end_without_its_empty_line_counts_at_the_end_of_the_message_and_half_an_event_is_not_passed_on() {
        let mut cutter = EventCutter::new(Some(EndMarker::Done));
        cutter.push(b"data: a\n\ndata: [DONE]\n");
        assert_eq!(cutter.take(false).unwrap().bytes, b"data: a\n\n");
        assert!(!cutter.has_ended());
        assert_eq!(cutter.take(true).unwrap().bytes, b"data: [DONE]\n");
        assert!(cutter.has_ended());
        cutter.push(b"data: half");
        assert!(cutter.take(true).unwrap().bytes.is_empty());
        cutter.push(&vec![b'x'; MAX_PASSED_EVENT_BYTES]);
        assert_eq!(cutter.take(false).unwrap_err(), TooLong);
    }

    // CLOUD-2858
    #[test]
    fn long_events_pass_and_one_that_is_too_long_is_known_before_its_end() {
        for bytes in [300_000, 4 * 1024 * 1024, MAX_PASSED_EVENT_BYTES - 8] {
            let mut cutter = EventCutter::new(Some(EndMarker::Done));
            let event = format!("data: {}\n\n", "x".repeat(bytes));
            for piece in event.as_bytes().chunks(60_000) {
                assert!(cutter.take(false).unwrap().bytes.is_empty());
                cutter.push(piece);
            }
            let taken = cutter.take(false).unwrap();
            assert!(taken.bytes == event.as_bytes() && taken.ends.frames() == 1, "{bytes}");
        }
        let mut cutter = EventCutter::new(Some(EndMarker::Done));
        cutter.push(&vec![b'x'; MAX_PASSED_EVENT_BYTES + 1]);
        assert_eq!(cutter.take(false).unwrap_err(), TooLong);
    }

    proptest! {
        // CLOUD-2835
        #[test]
        fn events_are_the_same_however_their_bytes_are_cut(
            events in prop::collection::vec(
                prop_oneof![
                    Just("data: a\n\n"), Just("data: b\r\n\r\n"), Just(": c\n\n"), Just("data: [DONE]\n\n"),
                    Just("data: ß\r\r"), Just("event: x\ndata: y\n\n"),
                ],
                0..12,
            ),
            mut cuts in prop::collection::vec(0_usize..120, 0..6),
        ) {
            let bytes = events.concat().into_bytes();
            cuts.iter_mut().for_each(|cut| *cut = (*cut).min(bytes.len()));
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut cutter = EventCutter::new(Some(EndMarker::Done));
            let (mut all, mut count) = (Vec::new(), 0);
            for cut in cuts.windows(2) {
                cutter.push(&bytes[cut[0]..cut[1]]);
                let taken = cutter.take(false).unwrap();
                prop_assert!(taken.bytes.is_empty() || taken.bytes.ends_with(b"\n") || taken.bytes.ends_with(b"\r"));
                count += taken.ends.frames();
                all.extend(taken.bytes);
            }
            // A carriage return at the very end may be half of a line end.
            let held = usize::from(events.last() == Some(&"data: ß\r\r"));
            prop_assert_eq!(count, (events.len() - held) as u64);
            prop_assert!(bytes.starts_with(&all));
            prop_assert_eq!(cutter.has_ended(), events.contains(&"data: [DONE]\n\n"));
        }
    }
}
