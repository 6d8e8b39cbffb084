//! Bounds on the texts that engines compile: grammars, JSON schemas, regular expressions, stop lists.
//!
//! Engines read these by recursion and write repetitions out, so a short text can exhaust their
//! stack or their memory. The one idea needed to read this: a text is not parsed, it is measured, in
//! one pass over its bytes with a fixed amount of memory. What nests is counted, and so is how long
//! the text would be with every `{m,n}` written out. A text that an engine reads in another way than
//! it is read here is one that the engine refuses by itself, as it refuses an unclosed bracket.
//! Only of a grammar that is within these bounds it is then measured what its rules refer to, with
//! memory for a table of them (`ways`).
//!
//! Not known here: whether a text is valid, and which engine gets it.

mod bounds;
mod ways;

use std::slice::Iter;

pub use bounds::{ConstraintTooLarge, MAX_BYTES, MAX_NESTING};
pub(crate) use bounds::{MAX_PARTS, MAX_TIMES};
use ways::is_name;

/// What an engine makes a rule of: it recurses over them, and 16,384 fit into its stack.
const RULE_PARTS: u64 = 16;
const BYTES_OF_A_PART: usize = 16;
/// Longest word of a JSON schema that means something here, bytes.
const LONGEST_WORD: usize = 16;

/// How a text is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodingConstraint {
    /// GBNF, or what vLLM takes for it. Between `"…"`, in `[…]` and after `#` brackets mean nothing.
    Grammar,
    /// JSON, also a larger value that holds schemas, such as a list of tools.
    JsonSchema,
    Regex,
    /// Texts, which have a length only.
    StopList,
}

/// Holds a text against the bounds. Any bytes may come.
pub fn check(kind: DecodingConstraint, text: &[u8]) -> Result<(), ConstraintTooLarge> {
    if text.len() > MAX_BYTES {
        return Err(ConstraintTooLarge::Long { bytes: text.len() });
    }
    match kind {
        DecodingConstraint::Grammar => grammar(text.iter().copied()),
        DecodingConstraint::Regex => regex(text.iter().copied()),
        DecodingConstraint::JsonSchema => json(text),
        DecodingConstraint::StopList => Ok(()),
    }
}

/// The same for a field of a body as it came: `value` is the raw JSON. A grammar or a regular
/// expression is what its string stands for; another value there is bounded as JSON.
pub fn check_json(kind: DecodingConstraint, value: &[u8]) -> Result<(), ConstraintTooLarge> {
    let mut bytes = value.trim_ascii_start().iter();
    match (kind, bytes.next()) {
        (DecodingConstraint::Grammar, Some(b'"')) => grammar(Unescaped::of(&mut bytes)),
        (DecodingConstraint::Regex, Some(b'"')) => regex(Unescaped::of(&mut bytes)),
        _ => check(DecodingConstraint::JsonSchema, value),
    }
}

fn grammar(text: impl Iterator<Item = u8>) -> Result<(), ConstraintTooLarge> {
    let (mut grammar, mut kept) = (Grammar::new(), Vec::new());
    let keep = |byte| {
        grammar.feed(byte);
        if kept.len() < MAX_BYTES {
            kept.push(byte);
        }
    };
    feed(text, keep)?;
    grammar.shape.check()?;
    ways::check(&kept)
}

fn regex(text: impl Iterator<Item = u8>) -> Result<(), ConstraintTooLarge> {
    let mut regex = Regex::new();
    feed(text, |byte| regex.feed(byte))?;
    regex.shape.check()
}

/// Hands the bytes on, and holds their number against its bound.
fn feed(text: impl Iterator<Item = u8>, mut to: impl FnMut(u8)) -> Result<(), ConstraintTooLarge> {
    let mut bytes = 0_usize;
    for byte in text {
        to(byte);
        bytes += 1;
    }
    if bytes > MAX_BYTES { Err(ConstraintTooLarge::Long { bytes }) } else { Ok(()) }
}

fn bounded(levels: usize, times: u64, parts: u64) -> Result<(), ConstraintTooLarge> {
    if levels > MAX_NESTING {
        Err(ConstraintTooLarge::Nested { levels })
    } else if times > MAX_TIMES {
        Err(ConstraintTooLarge::Repeated { times })
    } else if parts > MAX_PARTS {
        Err(ConstraintTooLarge::Expanded { parts })
    } else {
        Ok(())
    }
}

/// What an operator applies to, or the sum of a group that is not closed yet.
#[derive(Debug, Clone, Copy, Default)]
struct Item {
    parts: u64,
    bytes: usize,
    /// Levels within it.
    height: usize,
    repeated: bool,
}

/// The `{m,n}` that is being read.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    number: u64,
    largest: u64,
}

/// The measures of a text, as far as it was read.
struct Shape {
    /// Groups that are open.
    depth: usize,
    /// The most that `depth` and the height of an item came to.
    levels: usize,
    times: u64,
    /// The text itself and the open groups in it; those beyond the bound share the last place.
    groups: [Item; MAX_NESTING + 1],
    item: Item,
    count: Option<Count>,
}

impl Shape {
    fn new() -> Self {
        let groups = [Item::default(); MAX_NESTING + 1];
        Self { depth: 0, levels: 0, times: 0, groups, item: Item::default(), count: None }
    }

    fn group(&mut self) -> &mut Item {
        &mut self.groups[self.depth.min(MAX_NESTING)]
    }

    /// No operator applies to the item any more.
    fn end_item(&mut self) {
        let item = std::mem::take(&mut self.item);
        let group = self.group();
        group.parts = group.parts.saturating_add(item.parts);
        group.height = group.height.max(item.height);
    }

    fn begin(&mut self, parts: u64) {
        self.end_item();
        self.item.parts = parts;
    }

    /// One more byte of the item.
    fn lengthen(&mut self) {
        self.item.bytes += 1;
        if self.item.bytes.is_multiple_of(BYTES_OF_A_PART) {
            self.item.parts = self.item.parts.saturating_add(1);
        }
    }

    /// The item is `levels` high.
    fn reach(&mut self, levels: usize) {
        self.levels = self.levels.max(self.depth + levels);
    }

    fn open(&mut self) {
        self.end_item();
        self.depth += 1;
        self.reach(0);
        *self.group() = Item::default();
    }

    fn close(&mut self) {
        self.end_item();
        if self.depth == 0 {
            return;
        }
        let inner = *self.group();
        self.depth -= 1;
        let parts = inner.parts.saturating_add(RULE_PARTS);
        self.item = Item { parts, height: inner.height + 1, ..Item::default() };
    }

    /// An operator on the item, which is written out so many times.
    fn repeat(&mut self, times: u64) {
        let item = &mut self.item;
        item.height += usize::from(item.repeated);
        item.repeated = true;
        item.parts = item.parts.saturating_mul(times.max(1)).saturating_add(RULE_PARTS);
        let height = item.height;
        self.reach(height);
        self.times = self.times.max(times);
    }

    /// Reads on in a `{m,n}`, of which the larger number counts. Returns whether the byte belongs to one.
    fn counts(&mut self, byte: u8) -> bool {
        let Some(count) = &mut self.count else { return false };
        match byte {
            b'0'..=b'9' => {
                count.number = count.number.saturating_mul(10).saturating_add(u64::from(byte - b'0'));
                count.largest = count.largest.max(count.number);
            }
            b',' => count.number = 0,
            b'}' => {
                let times = count.largest;
                self.count = None;
                self.repeat(times);
            }
            b' ' | b'\t' | b'\r' | b'\n' => {}
            _ => {
                self.count = None;
                return false;
            }
        }
        true
    }

    fn parts(&self) -> u64 {
        let open = &self.groups[..=self.depth.min(MAX_NESTING)];
        open.iter().fold(self.item.parts, |sum, group| sum.saturating_add(group.parts))
    }

    fn check(&self) -> Result<(), ConstraintTooLarge> {
        bounded(self.levels, self.times, self.parts())
    }
}

enum LexState {
    Rules,
    Name,
    /// In what ends with this byte: a literal, a class, a token, a regular expression of Lark's.
    Until(u8),
    Comment,
}

struct Grammar {
    shape: Shape,
    lex_state: LexState,
    escaped: bool,
}

impl Grammar {
    fn new() -> Self {
        Self { shape: Shape::new(), lex_state: LexState::Rules, escaped: false }
    }

    fn feed(&mut self, byte: u8) {
        match self.lex_state {
            LexState::Until(end) => self.read_item(byte, end),
            LexState::Comment if matches!(byte, b'\n' | b'\r') => self.lex_state = LexState::Rules,
            LexState::Comment => {}
            LexState::Name if is_name(byte) => {}
            LexState::Name | LexState::Rules => {
                self.lex_state = LexState::Rules;
                self.read_rules(byte);
            }
        }
    }

    fn read_item(&mut self, byte: u8, end: u8) {
        if std::mem::take(&mut self.escaped) {
            return self.shape.lengthen();
        }
        if byte == end {
            // Lark's comments begin with two of them; to llama.cpp one is an error already.
            let comment = end == b'/' && self.shape.item.bytes == 0;
            self.lex_state = if comment { LexState::Comment } else { LexState::Rules };
            return;
        }
        // A token's name has no escapes.
        self.escaped = byte == b'\\' && end != b'>';
        self.shape.lengthen();
    }

    fn read_rules(&mut self, byte: u8) {
        // Also within a `{m,n}`.
        if byte == b'#' {
            self.lex_state = LexState::Comment;
            return;
        }
        if self.shape.counts(byte) {
            return;
        }
        match byte {
            b'"' | b'/' => self.begin_item(byte),
            b'[' => self.begin_item(b']'),
            b'<' => self.begin_item(b'>'),
            b'(' => self.shape.open(),
            b')' => self.shape.close(),
            b'*' | b'+' | b'?' => self.shape.repeat(1),
            b'{' => self.shape.count = Some(Count::default()),
            // Of `::=`.
            b'=' => self.shape.begin(RULE_PARTS),
            b'.' => self.shape.begin(1),
            _ if is_name(byte) => {
                self.shape.begin(1);
                self.lex_state = LexState::Name;
            }
            _ => {}
        }
    }

    fn begin_item(&mut self, end: u8) {
        self.shape.begin(1);
        self.lex_state = LexState::Until(end);
    }
}

struct Regex {
    shape: Shape,
    escaped: bool,
    /// Brackets that the class has opened; 0 outside of one. Some dialects have classes in classes.
    class: usize,
}

impl Regex {
    fn new() -> Self {
        Self { shape: Shape::new(), escaped: false, class: 0 }
    }

    fn feed(&mut self, byte: u8) {
        let escaped = std::mem::replace(&mut self.escaped, false);
        self.escaped = byte == b'\\' && !escaped;
        if self.class > 0 {
            self.read_class(byte, escaped);
        } else if escaped {
            self.shape.begin(1);
        } else if !self.shape.counts(byte) {
            self.read(byte);
        }
    }

    fn read_class(&mut self, byte: u8, escaped: bool) {
        self.shape.lengthen();
        match byte {
            b']' if !escaped => self.class = 0,
            b'[' if !escaped => {
                self.class += 1;
                self.shape.reach(self.class);
            }
            _ => {}
        }
    }

    fn read(&mut self, byte: u8) {
        match byte {
            b'(' => self.shape.open(),
            b')' => self.shape.close(),
            b'[' => {
                self.shape.begin(1);
                self.class = 1;
                self.shape.reach(1);
            }
            b'*' | b'+' | b'?' => self.shape.repeat(1),
            b'{' => self.shape.count = Some(Count::default()),
            b'|' | b'\\' => {}
            _ => self.shape.begin(1),
        }
    }
}

/// What a string of a JSON schema says of the value after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    /// It is a regular expression, which engines turn into rules.
    Pattern,
    /// It says how often something comes, which engines turn into a repetition.
    Times,
    Other,
}

fn word(text: &[u8]) -> Word {
    match text {
        b"pattern" => Word::Pattern,
        b"minLength" | b"maxLength" | b"minItems" | b"maxItems" | b"minProperties" | b"maxProperties" => {
            Word::Times
        }
        _ => Word::Other,
    }
}

/// Measures JSON. Names are held to the bounds of regular expressions, because those of
/// `patternProperties` are some; the numbers of repetitions and the parts of patterns add up.
fn json(text: &[u8]) -> Result<(), ConstraintTooLarge> {
    let mut bytes = text.iter();
    let (mut depth, mut levels, mut parts) = (0_usize, 0_usize, 0_u64);
    let mut last: (Word, Result<(), ConstraintTooLarge>) = (Word::Other, Ok(()));
    let mut name = Word::Other;
    while let Some(byte) = bytes.next().copied() {
        match byte {
            b'"' => {
                let (word, shape) = string(&mut bytes);
                if name == Word::Pattern {
                    shape.check()?;
                    parts = parts.saturating_add(shape.parts());
                }
                last = (word, shape.check());
            }
            b':' => {
                last.1?;
                name = last.0;
            }
            b'{' | b'[' => {
                depth += 1;
                levels = levels.max(depth);
                name = Word::Other;
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            b',' => name = Word::Other,
            b'0'..=b'9' => {
                let number = number(byte, &mut bytes);
                if name == Word::Times {
                    parts = parts.saturating_add(number);
                }
            }
            _ => {}
        }
    }
    bounded(levels, 0, parts)
}

/// Reads a string whose opening quote has been read.
fn string(bytes: &mut Iter<'_, u8>) -> (Word, Shape) {
    let (mut regex, mut start, mut length) = (Regex::new(), [0_u8; LONGEST_WORD], 0_usize);
    for byte in Unescaped::of(bytes) {
        regex.feed(byte);
        if let Some(lex_state) = start.get_mut(length) {
            *lex_state = byte;
        }
        length += 1;
    }
    (start.get(..length).map_or(Word::Other, word), regex.shape)
}

/// Reads a number whose first digit has been read. Returns it without its sign, rounded up.
fn number(first: u8, bytes: &mut Iter<'_, u8>) -> u64 {
    let mut value = digits(u64::from(first - b'0'), bytes);
    if next_is(bytes, b".") {
        digits(0, bytes);
        value = value.saturating_add(1);
    }
    if next_is(bytes, b"eE") && !next_is(bytes, b"-") {
        next_is(bytes, b"+");
        let exponent = u32::try_from(digits(0, bytes)).unwrap_or(u32::MAX);
        value = value.saturating_mul(10_u64.saturating_pow(exponent));
    }
    value
}

fn digits(mut value: u64, bytes: &mut Iter<'_, u8>) -> u64 {
    while let Some(digit) = bytes.as_slice().first().copied().filter(u8::is_ascii_digit) {
        bytes.next();
        value = value.saturating_mul(10).saturating_add(u64::from(digit - b'0'));
    }
    value
}

/// Whether the next byte is one of these; it is read then.
fn next_is(bytes: &mut Iter<'_, u8>, these: &[u8]) -> bool {
    let is = bytes.as_slice().first().is_some_and(|byte| these.contains(byte));
    if is {
        bytes.next();
    }
    is
}

/// Stands for each byte of a character beyond ASCII that is written as an escape.
const BEYOND_ASCII: u8 = 0x80;

/// The bytes that a JSON string stands for, to its closing quote.
struct Unescaped<'r, 'b> {
    bytes: &'r mut Iter<'b, u8>,
    /// Bytes that the last escape still stands for.
    more: u8,
    ended: bool,
}

impl<'r, 'b> Unescaped<'r, 'b> {
    fn of(bytes: &'r mut Iter<'b, u8>) -> Self {
        Self { bytes, more: 0, ended: false }
    }

    /// Reads the four digits after `\u`. Half of a pair stands for two bytes.
    fn code_unit(&mut self) -> u8 {
        let code = self.bytes.as_slice().split_at_checked(4).and_then(|(digits, rest)| {
            let code = u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
            *self.bytes = rest.iter();
            Some(code)
        });
        match code {
            Some(code @ ..=0x7f) => u8::try_from(code).unwrap_or(BEYOND_ASCII),
            Some(0x800..=0xd7ff | 0xe000..) => {
                self.more = 2;
                BEYOND_ASCII
            }
            Some(_) => {
                self.more = 1;
                BEYOND_ASCII
            }
            // No JSON: whoever parses it refuses it.
            None => BEYOND_ASCII,
        }
    }
}

impl Iterator for Unescaped<'_, '_> {
    type Item = u8;

    fn next(&mut self) -> Option<u8> {
        if self.more > 0 {
            self.more -= 1;
            return Some(BEYOND_ASCII);
        }
        if self.ended {
            return None;
        }
        let byte = match self.bytes.next().copied() {
            Some(b'\\') => match self.bytes.next().copied()? {
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                b'b' => 0x08,
                b'f' => 0x0c,
                b'u' => self.code_unit(),
                itself => itself,
            },
            Some(b'"') | None => {
                self.ended = true;
                return None;
            }
            Some(byte) => byte,
        };
        Some(byte)
    }
}

#[cfg(test)]
#[path = "constraints_tests.rs"]
mod tests;
