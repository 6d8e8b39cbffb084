//! Records of a link: the same wherever they are cut, and no more memory than their bounds.

#![no_main]

use attempt_link::records::{
    Content, HEADER_BYTES, MAX_RECORD_BYTES, Parts, Record, RecordDecoder, RecordError,
};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

/// What a reader takes beside the bytes that came: the records as they are listed here.
const BESIDE: usize = 64 * 1024;

fn read(bytes: &[u8], cut: usize) -> (Vec<Record>, Option<RecordError>) {
    let mut decoder = RecordDecoder::new();
    let mut records = Vec::new();
    for piece in bytes.chunks(cut) {
        decoder.push(Bytes::copy_from_slice(piece));
        loop {
            match decoder.next_record() {
                Ok(Some(record)) => records.push(record),
                Ok(None) => break,
                Err(error) => return (records, Some(error)),
            }
        }
        assert!(decoder.held_bytes() <= cut + MAX_RECORD_BYTES + HEADER_BYTES, "more is held than a record");
    }
    (records, None)
}

// The first byte says where the others are cut.
fuzz_target!(|input: &[u8]| {
    let Some((cut, bytes)) = input.split_first() else { return };
    let whole = read(bytes, bytes.len().max(1));
    let (parts, spent) = fuzz::measure(|| read(bytes, usize::from(*cut).max(1)));
    assert_eq!(parts, whole, "cut every {cut} bytes");
    assert!(spent.highest <= 4 * bytes.len() + BESIDE, "{spent:?} for {} bytes", bytes.len());
    let mut joined = Parts::default();
    for record in whole.0 {
        let Ok(record) = joined.join(record) else { return };
        assert!(joined.bytes() <= bytes.len());
        let Some(record) = record else { continue };
        let (_, spent) = fuzz::measure(|| Content::read(&record));
        assert!(spent.highest <= 64 * record.bytes.len() + BESIDE, "{spent:?} for {:?}", record.head);
    }
});
