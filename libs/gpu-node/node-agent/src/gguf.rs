//! The header of a GGUF file: what a model says of itself, without its weights.
//!
//! The file may be hostile or cut off: nothing is allocated that was not read, what is kept is
//! bounded, and what is not kept (a tokenizer's words, a whole tokenizer as one text) is passed over,
//! whatever its length. Source of the format: the GGUF specification, versions 2 and 3, little endian.

use std::io::{self, Read};

/// Most entries of a header.
const MAX_ENTRIES: u64 = 65_536;
/// Most members of arrays that are passed over one by one: words, and arrays in arrays.
const MAX_MEMBERS: u64 = 1 << 26;
/// Longest name of an entry, and longest text that is kept, bytes.
const MAX_TEXT: u64 = 64 * 1024;
/// How deep arrays of arrays may go.
const MAX_DEPTH: u32 = 4;
/// What an engine takes beside weights and cache: its own buffers, in parts of a hundred of
/// the weights, and at least so many bytes. Measured on llama.cpp.
const OVERHEAD_PERCENT: u64 = 10;
const OVERHEAD_LEAST: u64 = 128 * 1024 * 1024;

/// Why a file is no model that llama.cpp could load.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    #[error("it is not a GGUF file: it begins with {0:?}")]
    Magic([u8; 4]),
    #[error("its GGUF version {0} is not known here (2 and 3 are)")]
    Version(u32),
    #[error("it ends within its header, at byte {0}: it is truncated")]
    Truncated(u64),
    #[error("its header is out of bounds at byte {at}: {what}")]
    Bounds { at: u64, what: &'static str },
    #[error("it cannot be read")]
    Read(#[source] io::Error),
}

/// What matters of a header.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GgufHeader {
    pub version: u32,
    pub tensors: u64,
    pub architecture: Option<String>,
    pub name: Option<String>,
    /// As `general.file_type` says: `Q4_K_M`, `F16`; a number where it is a newer one.
    pub quantisation: Option<String>,
    /// Tokens that the model was trained for.
    pub context_length: Option<u64>,
    pub block_count: Option<u64>,
    pub embedding_length: Option<u64>,
    pub head_count: Option<u64>,
    pub head_count_kv: Option<u64>,
    pub key_length: Option<u64>,
    pub value_length: Option<u64>,
    /// Files that the model is split into, where it is: `split.count`.
    pub parts: Option<u64>,
    /// What `general.type` says: `model`, `mmproj`, `adapter`.
    pub kind: Option<String>,
}

struct Reader<R> {
    from: R,
    at: u64,
    /// Members of arrays that were passed over one by one.
    members: u64,
}

enum Value {
    Number(u64),
    Text(String),
    Other,
}

impl<R: Read> Reader<R> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), GgufError> {
        match self.from.read_exact(bytes) {
            Ok(()) => {
                self.at += bytes.len() as u64;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(GgufError::Truncated(self.at)),
            Err(error) => Err(GgufError::Read(error)),
        }
    }

    fn bounds(&self, what: &'static str) -> GgufError {
        GgufError::Bounds { at: self.at, what }
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn skip(&mut self, count: u64) -> Result<(), GgufError> {
        let skipped =
            io::copy(&mut (&mut self.from).take(count), &mut io::sink()).map_err(GgufError::Read)?;
        self.at += skipped;
        if skipped < count { Err(GgufError::Truncated(self.at)) } else { Ok(()) }
    }

    fn text(&mut self) -> Result<String, GgufError> {
        let length = self.u64()?;
        if length > MAX_TEXT {
            return Err(self.bounds("a text is too long"));
        }
        // At most MAX_TEXT, whatever follows.
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        self.fill(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Reads a value of the type, or passes over it where it is not to be kept.
    fn value(&mut self, kind: u32, keep: bool, depth: u32) -> Result<Value, GgufError> {
        Ok(match kind {
            0 | 7 => Value::Number(u64::from(self.bytes::<1>()?[0])),
            2 => Value::Number(u64::from(u16::from_le_bytes(self.bytes()?))),
            4 => Value::Number(u64::from(self.u32()?)),
            5 => match u64::try_from(i32::from_le_bytes(self.bytes()?)) {
                Ok(number) => Value::Number(number),
                Err(_) => Value::Other,
            },
            10 => Value::Number(self.u64()?),
            11 => match u64::try_from(i64::from_le_bytes(self.bytes()?)) {
                Ok(number) => Value::Number(number),
                Err(_) => Value::Other,
            },
            8 if keep => Value::Text(self.text()?),
            8 => {
                let length = self.u64()?;
                self.skip(length)?;
                Value::Other
            }
            9 => self.array(keep, depth)?,
            other => {
                let width = width(other).ok_or_else(|| self.bounds("a type that is not known"))?;
                self.skip(width)?;
                Value::Other
            }
        })
    }

    /// Of an array only the largest number is kept: layers may differ in their heads.
    fn array(&mut self, keep: bool, depth: u32) -> Result<Value, GgufError> {
        if depth >= MAX_DEPTH {
            return Err(self.bounds("arrays go too deep"));
        }
        let kind = self.u32()?;
        let count = self.u64()?;
        if let Some(width) = width(kind)
            && !(keep && matches!(kind, 4 | 5))
        {
            let bytes = count.checked_mul(width).ok_or_else(|| self.bounds("an array is too long"))?;
            self.skip(bytes)?;
            return Ok(Value::Other);
        }
        let mut largest = None;
        for _ in 0..count {
            self.members += 1;
            if self.members > MAX_MEMBERS {
                return Err(self.bounds("its arrays have too many members"));
            }
            // A text among them is a word of a tokenizer.
            if let Value::Number(number) = self.value(kind, keep && kind != 8, depth + 1)? {
                largest = largest.max(Some(number));
            }
        }
        Ok(largest.map_or(Value::Other, Value::Number))
    }
}

/// Whether the entry is one that [`GgufHeader::take`] knows.
fn is_kept(key: &str) -> bool {
    let general = ["general.architecture", "general.name", "general.type"];
    let of_layers = ["attention.head_count", "attention.head_count_kv"];
    general.contains(&key) || key.split_once('.').is_some_and(|(_, of)| of_layers.contains(&of))
}

/// Bytes of a value of a type of fixed width.
fn width(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// The name of a `general.file_type`.
fn quantisation(number: u64) -> String {
    let name = match number {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        7 => "Q8_0",
        8 => "Q5_0",
        9 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K_S",
        12 => "Q3_K_M",
        13 => "Q3_K_L",
        14 => "Q4_K_S",
        15 => "Q4_K_M",
        16 => "Q5_K_S",
        17 => "Q5_K_M",
        18 => "Q6_K",
        32 => "BF16",
        other => return format!("type {other}"),
    };
    name.to_owned()
}

impl GgufHeader {
    pub fn read(from: impl Read) -> Result<Self, GgufError> {
        let mut reader = Reader { from, at: 0, members: 0 };
        let magic = reader.bytes()?;
        if &magic != b"GGUF" {
            return Err(GgufError::Magic(magic));
        }
        let version = reader.u32()?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version(version));
        }
        let tensors = reader.u64()?;
        let entries = reader.u64()?;
        if entries > MAX_ENTRIES {
            return Err(reader.bounds("there are too many entries"));
        }
        let mut header = Self { version, tensors, ..Self::default() };
        for _ in 0..entries {
            let key = reader.text()?;
            let kind = reader.u32()?;
            let value = reader.value(kind, is_kept(&key), 0)?;
            header.take(&key, value);
        }
        Ok(header)
    }

    fn take(&mut self, key: &str, value: Value) {
        match (key, value) {
            ("general.architecture", Value::Text(text)) => self.architecture = Some(text),
            ("general.name", Value::Text(text)) => self.name = Some(text),
            ("general.type", Value::Text(text)) => self.kind = Some(text),
            ("general.file_type", Value::Number(number)) => self.quantisation = Some(quantisation(number)),
            ("split.count", Value::Number(number)) => self.parts = Some(number).filter(|parts| *parts > 1),
            (key, Value::Number(number)) => {
                let Some((_, of)) = key.split_once('.') else { return };
                let place = match of {
                    "context_length" => &mut self.context_length,
                    "block_count" => &mut self.block_count,
                    "embedding_length" => &mut self.embedding_length,
                    "attention.head_count" => &mut self.head_count,
                    "attention.head_count_kv" => &mut self.head_count_kv,
                    "attention.key_length" => &mut self.key_length,
                    "attention.value_length" => &mut self.value_length,
                    _ => return,
                };
                *place = Some(number);
            }
            _ => {}
        }
    }

    /// Whether it is a projector, which goes beside a model that sees or hears and is none itself.
    pub(crate) fn is_projector(&self) -> bool {
        self.kind.as_deref() == Some("mmproj") || self.architecture.as_deref() == Some("clip")
    }

    /// Tokens that the model was trained for, where it says so.
    pub fn context(&self) -> Option<u32> {
        self.context_length.and_then(|tokens| u32::try_from(tokens).ok()).filter(|tokens| *tokens > 0)
    }

    /// Bytes of the cache for so many tokens, keys and values in 16 bits:
    /// layers × tokens × heads of keys and values × (length of a key + of a value) × 2. Absent where
    /// the header does not say; what is more than a number holds is the largest number, not nothing.
    pub(crate) fn kv_cache_bytes(&self, tokens: u64) -> Option<u64> {
        let heads = self.head_count_kv.or(self.head_count)?;
        let of_head = || self.embedding_length?.checked_div(self.head_count?);
        let key = self.key_length.or_else(of_head)?;
        let value = self.value_length.or_else(of_head)?;
        let of_layer = heads.saturating_mul(key.saturating_add(value)).saturating_mul(2);
        Some(self.block_count?.saturating_mul(of_layer).saturating_mul(tokens))
    }
}

/// Bytes that an engine takes: the file, the cache for all of its tokens, and a tenth of the file
/// or 128 MiB for its own buffers, whichever is more.
pub fn estimate_bytes(file_bytes: u64, header: &GgufHeader, tokens: u64) -> u64 {
    let overhead = (file_bytes / 100 * OVERHEAD_PERCENT).max(OVERHEAD_LEAST);
    file_bytes.saturating_add(header.kv_cache_bytes(tokens).unwrap_or(0)).saturating_add(overhead)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    fn small() -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend(7_u64.to_le_bytes());
        out.extend(9_u64.to_le_bytes());
        for (key, value) in [("general.architecture", "llama"), ("general.name", "small")] {
            text(&mut out, key);
            out.extend(8_u32.to_le_bytes());
            text(&mut out, value);
        }
        let numbers = [
            ("general.file_type", 15_u32),
            ("llama.context_length", 2048),
            ("llama.block_count", 4),
            ("llama.embedding_length", 64),
            ("llama.attention.head_count", 8),
            ("llama.attention.head_count_kv", 2),
        ];
        for (key, value) in numbers {
            text(&mut out, key);
            out.extend(4_u32.to_le_bytes());
            out.extend(value.to_le_bytes());
        }
        text(&mut out, "tokenizer.ggml.tokens");
        out.extend(9_u32.to_le_bytes());
        out.extend(8_u32.to_le_bytes());
        out.extend(2_u64.to_le_bytes());
        text(&mut out, "once");
        text(&mut out, "upon");
        out
    }

    // CLOUD-2460
    #[test]
    fn a_header_says_architecture_context_and_quantisation() {
        let header = GgufHeader::read(small().as_slice()).unwrap();
        assert_eq!(
            (header.architecture.as_deref(), header.quantisation.as_deref()),
            (Some("llama"), Some("Q4_K_M"))
        );
        assert_eq!((header.context(), header.tensors), (Some(2048), 7));
        // 4 layers × 2 heads × (8 + 8) × 2 bytes, for each of 10 tokens.
        assert_eq!(header.kv_cache_bytes(10), Some(4 * 2 * 16 * 2 * 10));
        assert_eq!(estimate_bytes(1_000, &header, 0), 1_000 + OVERHEAD_LEAST);
        let absurd = GgufHeader { block_count: Some(u64::MAX), ..header };
        assert_eq!(estimate_bytes(1_000, &absurd, 10), u64::MAX);
    }

    // CLOUD-2461
    #[test]
    fn a_header_that_ends_anywhere_is_truncated_and_says_where() {
        let whole = small();
        for length in 0..whole.len() {
            let error = GgufHeader::read(&whole[..length]).unwrap_err();
            assert!(matches!(error, GgufError::Truncated(at) if at <= length as u64), "{length}: {error}");
        }
        let error = GgufHeader::read(&b"<html>"[..]).unwrap_err();
        assert!(matches!(error, GgufError::Magic(_)));
        let mut newer = whole.clone();
        newer[4] = 9;
        assert!(matches!(GgufHeader::read(newer.as_slice()), Err(GgufError::Version(9))));
        let mut long = whole;
        long[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(GgufHeader::read(long.as_slice()), Err(GgufError::Bounds { .. })));
    }

    fn of(entries: &[(&str, u32, Vec<u8>)]) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(0_u64.to_le_bytes());
        out.extend((entries.len() as u64).to_le_bytes());
        for (key, kind, value) in entries {
            text(&mut out, key);
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        out
    }

    // CLOUD-2460
    #[test]
    fn what_is_not_kept_is_passed_over_whatever_its_length_and_parts_and_projectors_say_so() {
        let mut long = Vec::new();
        text(&mut long, &"x".repeat(70 * 1024 * 1024));
        let mut clip = Vec::new();
        text(&mut clip, "clip");
        let numbers = [9_u32.to_le_bytes().as_slice(), &2_u64.to_le_bytes(), &[0; 9]].concat();
        let whole = of(&[
            ("tokenizer.huggingface.json", 8, long.clone()),
            ("split.count", 2, 3_u16.to_le_bytes().to_vec()),
            ("general.architecture", 8, clip),
        ]);
        let header = GgufHeader::read(whole.as_slice()).unwrap();
        assert_eq!((header.parts, header.is_projector()), (Some(3), true));
        assert!(matches!(GgufHeader::read(&whole[..1_000_000]), Err(GgufError::Truncated(1_000_000))));
        let one = of(&[("split.count", 2, 1_u16.to_le_bytes().to_vec())]);
        assert_eq!(GgufHeader::read(one.as_slice()).unwrap().parts, None);
        // What is kept has a bound, and so have arrays that are walked.
        assert!(matches!(
            GgufHeader::read(of(&[("general.name", 8, long)]).as_slice()),
            Err(GgufError::Bounds { .. })
        ));
        assert!(GgufHeader::read(of(&[("a.b", 9, numbers)]).as_slice()).is_err());
    }

    proptest! {
        // CLOUD-2461
        #[test]
        fn no_bytes_bring_the_reader_down(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), at in 24_usize..200) {
            let mut hostile = small();
            let at = at.min(hostile.len());
            hostile.truncate(at);
            hostile.append(&mut bytes);
            let _ = GgufHeader::read(hostile.as_slice());
        }
    }
}
