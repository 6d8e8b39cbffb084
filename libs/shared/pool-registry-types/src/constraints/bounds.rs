//! The bounds of what an engine compiles, and which of them a text breaks.

/// Longest text, bytes. Source: .specs/01 CLOUD-1210.
pub const MAX_BYTES: usize = 64 * 1024;
/// Deepest nesting of groups and classes, or of objects and arrays. An operator on an operator, as
/// in `a*?+`, is one level too: engines make a rule of each. Source: .specs/01 CLOUD-1210.
pub const MAX_NESTING: usize = 64;
/// Most times in one `{m,n}`; llama.cpp itself takes at most 2,000, or reads more as no limit.
/// Source: .specs/01 CLOUD-1216.
pub(crate) const MAX_TIMES: u64 = 10_000;
/// Most parts of a text with its repetitions written out: a literal, a class or a name is one, and
/// one more for each 16 bytes of it; a rule, a group or an operator is 16. An engine keeps up to 250
/// bytes for a part, so this is 64 MiB of its memory. Source: .specs/01 CLOUD-1216.
pub(crate) const MAX_PARTS: u64 = 256 * 1024;
/// Most ways in which a place of a grammar can begin. With 4,096 of them llama.cpp takes a quarter
/// of a second for a few characters, with 8,192 four seconds. Source: .specs/01 CLOUD-1216.
pub(crate) const MAX_WAYS: u64 = 4096;
/// Most steps there: names that are followed on each of the ways, and ways to go on from each across
/// what may be empty. 360 parts that may be empty, one after another, are as many; llama.cpp takes a
/// quarter of a second for a character of them, and for 1,000 three. Source: .specs/01 CLOUD-1216.
pub(crate) const MAX_STEPS: u64 = 64 * 1024;

/// The bound that a text breaks; the caller puts the field before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintTooLarge {
    #[error("{bytes} bytes long, at most {MAX_BYTES}")]
    Long { bytes: usize },
    #[error("nested {levels} deep, at most {MAX_NESTING}")]
    Nested { levels: usize },
    #[error("repeated {times} times, at most {MAX_TIMES}")]
    Repeated { times: u64 },
    #[error("{parts} parts with its repetitions written out, at most {MAX_PARTS}")]
    Expanded { parts: u64 },
    #[error("a place that can begin in {ways} ways, at most {MAX_WAYS}")]
    Ways { ways: u64 },
    #[error("a place where the next character takes {steps} steps to find, at most {MAX_STEPS}")]
    Steps { steps: u64 },
    #[error("the rule at byte {at} begins with itself after a part that may be empty")]
    LeftRecursive { at: usize },
}
