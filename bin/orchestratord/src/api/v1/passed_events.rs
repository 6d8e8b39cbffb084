//! What of a stream was passed on: how many events, and whether its end was among them. Events come in
//! parts, cut anywhere; what is looked at is lines.

use task_stream::EndMarker;

/// The events by which a response ends.
const RESPONSE_ENDS: [&[u8]; 3] = [b"response.completed", b"response.failed", b"response.incomplete"];
/// Of a line so many bytes are kept, from its beginning and up to its end: those of any mark.
const LINE_BYTES: usize = 64;

/// The one reader's account of its stream.
#[derive(Debug)]
pub(super) struct PassedEvents {
    marker: Option<EndMarker>,
    /// The beginning of the present line.
    begin: Vec<u8>,
    /// Its last bytes, and how long it is.
    end: Vec<u8>,
    length: usize,
    /// Events with data.
    count: u64,
    /// The present event is the end, or the last one was.
    is_end: bool,
    /// The present event has a line.
    has_begun: bool,
    /// The last byte was a carriage return, of which a line feed may be the other half.
    after_return: bool,
}

impl PassedEvents {
    pub(super) fn new(marker: Option<EndMarker>) -> Self {
        let (begin, end) = (Vec::new(), Vec::new());
        Self { marker, begin, end, length: 0, count: 0, is_end: false, has_begun: false, after_return: false }
    }

    /// Events that were passed on.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// These bytes are passed on next; `is_whole`: an event ends with them. Returns whether that is the
    /// engine's own end.
    pub(super) fn pass(&mut self, bytes: &[u8], is_whole: bool) -> bool {
        let mut rest = bytes;
        while let Some(at) = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            self.line_goes_on(&rest[..at]);
            let is_half = at == 0 && rest[at] == b'\n' && self.after_return;
            if !is_half {
                self.line_ends();
            }
            self.after_return = rest[at] == b'\r';
            rest = &rest[at + 1..];
        }
        self.line_goes_on(rest);
        if is_whole {
            // It may have no line end behind it.
            if self.length > 0 {
                self.line_ends();
            }
            self.has_begun = false;
        }
        is_whole && self.is_end
    }

    fn line_goes_on(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let room = LINE_BYTES - self.begin.len();
        self.begin.extend_from_slice(&bytes[..room.min(bytes.len())]);
        self.length += bytes.len();
        self.after_return = false;
        let last = &bytes[bytes.len().saturating_sub(LINE_BYTES)..];
        let kept = (LINE_BYTES - last.len()).min(self.end.len());
        self.end.drain(..self.end.len() - kept);
        self.end.extend_from_slice(last);
    }

    fn line_ends(&mut self) {
        if self.length == 0 {
            // Empty: the event is over.
            self.has_begun = false;
            return;
        }
        if !std::mem::replace(&mut self.has_begun, true) {
            self.is_end = false;
        }
        let is_data = self.begin.starts_with(b"data:");
        self.count += u64::from(is_data);
        self.is_end |= match self.marker {
            Some(EndMarker::Done) => is_data && self.length <= LINE_BYTES && value(&self.begin) == b"[DONE]",
            Some(EndMarker::MessageStop) => {
                is_data && self.end.trim_ascii_end().ends_with(b"\"message_stop\"}")
            }
            Some(EndMarker::Response) => {
                self.begin.starts_with(b"event:") && RESPONSE_ENDS.contains(&value(&self.begin))
            }
            None => false,
        };
        self.begin.clear();
        self.end.clear();
        self.length = 0;
    }
}

/// What stands behind the name of a line's field.
fn value(line: &[u8]) -> &[u8] {
    let at = line.iter().position(|byte| *byte == b':').map_or(line.len(), |at| at + 1);
    line[at..].trim_ascii()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the end was seen, and how many events, in parts of so many bytes.
    fn seen(marker: EndMarker, events: &[&str], part: usize) -> (bool, u64) {
        let (mut passed, mut is_end) = (PassedEvents::new(Some(marker)), false);
        for event in events {
            let parts: Vec<&[u8]> = event.as_bytes().chunks(part).collect();
            for (n, bytes) in parts.iter().enumerate() {
                let is_over = passed.pass(bytes, n + 1 == parts.len());
                assert!(!is_over || n + 1 == parts.len(), "an event is not over before its last part");
                is_end = is_over || is_end && n + 1 < parts.len();
            }
        }
        (is_end, passed.count())
    }

    // CLOUD-2854
    #[test]
    fn the_end_of_a_stream_is_seen_however_its_events_are_cut() {
        let long = format!("event: response.completed\ndata: {{\"text\":\"{}\"}}\n\n", "x".repeat(20_000));
        let quoted = "data: {\"delta\":\"[DONE] response.completed message_stop\"}\n\n";
        let (done, response, stop) = (EndMarker::Done, EndMarker::Response, EndMarker::MessageStop);
        for part in [1, 2, 3, 7, 64, 65, 4_096, 1 << 20] {
            assert_eq!(seen(response, &[quoted, &long], part), (true, 2), "{part}");
            assert_eq!(seen(response, &[quoted, &long.replace('\n', "\r\n")], part), (true, 2), "{part}");
            assert_eq!(seen(response, &[&long, "data: a\n\n"], part), (false, 2), "{part}");
            assert_eq!(seen(response, &[quoted], part), (false, 1), "{part}");
            assert_eq!(seen(done, &["data: a\n\n", "data: [DONE]\n\n"], part), (true, 2), "{part}");
            assert_eq!(seen(done, &["data: a\r\n\r\n", "data:[DONE]\r\n"], part), (true, 2), "{part}");
            assert_eq!(seen(done, &["data: [DONE]"], part), (true, 1), "{part}");
            assert_eq!(seen(done, &[quoted, ": [DONE]\n\n"], part), (false, 1), "{part}");
            let event = "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";
            assert_eq!(seen(stop, &["event: ping\ndata: {}\n\n", event], part), (true, 2), "{part}");
            assert_eq!(seen(stop, &[quoted], part), (false, 1), "{part}");
        }
    }
}
