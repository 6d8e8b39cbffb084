//! Frames of HTTP/2 as bytes (RFC 9113), with heads as HPACK writes them without a table (RFC 7541).

/// What a client begins a connection with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The types of frames that floods are made of.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Data = 0,
    Headers = 1,
    Reset = 3,
    Settings = 4,
    Ping = 6,
    Continuation = 9,
}

/// Bits of a frame's flags.
pub(super) struct Flags;

impl Flags {
    pub(super) const END_STREAM: u8 = 1;
    pub(super) const END_HEADERS: u8 = 4;
}

pub(super) fn frame(kind: Kind, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("payloads are short").to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind as u8, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// The beginning of a connection, with these settings.
pub(super) fn begin(settings: &[u8]) -> Vec<u8> {
    [PREFACE.to_vec(), frame(Kind::Settings, 0, 0, settings)].concat()
}

/// The head of a request.
pub(super) fn head(method: &str, path: &str, token: &str) -> Vec<u8> {
    // Of the static table, whole: :scheme http, and the method.
    let mut head = vec![0x86, if method == "GET" { 0x82 } else { 0x83 }];
    let mut literal = |name: &[u8], value: &str| {
        let length = u8::try_from(value.len()).ok().filter(|length| *length < 127);
        head.extend_from_slice(name);
        head.push(length.expect("values are short"));
        head.extend_from_slice(value.as_bytes());
    };
    // Names of the static table: :path, :authority, authorization (23 = 15 + 8).
    literal(&[0x04], path);
    literal(&[0x01], "localhost");
    literal(&[0x0f, 0x08], &format!("Bearer {token}"));
    head
}
