//! Records: the golden ones of `contracts/examples`, any split, and any bytes.

use std::path::Path;

use attempt_link::content::Position;
use attempt_link::records::{
    Content, HEADER_BYTES, Kind, MAX_PARTS_BYTES, MAX_RECORD_BYTES, MAX_WHOLE_BYTES, PartError, Parts,
    Record, RecordDecoder, RecordError, RecordHead, write_positions, write_token_ids,
};
use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Example {
    name: String,
    kind: Option<String>,
    #[serde(default)]
    more: bool,
    #[serde(default)]
    number: u64,
    #[serde(default)]
    first: u64,
    #[serde(default)]
    count: u32,
    #[serde(default)]
    says: Value,
    hex: String,
}

fn examples(name: &str) -> Vec<Example> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../contracts/examples").join(name);
    let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    serde_json::from_str(&text).unwrap()
}

fn from_hex(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks(2);
    digits.map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap()).collect()
}

fn kind(name: &str) -> Kind {
    let snake = |kind: &Kind| match kind {
        Kind::TokenIds => "token_ids".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    };
    Kind::ALL.into_iter().find(|kind| snake(kind) == name).unwrap()
}

/// All records of these bytes, handed over in one piece.
fn decode(bytes: Vec<u8>) -> Result<Vec<Record>, RecordError> {
    let mut decoder = RecordDecoder::new();
    decoder.push(bytes.into());
    let mut records = Vec::new();
    while let Some(record) = decoder.next_record()? {
        records.push(record);
    }
    Ok(records)
}

fn head(example: &Example) -> RecordHead {
    let kind = kind(example.kind.as_deref().unwrap());
    RecordHead { more: example.more, ..RecordHead::new(kind, example.number, example.first, example.count) }
}

/// What a record says, as the examples write it.
fn says(record: &Record) -> Value {
    match Content::read(record).unwrap() {
        Content::Hello(hello) => json!(hello),
        Content::Accepted(acceptance) => json!(acceptance),
        Content::Refused(error) | Content::Error(error) => json!(error),
        Content::Head(answer) => json!(answer),
        Content::Frames => json!(std::str::from_utf8(&record.bytes).unwrap()),
        Content::TokenIds(frames) => {
            frames.iter().map(|frame| json!({"total": frame.total, "ids": frame.ids})).collect()
        }
        Content::End(end) => json!(end),
        Content::Alive(positions) => json!(positions),
        Content::Bye(bye) => json!(bye),
    }
}

// CLOUD-2600
#[test]
fn every_golden_record_is_read_and_written_as_it_stands() {
    let examples = examples("link/records.json");
    for example in &examples {
        let bytes = from_hex(&example.hex);
        let records = decode(bytes.clone()).unwrap();
        let [record] = records.as_slice() else { panic!("{} is one record", example.name) };
        assert_eq!(record.head, head(example), "{}", example.name);
        if !example.more {
            assert_eq!(says(record), example.says, "{}", example.name);
        }
        let mut body = Vec::new();
        match Content::read(record) {
            Ok(Content::Alive(positions)) => write_positions(&mut body, positions),
            Ok(Content::TokenIds(frames)) => {
                frames.iter().for_each(|frame| write_token_ids(&mut body, frame.total, &frame.ids));
            }
            _ => body.extend_from_slice(&record.bytes),
        }
        let mut written = Vec::new();
        record.head.write_one(&mut written, &body).unwrap();
        assert_eq!(written, bytes, "{}", example.name);
    }
    let kinds = examples.iter().filter_map(|example| example.kind.as_deref()).map(kind);
    assert_eq!(kinds.collect::<std::collections::BTreeSet<_>>().len(), Kind::ALL.len(), "each kind has one");
}

// CLOUD-2602
#[test]
fn what_a_newer_writer_says_beside_what_is_known_changes_nothing() {
    let examples = examples("newer/link_records.json");
    let mut kinds = std::collections::BTreeSet::new();
    for example in &examples {
        let mut bytes = from_hex(&example.hex);
        let next = RecordHead::new(Kind::End, 1, 2, 3);
        next.write_one(&mut bytes, b"{\"report_seq\":1}").unwrap();
        let records = decode(bytes).unwrap();
        assert_eq!(records.last().unwrap().head, next, "{}: what follows is read", example.name);
        let Some(name) = &example.kind else {
            assert_eq!(records.len(), 1, "{}", example.name);
            continue;
        };
        kinds.insert(kind(name));
        assert_eq!(records[0].head, head(example), "{}", example.name);
        assert_eq!(says(&records[0]), example.says, "{}", example.name);
    }
    assert_eq!(kinds.len(), Kind::ALL.len(), "each kind has one");
}

// CLOUD-2601
#[test]
fn a_length_is_checked_as_soon_as_it_is_there_and_before_anything_is_set_aside() {
    let most = u32::try_from(MAX_RECORD_BYTES + HEADER_BYTES - 4).unwrap();
    let cases = [
        (most + 1, Err(RecordError::TooLong(u64::from(most) + 1 - 22))),
        (u32::MAX, Err(RecordError::TooLong(u64::from(u32::MAX) - 22))),
        (21, Err(RecordError::TooShort)),
        (0, Err(RecordError::TooShort)),
        (22, Ok(None)),
        (most, Ok(None)),
    ];
    for (length, expected) in cases {
        let mut decoder = RecordDecoder::new();
        decoder.push(length.to_be_bytes().to_vec().into());
        assert_eq!(decoder.next_record(), expected, "{length}");
        decoder.push(vec![0; 64].into());
        if expected.is_err() {
            assert_eq!(decoder.next_record(), expected, "an error stays");
            assert_eq!(decoder.held_bytes(), 0);
        }
    }
}

// CLOUD-2601
#[test]
fn a_record_that_lies_in_one_piece_is_a_slice_of_it() {
    let mut written = Vec::new();
    RecordHead::new(Kind::Frames, 1, 0, 1).write_one(&mut written, b"first").unwrap();
    RecordHead::new(Kind::Frames, 1, 1, 1).write_one(&mut written, b"second").unwrap();
    let piece = Bytes::from(written);
    let mut decoder = RecordDecoder::new();
    decoder.push(piece.clone());
    for _ in 0..2 {
        let record = decoder.next_record().unwrap().unwrap();
        let range = piece.as_ptr_range();
        assert!(range.contains(&record.bytes.as_ptr()), "it shares the piece");
    }
}

fn part(number: u64, first: u64, more: bool, bytes: &[u8]) -> Record {
    let head = RecordHead { more, ..RecordHead::new(Kind::Frames, number, first, 1) };
    Record { head, bytes: Bytes::copy_from_slice(bytes) }
}

// CLOUD-2603
#[test]
fn parts_are_joined_with_records_of_others_between_them_and_go_with_their_number() {
    let mut parts = Parts::default();
    assert_eq!(parts.join(part(1, 5, true, b"ab")), Ok(None));
    assert_eq!(parts.join(part(2, 0, true, b"xy")), Ok(None));
    assert_eq!(parts.join(part(3, 0, false, b"whole")), Ok(Some(part(3, 0, false, b"whole"))));
    assert_eq!(parts.join(part(1, 5, false, b"c")), Ok(Some(part(1, 5, false, b"abc"))));
    assert_eq!(parts.bytes(), 2);
    parts.forget(2);
    assert_eq!(parts.bytes(), 0);
    assert_eq!(
        parts.join(part(2, 0, false, b"z")),
        Ok(Some(part(2, 0, false, b"z"))),
        "nothing of it is left"
    );
}

// CLOUD-2603
#[test]
fn parts_that_do_not_belong_together_or_are_too_long_end_the_link() {
    let mut parts = Parts::default();
    parts.join(part(1, 5, true, b"ab")).unwrap();
    assert_eq!(parts.join(part(1, 6, false, b"c")), Err(PartError::Mixed));
    let piece = vec![0; MAX_RECORD_BYTES];
    let mut parts = Parts::default();
    for _ in 0..MAX_WHOLE_BYTES / MAX_RECORD_BYTES {
        parts.join(part(1, 0, true, &piece)).unwrap();
    }
    assert_eq!(parts.join(part(1, 0, true, b"x")), Err(PartError::TooLong));
    let mut parts = Parts::default();
    let mut at = 0;
    let error = loop {
        at += 1;
        if let Err(error) = parts.join(part(at % 16, 0, true, &piece)) {
            break error;
        }
    };
    assert_eq!((error, parts.bytes()), (PartError::TooMuch, MAX_PARTS_BYTES));
    let mut parts = Parts::default();
    for number in 0..64 {
        parts.join(part(number, 0, true, b"")).unwrap();
    }
    assert_eq!(parts.join(part(64, 0, true, b"")), Err(PartError::TooMany), "they take memory without bytes");
    parts.join(part(63, 0, false, b"")).unwrap();
    parts.join(part(64, 0, true, b"")).unwrap();
}

fn record() -> impl Strategy<Value = (RecordHead, Vec<u8>)> {
    let kinds = proptest::sample::select(Kind::ALL.to_vec());
    let bytes = prop_oneof![8 => vec(any::<u8>(), 0..80), 1 => vec(any::<u8>(), 0..MAX_RECORD_BYTES)];
    (kinds, any::<bool>(), any::<u64>(), any::<u64>(), any::<u32>(), bytes).prop_map(
        |(kind, more, number, first, count, bytes)| {
            (RecordHead { more, ..RecordHead::new(kind, number, first, count) }, bytes)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    // CLOUD-2601
    #[test]
    fn records_are_the_same_wherever_their_bytes_are_cut(
        records in vec(record(), 1..8), cuts in vec(1_usize..70_000, 1..12)
    ) {
        let mut written = Vec::new();
        for (head, bytes) in &records {
            head.write_one(&mut written, bytes).unwrap();
        }
        let mut decoder = RecordDecoder::new();
        let mut read = Vec::new();
        let mut rest = Bytes::from(written);
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let piece = rest.split_to((*cuts.next().unwrap()).min(rest.len()));
            let most = piece.len() + MAX_RECORD_BYTES + HEADER_BYTES;
            decoder.push(piece);
            prop_assert!(decoder.held_bytes() <= most, "{} bytes are held", decoder.held_bytes());
            while let Some(record) = decoder.next_record().unwrap() {
                read.push((record.head, record.bytes.to_vec()));
            }
        }
        prop_assert_eq!(read, records);
        prop_assert_eq!(decoder.held_bytes(), 0);
    }

    // CLOUD-2601
    #[test]
    fn no_bytes_bring_a_reader_down(bytes in vec(any::<u8>(), 0..400), zeros in any::<bool>()) {
        // A length that can be, so that what is behind it is looked at.
        let mut input = if zeros { vec![0, 0, 0] } else { Vec::new() };
        input.extend_from_slice(&bytes);
        let mut parts = Parts::default();
        for record in decode(input).unwrap_or_default() {
            if let Ok(Some(whole)) = parts.join(record) {
                let _ = Content::read(&whole);
            }
            prop_assert!(parts.bytes() <= bytes.len());
        }
    }

    // CLOUD-2600
    #[test]
    fn what_is_written_in_parts_is_joined_to_the_same(
        bytes in vec(any::<u8>(), 0..5_000), most in 1_usize..2_000
    ) {
        let head = RecordHead::new(Kind::Frames, 4, 9, 1);
        let mut written = Vec::new();
        head.write(&mut written, &bytes, most).unwrap();
        let mut parts = Parts::default();
        let mut wholes = Vec::new();
        for record in decode(written).unwrap() {
            prop_assert!(record.bytes.len() <= most);
            wholes.extend(parts.join(record).unwrap());
        }
        prop_assert_eq!(wholes, [Record { head, bytes: bytes.into() }]);
    }

    // CLOUD-2600
    #[test]
    fn positions_and_token_ids_are_read_as_they_were_written(
        positions in vec((any::<u64>(), any::<u64>()), 0..50), frames in vec((any::<u32>(), vec(any::<u32>(), 0..5)), 0..20)
    ) {
        let positions: Vec<_> = positions.into_iter().map(|(number, next)| Position { number, next }).collect();
        let mut bytes = Vec::new();
        write_positions(&mut bytes, positions.iter().copied());
        let count = u32::try_from(positions.len()).unwrap();
        let record = Record { head: RecordHead::new(Kind::Alive, 0, 0, count), bytes: bytes.into() };
        prop_assert_eq!(Content::read(&record).unwrap(), Content::Alive(positions));
        let mut bytes = Vec::new();
        frames.iter().for_each(|(total, ids)| write_token_ids(&mut bytes, *total, ids));
        let count = u32::try_from(frames.len()).unwrap();
        let record = Record { head: RecordHead::new(Kind::TokenIds, 1, 0, count), bytes: bytes.into() };
        let Content::TokenIds(read) = Content::read(&record).unwrap() else { panic!("they are ids") };
        prop_assert_eq!(read.into_iter().map(|frame| (frame.total, frame.ids)).collect::<Vec<_>>(), frames);
    }
}
