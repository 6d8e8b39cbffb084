//! A log whose stream is generated again: what of the second attempt stands in it.

use pool_registry_types::LogId;
use uuid::Uuid;

use super::*;

/// Knows bytes as they come; a stream with a `!` is none that can be made again.
#[derive(Debug, Default)]
struct Plain {
    passed: Vec<u8>,
    at: Option<usize>,
    is_impossible: bool,
}

impl StreamComparer for Plain {
    fn passed(&mut self, events: &Bytes) {
        self.is_impossible |= events.contains(&b'!');
        self.passed.extend_from_slice(events);
    }

    fn may_begin(&self) -> bool {
        self.at.is_none() && !self.is_impossible
    }

    fn begin(&mut self) {
        self.at = Some(0);
    }

    fn compare(&mut self, events: &Bytes) -> Result<Bytes, &'static str> {
        let at = self.at.as_mut().expect("it has begun");
        let left = &self.passed[(*at).min(self.passed.len())..];
        let known = left.len().min(events.len());
        *at += events.len();
        if left[..known] == events[..known] { Ok(events.slice(known..)) } else { Err("other bytes") }
    }

    fn has_caught_up(&self) -> bool {
        self.at.is_some_and(|at| at > self.passed.len())
    }

    fn len_bytes(&self) -> usize {
        self.passed.len()
    }
}

fn attempt(n: u128) -> AttemptId {
    AttemptId(Uuid::from_u128(n))
}

fn log() -> TaskLog {
    let mut log = TaskLog::new(LogId(Uuid::from_u128(9)));
    log.compare_with(Box::new(Plain::default()));
    log
}

/// Hands a piece over as a relay does.
fn pass(log: &mut TaskLog, n: u128, bytes: &'static [u8]) -> Result<(), AppendError> {
    let piece = Segment::frame(log.next_index(), Bytes::from_static(bytes));
    let Some(piece) = log.compared(attempt(n), piece)? else { return Ok(()) };
    if bytes.is_empty() { log.finish(attempt(n), piece) } else { log.append(attempt(n), piece) }
}

fn text(log: &TaskLog) -> Vec<u8> {
    log.read_from(0, usize::MAX).into_bytes().to_vec()
}

fn head(kind: &str, status: u16) -> AnswerHead {
    AnswerHead { status, headers: vec![("content-type".into(), kind.into())] }
}

// CLOUD-2862
// CLOUD-2867
#[test]
fn a_second_attempt_stands_in_the_log_from_where_it_is_new_and_what_is_compared_counts_until_the_end() {
    let mut log = log();
    let empty = log.len_bytes();
    log.open(attempt(1));
    assert!(!log.is_catching_up());
    pass(&mut log, 1, b"ab").unwrap();
    pass(&mut log, 1, b"c").unwrap();
    assert!(!log.is_catching_up(), "its first attempt runs");
    let with_both = log.len_bytes();
    assert_eq!(log.fence(attempt(1)).tokens_written, 2);
    assert!(log.is_catching_up(), "an attempt is awaited");
    log.open(attempt(2));
    assert_eq!(pass(&mut log, 1, b"d"), Err(AppendError::Fenced));
    pass(&mut log, 2, b"a").unwrap();
    assert!(log.is_catching_up() && log.next_index() == 2);
    pass(&mut log, 2, b"bcde").unwrap();
    assert!(!log.is_catching_up());
    pass(&mut log, 2, b"f").unwrap();
    assert_eq!((text(&log), log.next_index()), (b"abcdef".to_vec(), 4));
    pass(&mut log, 2, b"").unwrap();
    assert!(log.is_finished() && !log.is_catching_up());
    assert!(with_both > empty + 6, "the text counts twice: {with_both}");
    assert!(log.len_bytes() < with_both, "nothing is compared any more");
}

// CLOUD-2863
#[test]
fn what_differs_or_ends_too_soon_or_comes_a_third_time_is_no_part_of_the_log() {
    let begun = || {
        let mut log = log();
        log.open(attempt(1));
        pass(&mut log, 1, b"abc").unwrap();
        log.fence(attempt(1));
        log.open(attempt(2));
        log
    };
    let mut other = begun();
    assert_eq!(pass(&mut other, 2, b"abd"), Err(AppendError::Differs("other bytes")));
    let mut short = begun();
    pass(&mut short, 2, b"ab").unwrap();
    assert_eq!(pass(&mut short, 2, b""), Err(SHORTER));
    let mut third = begun();
    assert!(!third.cannot_be_repeated());
    pass(&mut third, 2, b"ab").unwrap();
    assert!(third.cannot_be_repeated());
    third.fence(attempt(2));
    third.open(attempt(3));
    assert!(matches!(pass(&mut third, 3, b"ab"), Err(AppendError::Differs(_))));
    for log in [other, short, third] {
        assert_eq!((text(&log), log.is_finished()), (b"abc".to_vec(), false));
    }
}

// CLOUD-2863
#[test]
fn an_attempt_that_is_answered_with_no_stream_differs_and_the_first_head_stays() {
    let mut log = log();
    log.open(attempt(1));
    assert_eq!(log.check_head(attempt(1), &head("application/json", 400)), Ok(()), "nothing was sent");
    pass(&mut log, 1, b"abc").unwrap();
    log.fence(attempt(1));
    log.open(attempt(2));
    for wrong in [head("application/json", 200), head("text/event-stream", 503)] {
        assert!(matches!(log.check_head(attempt(2), &wrong), Err(AppendError::Differs(_))), "{wrong:?}");
    }
    assert_eq!(log.check_head(attempt(2), &head("text/event-stream", 200)), Ok(()));
}

#[test]
fn an_attempt_before_anything_was_sent_is_the_first_one_whatever_its_number() {
    let mut log = log();
    log.open(attempt(1));
    log.fence(attempt(1));
    assert!(!log.is_catching_up());
    log.open(attempt(2));
    pass(&mut log, 2, b"a!").unwrap();
    assert!(log.cannot_be_repeated());
    pass(&mut log, 2, b"").unwrap();
    assert_eq!(text(&log), b"a!");
}
