//! What an answer that is passed on has cost, and why it ended: the engine's own word where it says so,
//! else its events are counted.
//!
//! Most events of a chat or a text completion are not read: what such a stream says of itself stands in its
//! first piece, or in its last three events, and each of the others has a token. A copy of what came last is
//! all that is kept.

use bytes::Bytes;
use pool_registry_types::sse::frame_end;
use task_stream::{EndMarker, OpenAiRoute};

use crate::events::{EventReader, StreamEvent, Usage, read_answer};

/// Longest whole answer that is read, bytes: what a longer one has cost is not known.
const MAX_WHOLE_BYTES: usize = 1024 * 1024;
/// Pieces that are kept: the reason to finish, the usage and the end marker come one by one at most.
const LAST_PIECES: usize = 3;
/// Of each so many bytes at most, from the beginning of an event on.
const LAST_BYTES: usize = 4 * 1024;

/// What an answer says of itself, as far as it has come.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metered {
    pub usage: Usage,
    /// In the words of the engine's API.
    pub finish_reason: Option<String>,
}

/// Follows one answer.
#[derive(Debug)]
pub struct Meter {
    route: OpenAiRoute,
    count: Count,
    has_begun: bool,
    is_event_stream: bool,
    /// The last pieces that were not read; the oldest one stands at `oldest`.
    last: [Vec<u8>; LAST_PIECES],
    oldest: usize,
    /// A whole answer so far, as long as it is not too long.
    whole: Option<Vec<u8>>,
}

#[derive(Debug, Clone, Default)]
struct Count {
    metered: Metered,
    /// Events that have brought something.
    events: u64,
}

impl Meter {
    pub fn new(route: OpenAiRoute) -> Self {
        Self {
            route,
            count: Count::default(),
            has_begun: false,
            is_event_stream: false,
            last: Default::default(),
            oldest: 0,
            whole: Some(Vec::new()),
        }
    }

    /// Whole events of a stream, in their order.
    pub fn events(&mut self, bytes: &Bytes) {
        self.is_event_stream = true;
        let is_first = !std::mem::replace(&mut self.has_begun, true);
        if is_first || self.route.end_marker() != Some(EndMarker::Done) {
            return self.count.read(self.route, bytes.clone());
        }
        let last = &mut self.last[self.oldest];
        self.oldest = (self.oldest + 1) % LAST_PIECES;
        let (before, kept) = bytes.split_at(last_events(bytes));
        self.count.events += tokens(last) + tokens(before);
        last.clear();
        last.extend_from_slice(kept);
    }

    /// A part of an answer that is no stream, in its order.
    pub fn whole(&mut self, bytes: &[u8]) {
        if let Some(whole) = &mut self.whole {
            whole.extend_from_slice(bytes);
            self.whole.take_if(|whole| whole.len() > MAX_WHOLE_BYTES);
        }
    }

    /// The answer is complete: one that is no stream is read now, and let go of.
    pub fn finish(&mut self) {
        let whole = self.whole.take().filter(|_| !self.is_event_stream);
        if let Some(facts) = whole.map(|whole| read_answer(&whole)) {
            let usage = facts.usage.unwrap_or_default();
            self.count.metered = Metered { usage, finish_reason: facts.finish_reason };
        }
    }

    /// Events with a token so far, without those of the last pieces.
    pub fn counted(&self) -> u64 {
        self.count.events
    }

    /// What is known by now.
    pub fn metered(&self) -> Metered {
        let mut count = self.count.clone();
        let (newer, older) = self.last.split_at(self.oldest);
        for piece in older.iter().chain(newer).filter(|piece| !piece.is_empty()) {
            count.read(self.route, Bytes::copy_from_slice(piece));
        }
        if self.is_event_stream {
            count.metered.usage.tokens_out.get_or_insert(count.events);
        }
        count.metered
    }
}

/// Where the last events begin that are kept of a piece.
fn last_events(piece: &[u8]) -> usize {
    let Some(from) = piece.len().checked_sub(LAST_BYTES).filter(|from| *from > 0) else { return 0 };
    frame_end(&piece[from..], &mut 0).map_or(piece.len(), |end| from + end)
}

/// Tokens of events that are not read: each has a line of data and an empty one.
fn tokens(events: &[u8]) -> u64 {
    events.iter().filter(|byte| **byte == b'\n').count() as u64 / 2
}

impl Count {
    fn read(&mut self, route: OpenAiRoute, bytes: Bytes) {
        let mut reader = EventReader::new(route);
        reader.feed(bytes);
        while let Ok(Some(event)) = reader.next_event() {
            self.event(&event);
        }
        if let Some(event) = reader.last_event() {
            self.event(&event);
        }
    }

    fn event(&mut self, event: &StreamEvent) {
        self.events += u64::from(event.has_token());
        if let Some(usage) = event.usage() {
            self.metered.usage.update(usage);
        }
        if let Some(reason) = event.finish_reason() {
            self.metered.finish_reason = Some(reason.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TOKEN: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"},\"finish_reason\":null}],\"usage\":null}\n\n";
    const ROLE: &str =
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":null}}]}\n\n";
    const FINISH: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\": \"length\"}]}\n\n";
    const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":5}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    fn metered(route: OpenAiRoute, pieces: &[&str]) -> (Option<u64>, Option<u64>, Option<String>) {
        let mut meter = Meter::new(route);
        pieces.iter().for_each(|piece| meter.events(&Bytes::copy_from_slice(piece.as_bytes())));
        let Metered { usage, finish_reason } = meter.metered();
        (usage.tokens_in, usage.tokens_out, finish_reason)
    }

    // CLOUD-2881
    #[test]
    fn an_engines_own_count_stands_before_that_of_events_which_count_what_has_a_token() {
        let chat = OpenAiRoute::ChatCompletions;
        let end = Some("length".to_owned());
        assert_eq!(metered(chat, &[ROLE, TOKEN, TOKEN, FINISH, DONE]), (None, Some(2), end.clone()));
        assert_eq!(metered(chat, &[ROLE, TOKEN, FINISH, USAGE, DONE]), (Some(7), Some(5), end));
        assert_eq!(metered(chat, &[ROLE, TOKEN]), (None, Some(1), None), "as far as it has come");
        let anthropic = [
            "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":9,\"output_tokens\":0}}}\n\n",
            "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"type\":\"text_delta\",\"text\":\"a\"}}\n\n",
            "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"max_tokens\"},\"usage\":{\"output_tokens\":1}}\n\n",
        ];
        let end = Some("max_tokens".to_owned());
        assert_eq!(metered(OpenAiRoute::Messages, &anthropic), (Some(9), Some(1), end));
    }

    // CLOUD-2881
    #[test]
    fn a_whole_answer_is_read_where_it_is_not_too_long() {
        let read = |padding: usize| {
            let mut meter = Meter::new(OpenAiRoute::Embeddings);
            meter.whole(b"{\"usage\":{\"prompt_tokens\":3},\"data\":\"");
            meter.whole("x".repeat(padding).as_bytes());
            meter.whole(b"\"}");
            assert_eq!(meter.metered(), Metered::default(), "it may not be all of it");
            meter.finish();
            meter.metered()
        };
        let known = Usage { tokens_in: Some(3), tokens_out: None };
        assert_eq!(read(10), Metered { usage: known, finish_reason: None });
        assert_eq!(read(MAX_WHOLE_BYTES), Metered::default());
    }

    proptest! {
        // CLOUD-2881
        #[test]
        fn however_events_come_together_they_count_the_same(
            tokens in 0_usize..60,
            end in prop::sample::subsequence(vec![FINISH, USAGE, DONE], 0..=3),
            cuts in prop::collection::vec(1_usize..40, 0..40),
        ) {
            let each: Vec<&str> = [ROLE].into_iter().chain(std::iter::repeat_n(TOKEN, tokens)).chain(end).collect();
            let (mut rest, mut pieces) = (each.as_slice(), Vec::new());
            for cut in cuts {
                let (piece, behind) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece.concat());
                rest = behind;
            }
            pieces.push(rest.concat());
            let together: Vec<&str> = pieces.iter().map(String::as_str).filter(|piece| !piece.is_empty()).collect();
            let all = each.concat();
            let chat = OpenAiRoute::ChatCompletions;
            // The first piece is read.
            prop_assert_eq!(metered(chat, &together), metered(chat, &[&all]));
        }
    }
}
