//! Whether a frame of a node's may be passed on as it came.
//!
//! A relay passes bytes on that it has read its own way, and a client's `EventSource` reads them
//! again: a frame is passed on where both can only read the same. It has its three lines once each,
//! all lines end with LF, and its data is what its event promises, under its own number. Fields and
//! lines that nobody knows are passed over by both.

use std::borrow::Cow;

use pool_registry_types::LogId;
use pool_registry_types::sse::{BYTE_ORDER_MARK, Frame, MAX_FRAME_BYTES};
use serde::Deserialize;

/// Why a frame is not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadFrame {
    #[error("a frame that others read otherwise: {0}")]
    Lines(&'static str),
    #[error("a frame whose data is not that of its event")]
    Data,
    #[error("a frame whose data has another number than its id")]
    Number,
}

/// Of events `token` and `reasoning`.
#[derive(Deserialize)]
struct Text<'d> {
    #[serde(borrow, rename = "t")]
    _text: Cow<'d, str>,
    i: u64,
}

/// Of event `result`.
#[derive(Deserialize)]
struct Numbered {
    i: u64,
}

/// Of event `end`: a newer node may say more, and end for more reasons.
#[derive(Deserialize)]
struct End<'d> {
    #[serde(default, rename = "tokens_out")]
    _tokens_out: Option<u64>,
    #[serde(borrow, default, rename = "finish_reason")]
    _finish_reason: Option<Cow<'d, str>>,
}

/// Bytes of a log's id as it is written: a UUID with its hyphens, in lower case.
const LOG_ID_BYTES: usize = 36;
/// What stands between a frame's number and its text.
const BEFORE_TEXT: [&[u8]; 2] = [b"\nevent: token\ndata: {\"t\":\"", b"\nevent: reasoning\ndata: {\"t\":\""];

/// What a token's frame looks like as nodes write it, byte by byte: nearly all frames are such, and
/// need not be read first to be known as good.
#[derive(Debug)]
pub(crate) struct TokenShape {
    log_id: [u8; LOG_ID_BYTES],
}

impl TokenShape {
    pub(crate) fn new(log: LogId) -> Self {
        let mut log_id = [0; LOG_ID_BYTES];
        log.0.hyphenated().encode_lower(&mut log_id);
        Self { log_id }
    }

    /// The length of the frame with which `bytes` begin, where it is one of a token or of a thought, with
    /// this number, of which [`check`] would find nothing amiss. Where it is not, it may be good still.
    pub(crate) fn len_at(&self, bytes: &[u8], index: u64) -> Option<usize> {
        let rest = bytes.strip_prefix(b"id: ")?.strip_prefix(&self.log_id)?.strip_prefix(b":")?;
        let digits = number_len(rest, index)?;
        let (number, rest) = rest.split_at(digits);
        let rest = BEFORE_TEXT.iter().find_map(|before| rest.strip_prefix(*before))?;
        let rest = &rest[text_len(rest)?..];
        let rest = rest.strip_prefix(b"\",\"i\":")?.strip_prefix(number)?.strip_prefix(b"}\n\n")?;
        Some(bytes.len() - rest.len()).filter(|len| *len <= MAX_FRAME_BYTES)
    }
}

/// The digits with which `bytes` begin, where they are those of `number` as it is written.
fn number_len(bytes: &[u8], number: u64) -> Option<usize> {
    let digits = bytes.iter().take_while(|byte| byte.is_ascii_digit()).count();
    if digits == 0 || digits > 1 && bytes[0] == b'0' {
        return None;
    }
    let read = bytes[..digits]
        .iter()
        .try_fold(0_u64, |read, digit| read.checked_mul(10)?.checked_add(u64::from(digit - b'0')));
    (read? == number).then_some(digits)
}

/// How far the text of a JSON string goes whose opening quote stands before `bytes`; nothing where it has
/// no end, is not valid, or names a character by its number (then a parser is to look at it).
fn text_len(bytes: &[u8]) -> Option<usize> {
    let (mut at, mut is_ascii) = (0, true);
    loop {
        match *bytes.get(at)? {
            b'"' => break,
            b'\\' if matches!(bytes.get(at + 1)?, b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {
                at += 2
            }
            b'\\' | ..0x20 => return None,
            byte => {
                is_ascii &= byte.is_ascii();
                at += 1;
            }
        }
    }
    (is_ascii || std::str::from_utf8(&bytes[..at]).is_ok()).then_some(at)
}

/// Checks a frame of the attempt's log, whose id names `index`.
pub(crate) fn check(frame: &Frame<'_>, index: u64) -> Result<(), BadFrame> {
    check_lines(frame)?;
    let data = frame.data.as_deref().unwrap_or_default();
    if !data.starts_with('{') {
        // A list would be read as the fields in their order.
        return Err(BadFrame::Data);
    }
    let number = match frame.event {
        "end" => return serde_json::from_str::<End<'_>>(data).map(|_| ()).map_err(|_| BadFrame::Data),
        "result" => serde_json::from_str::<Numbered>(data).map(|result| result.i),
        _ => serde_json::from_str::<Text<'_>>(data).map(|text| text.i),
    };
    if number.map_err(|_| BadFrame::Data)? == index { Ok(()) } else { Err(BadFrame::Number) }
}

fn check_lines(frame: &Frame<'_>) -> Result<(), BadFrame> {
    if frame.raw.contains(&b'\r') {
        return Err(BadFrame::Lines("a line that does not end with LF"));
    }
    if frame.raw.starts_with(BYTE_ORDER_MARK) {
        // Whoever begins to read here passes it over.
        return Err(BadFrame::Lines("a byte order mark"));
    }
    let (mut ids, mut events, mut texts) = (0_u32, 0_u32, 0_u32);
    for line in frame.raw.split(|byte| *byte == b'\n') {
        match line.split(|byte| *byte == b':').next().unwrap_or_default() {
            b"id" => ids += 1,
            b"event" => events += 1,
            b"data" => texts += 1,
            b"retry" => return Err(BadFrame::Lines("a time to reconnect")),
            _ => {}
        }
    }
    if (ids, events, texts) != (1, 1, 1) {
        return Err(BadFrame::Lines("not one id, one event and one data"));
    }
    if !frame.id.is_some_and(is_plain_id) {
        return Err(BadFrame::Lines("an id that is not written as ours"));
    }
    Ok(())
}

/// Whether an id that is one is written as the control plane writes it: clients send it back.
fn is_plain_id(id: &str) -> bool {
    id.rsplit_once(':').is_some_and(|(log, n)| {
        let is_log = log.len() == LOG_ID_BYTES && !log.bytes().any(|b| b.is_ascii_uppercase());
        is_log && n.bytes().all(|b| b.is_ascii_digit()) && (n == "0" || !n.starts_with('0'))
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pool_registry_types::sse::{
        TOKEN_IDS, frame_end, parse_event_id, read_frame, write_comment, write_frame, write_token,
    };
    use pool_registry_types::{AttemptId, Moment, NodeId, PoolId, PoolKey, ReplicaId, TaskId};
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::{Action, Assignment, AttemptDeadlines, HowEnded, Relay, TaskLog};

    const LOG: LogId = LogId(Uuid::from_u128(9));
    const ATTEMPT: AttemptId = AttemptId(Uuid::from_u128(1));

    /// What a client has got: event, data and the id that it would resume with.
    type Got = Vec<(String, String, String)>;

    /// A client's reader, written from the HTML standard (9.2.6) and from nothing of ours. The time to
    /// reconnect is told as an event.
    fn event_source(bytes: &[u8]) -> Got {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        let text = text.replace("\r\n", "\n").replace('\r', "\n");
        let mut lines: Vec<&str> = text.split('\n').collect();
        // What has no end of line is none yet.
        lines.pop();
        let (mut got, mut event, mut data, mut id) =
            (Got::new(), String::new(), String::new(), String::new());
        for line in lines {
            if line.is_empty() {
                let event = std::mem::take(&mut event);
                let data = std::mem::take(&mut data);
                if let Some(data) = data.strip_suffix('\n') {
                    let event = if event.is_empty() { "message".into() } else { event };
                    got.push((event, data.to_owned(), id.clone()));
                }
                continue;
            }
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "event" => event = value.into(),
                "data" => data.push_str(&format!("{value}\n")),
                "id" if !value.contains('\0') => id = value.into(),
                "retry" => got.push(("retry".into(), value.into(), String::new())),
                _ => {}
            }
        }
        got
    }

    /// What a relay has put into its log of these bytes, and whether it has broken the stream off.
    fn relayed(bytes: &[u8]) -> (TaskLog, bool) {
        relayed_in_pieces(&[bytes])
    }

    /// The same of bytes that come one piece after the other.
    fn relayed_in_pieces(pieces: &[&[u8]]) -> (TaskLog, bool) {
        let at = Moment::from_millis;
        let second = Duration::from_secs(1);
        let deadlines =
            AttemptDeadlines { acceptance: second, first_token: second, token_idle: second, silence: second };
        let assignment = Assignment {
            task_id: TaskId(Uuid::from_u128(1)),
            keeps_ids: true,
            attempt: ATTEMPT,
            log: LOG,
            pool: PoolKey::new(NodeId::new("n").unwrap(), PoolId::new("p").unwrap()),
            first_index: 0,
            attempt_number: 1,
            queue_wait_ms: 0,
            warm_replica: None,
            deadlines,
            task_deadline: None,
            stops_overdue: true,
        };
        let mut log = TaskLog::new(LOG);
        log.open(ATTEMPT);
        let mut relay = Relay::new(at(0), assignment);
        relay.accepted(at(0), ReplicaId::new("r").unwrap(), 1);
        for piece in pieces {
            relay.chunk(at(1), piece);
            relay.flush(at(1), |staged| staged.append_to(&mut log));
        }
        let broken = std::iter::from_fn(|| relay.next_action())
            .any(|action| matches!(action, Action::Ended { how: HowEnded::Broken(_), .. }));
        (log, broken)
    }

    /// Whoever reads the log, from wherever, reads frames with their own numbers and one end at most.
    fn assert_read_alike(log: &TaskLog) {
        for from in 0..=log.next_index() {
            let got = event_source(&log.read_from(from, usize::MAX).into_bytes());
            let frames: Vec<_> = got.iter().filter(|(event, ..)| event != "started").collect();
            let mut next = from;
            for (event, data, id) in frames {
                assert!(["token", "reasoning", "result", "end"].contains(&event.as_str()), "{got:?}");
                assert_eq!(*id, format!("{LOG}:{next}"), "{got:?}");
                let data: serde_json::Value = serde_json::from_str(data).expect("one text of JSON");
                if event == "end" {
                    assert!(log.is_finished() && next + 1 == log.next_index(), "{got:?}");
                } else {
                    assert_eq!(data["i"], next, "{got:?}");
                }
                next += 1;
            }
            assert_eq!(next, log.next_index(), "{got:?}");
        }
    }

    // CLOUD-2750
    #[test]
    fn a_frame_that_a_client_would_read_otherwise_ends_its_attempt_and_is_not_passed_on() {
        let token = |n: u64| format!("id: {LOG}:{n}\nevent: token\ndata: {{\"t\":\"x\",\"i\":{n}}}\n\n");
        let end = format!("id: {LOG}:1\nevent: end\ndata: {{\"tokens_out\":1,\"new\":[1]}}\n\n");
        let (log, broken) = relayed(format!("{}{end}", token(0)).as_bytes());
        assert!(!broken && log.is_finished());
        assert_read_alike(&log);
        let of = |data: &str| format!("id: {LOG}:1\nevent: token\ndata: {data}\n\n");
        let bad = [
            token(1).replace('\n', "\r"),
            token(1).replace('\n', "\r\n"),
            format!("id: {LOG}:1\nevent: token\ndata: {{\"t\":\"x\",\rdata: \"i\":1}}\n\n"),
            format!("\u{feff}event: end\n{}", token(1)),
            format!("retry: 1\n{}", token(1)),
            format!("id: {LOG}:7\n{}", token(1)),
            format!("event: end\n{}", token(1)),
            of("{\"t\":\"x\",\ndata: \"i\":1}"),
            token(1).replace(":1\n", ":+1\n"),
            token(1).replace(":1\n", ":01\n"),
            token(1).replace(&LOG.to_string(), &format!("urn:uuid:{LOG}")),
            of("{\"t\":\"x\",\"i\":2}"),
            of("{\"t\":\"x\",\"i\":1,\"i\":2}"),
            of("{\"t\":\"x\"}"),
            of("{\"t\":5,\"i\":1}"),
            of("[\"x\",1]"),
            of("x"),
            of("{\"t\":\"x\",\"i\":1} x"),
            of("{\"t\":\"x\",\"i\":1}")
                .replace("token", "end")
                .replace("{\"t\"", "{\"tokens_out\":\"\",\"t\""),
            of("{\"t\":\"x\",\"i\":3}").replace("token", "result"),
            of("null").replace("token", "end"),
        ];
        for frame in bad {
            // A CR at the end of all bytes may be the half of a line end.
            let (log, broken) = relayed(format!("{}{frame}: ka\n\n", token(0)).as_bytes());
            assert!(broken && log.next_index() == 1, "{frame:?} is passed on");
            assert_read_alike(&log);
        }
        let newer =
            token(1).replace("event", ": a comment\nnewer: x\nevent").replace("\"i\"", "\"n\":{},\"i\"");
        let (log, broken) = relayed(format!("{}{newer}", token(0)).as_bytes());
        assert!(!broken && log.next_index() == 2);
        assert_read_alike(&log);
    }

    /// A piece of a node's stream.
    #[derive(Debug, Clone)]
    enum Piece {
        /// The next frame, or one that came before.
        Token {
            back: u64,
            text: String,
            thought: bool,
        },
        Ids {
            more: u64,
            ids: Vec<u32>,
        },
        Comment(&'static str),
        End,
    }

    /// The bytes of a stream. With a space in the data of its tokens they are not as nodes write them.
    fn stream(pieces: &[Piece], space: &str) -> Vec<u8> {
        let (mut bytes, mut next, mut count) = (Vec::new(), 0_u64, 0_u64);
        for piece in pieces {
            match piece {
                Piece::Token { back, text, thought } => {
                    let index = next.saturating_sub(*back);
                    let event = if *thought { "reasoning" } else { "token" };
                    let frame = String::from_utf8(written(index, event, text)).unwrap();
                    bytes.extend(frame.replacen("data: {", &format!("data: {{{space}"), 1).into_bytes());
                    next = next.max(index + 1);
                }
                Piece::Ids { more, ids } => {
                    count += more;
                    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
                    write_comment(&mut bytes, &format!("{TOKEN_IDS}{count} {}", ids.join(",")));
                }
                Piece::Comment(text) => write_comment(&mut bytes, text),
                Piece::End => {
                    write_frame(&mut bytes, Some((&LOG, next)), "end", "{}");
                    next += 1;
                }
            }
        }
        bytes
    }

    /// One frame of a token with this text, as nodes write it.
    fn written(index: u64, event: &str, text: &str) -> Vec<u8> {
        let mut frame = Vec::new();
        write_token(&mut frame, LOG, index, event, text);
        frame
    }

    // CLOUD-2750
    #[test]
    fn a_token_as_nodes_write_it_is_known_by_its_bytes() {
        let shape = TokenShape::new(LOG);
        for (index, event, text) in
            [(0, "token", "x"), (10, "reasoning", ""), (7, "token", "a\n\"\\ß"), (u64::MAX, "token", "日")]
        {
            let frame = written(index, event, text);
            let followed = [&frame[..], b"id: "].concat();
            assert_eq!(shape.len_at(&followed, index), Some(frame.len()), "{text:?}");
            for len in 0..frame.len() {
                assert_eq!(shape.len_at(&frame[..len], index), None, "{text:?}, {len} bytes");
            }
        }
        // A parser looks at these.
        for other in [written(1, "token", "\u{1}"), written(1, "result", "x"), written(2, "token", "x")] {
            assert_eq!(shape.len_at(&other, 1), None);
        }
        assert_eq!(shape.len_at(&written(1, "token", &"x".repeat(MAX_FRAME_BYTES)), 1), None);
    }

    proptest! {
        // CLOUD-2750
        #[test]
        fn what_is_known_by_its_bytes_is_what_is_found_good_when_it_is_read(
            text in "\\PC{0,6}",
            index in prop_oneof![0_u64..12, any::<u64>()],
            thought in any::<bool>(),
            changes in prop::collection::vec(
                (any::<prop::sample::Index>(), prop_oneof![
                    prop::sample::select(b"\\\"\n\r:0{}x ".to_vec()), any::<u8>(),
                ], 0_u8..3),
                0..3,
            ),
        ) {
            let mut bytes = written(index, if thought { "reasoning" } else { "token" }, &text);
            for (at, byte, how) in changes {
                let at = at.index(bytes.len());
                match how {
                    0 => bytes[at] = byte,
                    1 => bytes.insert(at, byte),
                    _ => { bytes.remove(at); }
                }
            }
            if let Some(len) = TokenShape::new(LOG).len_at(&bytes, index) {
                prop_assert_eq!(frame_end(&bytes, &mut 0), Some(len));
                let frame = read_frame(&bytes[..len]).unwrap();
                prop_assert!(matches!(frame.event, "token" | "reasoning"));
                prop_assert_eq!(frame.id.and_then(parse_event_id), Some((LOG, index)));
                prop_assert_eq!(check(&frame, index), Ok(()));
            }
        }

        // CLOUD-2750
        #[test]
        fn a_stream_becomes_the_same_log_whether_its_tokens_are_known_by_their_bytes_or_read(
            pieces in prop::collection::vec(
                prop_oneof![
                    8 => (0_u64..6, "\\PC{0,4}", any::<bool>()).prop_map(|(back, text, thought)| {
                        Piece::Token { back: back.saturating_sub(4), text, thought }
                    }),
                    2 => (0_u64..3, prop::collection::vec(0_u32..9, 0..3)).prop_map(|(more, ids)| {
                        Piece::Ids { more, ids }
                    }),
                    1 => Just(Piece::Comment("thought")),
                    1 => Just(Piece::Comment("works")),
                    1 => Just(Piece::End),
                ],
                0..12,
            ),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        ) {
            let as_written = stream(&pieces, "");
            let read = stream(&pieces, " ");
            let whole = relayed(&as_written);
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(as_written.len() + 1)).collect();
            at.extend([0, as_written.len()]);
            at.sort_unstable();
            let cut: Vec<&[u8]> = at.windows(2).map(|ends| &as_written[ends[0]..ends[1]]).collect();
            // What comes by itself behind the end is not looked at any more.
            let end = pieces.iter().position(|piece| matches!(piece, Piece::End));
            let ends_last = end.is_none_or(|end| end + 1 == pieces.len());
            for other in std::iter::once(relayed(&read)).chain(ends_last.then(|| relayed_in_pieces(&cut))) {
                prop_assert_eq!(whole.0.next_index(), other.0.next_index());
                prop_assert_eq!(whole.0.is_finished(), other.0.is_finished());
                let ids = |log: &TaskLog| format!("{:?}", log.token_ids());
                prop_assert_eq!(ids(&whole.0), ids(&other.0));
                prop_assert_eq!(whole.0.unlogged(), other.0.unlogged());
                prop_assert_eq!(whole.1, other.1, "broken");
            }
        }

        // CLOUD-2750
        #[test]
        fn whatever_a_node_sends_its_log_is_read_alike_by_every_reader(
            pieces in prop::collection::vec(
                prop_oneof![
                    6 => (0_u64..4).prop_map(|n| format!("id: {LOG}:{n}\n")),
                    6 => Just("event: token\n".to_owned()),
                    2 => Just("event: end\n".to_owned()),
                    6 => (0_u64..4).prop_map(|n| format!("data: {{\"t\":\"x\",\"i\":{n}}}\n")),
                    8 => Just("\n".to_owned()),
                    1 => Just("\r".to_owned()),
                    1 => Just("\u{feff}".to_owned()),
                    1 => Just("retry: 1\n".to_owned()),
                    1 => Just(": ka\n\n".to_owned()),
                    2 => (0_u64..3).prop_map(|n| {
                        format!("id: {LOG}:{n}\nevent: token\ndata: {{\"t\":\"x\",\"i\":{n}}}\n\n")
                    }),
                ],
                0..24,
            ),
        ) {
            assert_read_alike(&relayed(pieces.concat().as_bytes()).0);
        }
    }
}
