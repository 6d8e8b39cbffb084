//! JSON as engines write it: what is asked for is read, everything else is stepped over.
//!
//! A strict parser refuses a whole event for a `NaN` beside the text, for half a surrogate pair, or
//! for a number with twenty digits. Nobody asked for them. Here a value is found by its quotes and
//! brackets only, and what lies beside the way is never looked into. It reads
//! what a strict parser reads, and no text makes it recurse or panic.

use std::borrow::Cow;

use memchr::memchr2;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// How deep a document is looked into that a strict parser refuses.
const MOST_DEPTH: u32 = 32;

/// A whole answer. What a strict parser refuses in it is `null`, and everything beside that is as
/// it stands there. Error: it is not whole, or no object and no list.
pub(crate) fn document(bytes: &[u8]) -> serde_json::Result<Value> {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim_start_matches('\u{feff}').trim();
    serde_json::from_str(text).or_else(|error| {
        let whole = text.starts_with(['{', '[']) && value_end(text.as_bytes(), 0) == Some(text.len());
        whole.then(|| Json(text).value(MOST_DEPTH)).ok_or(error)
    })
}

/// [`document`], as a type.
pub(crate) fn typed<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice(bytes).or_else(|_| serde_json::from_value(document(bytes)?))
}

/// Sets a field that has a value.
pub(crate) fn set<T: Serialize>(body: &mut Value, name: &str, value: Option<T>) {
    if let Some(value) = value {
        body[name] = json!(value);
    }
}

/// A count in a document of an engine: at most `u32::MAX`, and 0 is as good as unknown.
pub(super) fn positive(value: &Value) -> Option<u32> {
    let count = value.as_u64().or_else(|| {
        let float = value.as_f64().filter(|float| float.is_finite() && *float >= 1.0)?;
        format!("{:.0}", float.floor().min(f64::from(u32::MAX))).parse().ok()
    })?;
    Some(u32::try_from(count).unwrap_or(u32::MAX)).filter(|count| *count > 0)
}

/// A value inside a text; absent where nothing was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Json<'a>(&'a str);

impl<'a> Json<'a> {
    const ABSENT: Self = Self("");

    /// The object that the text is, with nothing but white space around it.
    pub(crate) fn object(text: &'a str) -> Option<Self> {
        let text = text.trim();
        (text.starts_with('{') && value_end(text.as_bytes(), 0) == Some(text.len())).then_some(Self(text))
    }

    /// The member of this name, the last one where there are several. Absent in what is no object.
    pub(crate) fn get(self, name: &str) -> Self {
        let mut found = Self::ABSENT;
        let members = Members { text: self.0, at: opened(self.0, b'{'), keyed: true };
        for (key, value) in members {
            if is_name(key, name) {
                found = value;
            }
        }
        found
    }

    /// The elements of a list; none of what is none.
    pub(crate) fn items(self) -> impl Iterator<Item = Self> {
        Members { text: self.0, at: opened(self.0, b'['), keyed: false }.map(|(_, value)| value)
    }

    /// The first element of a list.
    pub(crate) fn first(self) -> Self {
        self.items().next().unwrap_or(Self::ABSENT)
    }

    /// The text of a string. What is not valid Unicode becomes U+FFFD.
    pub(crate) fn text(self) -> Option<Cow<'a, str>> {
        let inner = self.0.strip_prefix('"')?.strip_suffix('"')?;
        Some(if inner.contains('\\') { Cow::Owned(unescape(inner)) } else { Cow::Borrowed(inner) })
    }

    /// A text that says something.
    pub(crate) fn word(self) -> Option<Cow<'a, str>> {
        self.text().filter(|text| !text.is_empty())
    }

    /// A count of tokens, slots or requests, at most `u32::MAX` however large it is written. Nothing
    /// for what is negative or no number.
    pub(crate) fn count(self) -> Option<u32> {
        let text = self.0.trim_matches('"');
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Some(text.parse().unwrap_or(u32::MAX));
        }
        let number: f64 = text.parse().ok()?;
        (number.is_finite() && number >= 0.0)
            .then(|| format!("{:.0}", number.floor().min(f64::from(u32::MAX))).parse().unwrap_or(u32::MAX))
    }

    fn value(self, depth: u32) -> Value {
        let Some(deeper) = depth.checked_sub(1) else { return Value::Null };
        match self.0.as_bytes().first() {
            Some(b'{') => {
                let members = Members { text: self.0, at: Some(1), keyed: true };
                Value::Object(members.map(|(key, member)| (unescape(key), member.value(deeper))).collect())
            }
            Some(b'[') => self.items().map(|item| item.value(deeper)).collect(),
            Some(b'"') => self.text().map_or(Value::Null, |text| Value::String(text.into_owned())),
            _ => serde_json::from_str(self.0).unwrap_or_default(),
        }
    }

    pub(crate) fn is_true(self) -> bool {
        self.0 == "true"
    }

    /// Whether there is an object or a list with anything in it, a text that says something, `true`
    /// or a number that is not 0.
    pub(crate) fn says_something(self) -> bool {
        match self.0.as_bytes().first() {
            Some(b'{') => Members { text: self.0, at: Some(1), keyed: true }.next().is_some(),
            Some(b'[') => self.items().next().is_some(),
            Some(b'"') => self.0.len() > 2,
            _ => self.is_true() || self.0.parse().is_ok_and(|number: f64| number != 0.0 && !number.is_nan()),
        }
    }

    /// A number as it is written.
    pub(crate) fn number(self) -> Option<&'a str> {
        self.0.starts_with(|c: char| c.is_ascii_digit()).then_some(self.0)
    }

    pub(crate) fn is_object(self) -> bool {
        self.0.starts_with('{')
    }

    /// Whether anything but `null` stands there.
    pub(crate) fn is_given(self) -> bool {
        !self.0.is_empty() && self.0 != "null"
    }
}

/// An object whose members were found once, for whoever asks for several of them.
#[derive(Debug)]
pub(crate) struct Object<'a> {
    whole: Json<'a>,
    /// As far as they can be read, in their order; none where there are too many to be kept.
    members: Option<Vec<(&'a str, Json<'a>)>>,
}

impl<'a> Object<'a> {
    /// The object that the text is, as [`Json::object`] finds it.
    pub(crate) fn read(text: &'a str) -> Option<Self> {
        /// As many as an event of any engine has, nearly always; and far more.
        const MEMBERS: usize = 12;
        const MOST_MEMBERS: usize = 256;
        let text = text.trim();
        let mut rest = Members { text, at: Some(opened(text, b'{')?), keyed: true };
        let mut members = Vec::with_capacity(MEMBERS);
        let mut end = 1;
        let mut count = 0_usize;
        while let Some(member) = rest.next() {
            count += 1;
            if count <= MOST_MEMBERS {
                members.push(member);
            }
            end = rest.at.unwrap_or(end);
        }
        // Whose members were all read is whole; else its brackets say so.
        let end = skip(text.as_bytes(), end, separates);
        let is_whole = text.as_bytes()[end..] == *b"}" || value_end(text.as_bytes(), 0) == Some(text.len());
        let members = (count <= MOST_MEMBERS).then_some(members);
        is_whole.then_some(Self { whole: Json(text), members })
    }

    /// As [`Json::get`].
    pub(crate) fn get(&self, name: &str) -> Json<'a> {
        let Some(members) = &self.members else { return self.whole.get(name) };
        let named = members.iter().rev().find(|(key, _)| is_name(key, name));
        named.map_or(Json::ABSENT, |(_, value)| *value)
    }

    pub(crate) fn json(&self) -> Json<'a> {
        self.whole
    }
}

/// Whether a key as it is written is this name.
fn is_name(key: &str, name: &str) -> bool {
    key == name || key.contains('\\') && unescape(key) == name
}

/// What may stand between two members, or before the first and behind the last one.
fn separates(byte: u8) -> bool {
    byte == b',' || byte.is_ascii_whitespace()
}

fn opened(text: &str, bracket: u8) -> Option<usize> {
    (text.as_bytes().first() == Some(&bracket)).then_some(1)
}

/// What stands between two brackets, one after the other. Ends at the first thing that is amiss.
struct Members<'a> {
    text: &'a str,
    /// Where to go on; nothing at the end.
    at: Option<usize>,
    keyed: bool,
}

impl<'a> Iterator for Members<'a> {
    /// The name as it is written, without its quotes; empty in a list.
    type Item = (&'a str, Json<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = self.text.as_bytes();
        // Not where it is until a whole member was read.
        let mut at = skip(bytes, self.at.take()?, separates);
        let mut key = "";
        if self.keyed {
            let end = (bytes.get(at) == Some(&b'"')).then(|| string_end(bytes, at)).flatten()?;
            key = self.text.get(at + 1..end - 1)?;
            at = skip(bytes, end, |byte| byte.is_ascii_whitespace());
            if bytes.get(at) != Some(&b':') {
                return None;
            }
            at = skip(bytes, at + 1, |byte| byte.is_ascii_whitespace());
        }
        let end = value_end(bytes, at)?;
        self.at = Some(end);
        Some((key, Json(self.text.get(at..end)?)))
    }
}

fn skip(bytes: &[u8], from: usize, what: impl Fn(u8) -> bool) -> usize {
    let rest = bytes.get(from..).unwrap_or_default();
    from + rest.iter().position(|byte| !what(*byte)).unwrap_or(rest.len())
}

/// Where the value that begins at `at` ends; nothing where none begins or it does not end.
fn value_end(bytes: &[u8], at: usize) -> Option<usize> {
    match bytes.get(at)? {
        b'"' => string_end(bytes, at),
        b'{' | b'[' => {
            let (mut depth, mut at) = (0_usize, at);
            loop {
                match bytes.get(at)? {
                    b'"' => at = string_end(bytes, at)? - 1,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => depth -= 1,
                    _ => {}
                }
                at += 1;
                if depth == 0 {
                    return Some(at);
                }
            }
        }
        _ => {
            let scalar = |byte: u8| !byte.is_ascii_whitespace() && !b",:]}[{\"".contains(&byte);
            let end = skip(bytes, at, scalar);
            (end > at).then_some(end)
        }
    }
}

/// Where the string that begins at `at` ends, its closing quote included.
fn string_end(bytes: &[u8], at: usize) -> Option<usize> {
    let mut at = at + 1;
    loop {
        at += memchr2(b'"', b'\\', bytes.get(at..)?)?;
        if bytes[at] == b'"' {
            return Some(at + 1);
        }
        at += 2;
    }
}

/// Writes escapes out. Half a surrogate pair, and an escape that is none, become U+FFFD.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let mut after = rest[at + 1..].chars();
        let escaped = match after.next() {
            Some('n') => '\n',
            Some('t') => '\t',
            Some('r') => '\r',
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some(plain @ ('"' | '\\' | '/')) => plain,
            Some('u') => {
                let unit = unit(after.as_str());
                if unit.is_some() {
                    after = after.as_str()[4..].chars();
                }
                let low = after.as_str().strip_prefix("\\u").and_then(unit_of_low);
                match (unit, low) {
                    (Some(high @ 0xD800..=0xDBFF), Some(low)) => {
                        after = after.as_str()[6..].chars();
                        let point = 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
                        char::from_u32(point).unwrap_or(char::REPLACEMENT_CHARACTER)
                    }
                    (Some(unit), _) => char::from_u32(unit).unwrap_or(char::REPLACEMENT_CHARACTER),
                    (None, _) => char::REPLACEMENT_CHARACTER,
                }
            }
            _ => char::REPLACEMENT_CHARACTER,
        };
        out.push(escaped);
        rest = after.as_str();
    }
    out.push_str(rest);
    out
}

fn unit(hex: &str) -> Option<u32> {
    let digits = hex.get(..4).filter(|hex| hex.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
    u32::from_str_radix(digits, 16).ok()
}

fn unit_of_low(hex: &str) -> Option<u32> {
    unit(hex).filter(|unit| (0xDC00..=0xDFFF).contains(unit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // CLOUD-1522
    #[test]
    fn what_a_strict_parser_refuses_is_stepped_over() {
        for beside in [
            "NaN",
            "-Infinity",
            "1e999",
            "18446744073709551612",
            "\"\\ud83d\"",
            "\"\\x\"",
            "[[[[1,],],]",
            "{\"a\":1,\"a\":2}",
            "+1",
            ".5",
            "True",
            "\"\u{1}\"",
        ] {
            let balanced = if beside.starts_with("[[") { "[[[[1,],],]]" } else { beside };
            let text = format!("{{\"x\":{balanced},\"t\":\"hi\",\"y\":{balanced}}}");
            let event = Json::object(&text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(event.get("t").text().as_deref(), Some("hi"), "{text}");
        }
        let deep = format!("{{\"x\":{}{},\"t\":\"hi\"}}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(Json::object(&deep).unwrap().get("t").text().as_deref(), Some("hi"));
    }

    // CLOUD-1522
    #[test]
    fn a_document_is_read_whatever_stands_in_what_nobody_asked_for() {
        let read = |text: &[u8]| document(text);
        for beside in ["NaN", "-Infinity", "1e999", r#""\ud83d""#, "[1,]", "True"] {
            let text = format!("\u{feff} {{\"x\":{beside},\"data\":[{{\"id\":\"m\",\"y\":{beside}}}]}}\n");
            let value = read(text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(value["data"][0]["id"], "m", "{text}");
        }
        assert_eq!(read(b"{\"id\":\"\xff\"}").unwrap()["id"], "\u{fffd}");
        for bad in ["", "{", "<html>", "hello", "{\"a\":NaN}}", "{\"a\":NaN"] {
            assert!(read(bad.as_bytes()).is_err(), "{bad}");
        }
        let deep = format!("{{\"x\":{}{},\"y\":NaN}}", "[".repeat(10_000), "]".repeat(10_000));
        assert_eq!(read(deep.as_bytes()).unwrap()["y"], Value::Null);
    }

    // CLOUD-1522
    #[test]
    fn what_is_no_whole_object_is_none() {
        for bad in ["", "{", "{\"a\":1}}", "{\"a\":\"b}", "null", "[1]", "7", "{\"a\":1}{\"a\":2}", "\"{}\""]
        {
            assert_eq!(Json::object(bad), None, "{bad}");
        }
    }

    // CLOUD-1522
    #[test]
    fn of_an_object_with_very_many_members_the_last_of_a_name_is_found_too() {
        for members in [10, 256, 257, 5_000] {
            let text = format!("{{{}\"a\":2}}", "\"a\":1,".repeat(members - 1));
            let object = Object::read(&text).unwrap();
            assert_eq!((object.get("a").count(), object.get("b")), (Some(2), Json::ABSENT), "{members}");
        }
    }

    // CLOUD-1522
    #[test]
    fn half_a_pair_becomes_the_replacement_character_and_a_pair_its_sign() {
        let text = |json: &'static str| Json(json).text().unwrap().into_owned();
        assert_eq!(text(r#""a\ud83db""#), "a\u{fffd}b");
        assert_eq!(text(r#""\ude00\ud83d\ude00""#), "\u{fffd}\u{1f600}");
        assert_eq!(text(r#""\ud83d\ud83d\ude00""#), "\u{fffd}\u{1f600}");
        assert_eq!(text(r#""\u00e4\n\"\/\q\u12""#), "ä\n\"/\u{fffd}\u{fffd}12");
    }

    // CLOUD-1523
    #[test]
    fn counts_are_bounded_and_nothing_for_what_is_none() {
        for (text, count) in [
            ("5", Some(5)),
            ("5.9", Some(5)),
            ("\"5\"", Some(5)),
            ("18446744073709551612", Some(u32::MAX)),
            ("1e30", Some(u32::MAX)),
            ("-35", None),
            ("NaN", None),
            ("Infinity", None),
            ("null", None),
            ("", None),
            ("{}", None),
            ("\"\"", None),
        ] {
            assert_eq!(Json(text).count(), count, "{text}");
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<u32>().prop_map(Value::from),
            "\\PC{0,8}".prop_map(Value::from),
            Just(json!("\u{1}\"\\\n😀")),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-c\"\\\\]{1,2}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    fn agree(value: &Value, read: Json<'_>) {
        match value {
            Value::Object(members) => {
                let object = Object::read(read.0).unwrap();
                for (name, member) in members {
                    agree(member, read.get(name));
                    assert_eq!(object.get(name), read.get(name));
                }
                assert_eq!(read.get("no such name"), Json::ABSENT);
                assert_eq!(object.get("no such name"), Json::ABSENT);
            }
            Value::Array(items) => {
                assert_eq!(read.items().count(), items.len());
                items.iter().zip(read.items()).for_each(|(item, read)| agree(item, read));
            }
            Value::String(text) => assert_eq!(read.text().as_deref(), Some(text.as_str())),
            Value::Number(number) => assert_eq!(read.count().map(u64::from), number.as_u64()),
            Value::Bool(yes) => assert_eq!(read.is_true(), *yes),
            Value::Null => assert!(!read.is_given()),
        }
    }

    proptest! {
        // CLOUD-1522
        #[test]
        fn it_reads_what_a_strict_parser_reads(value in any_json(), pretty in any::<bool>()) {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            let text = format!("{{\"v\":{}}}", text.unwrap());
            agree(&value, Json::object(&text).unwrap().get("v"));
        }

        // CLOUD-1522
        #[test]
        fn no_text_makes_it_panic(text in "[\\[\\]{}:,\"\\\\a0 un\u{e4}-]{0,40}", closed in any::<bool>()) {
            let text = if closed { format!("{{\"a\":{text}}}") } else { text };
            let read = Object::read(&text);
            prop_assert_eq!(read.as_ref().map(Object::json), Json::object(&text));
            if let Some(object) = Json::object(&text) {
                let _ = (object.get("a").first().text(), object.get("a").count(), object.says_something());
                prop_assert_eq!(read.unwrap().get("a"), object.get("a"));
            }
            let _ = (Json(&text).get("a"), Json(&text).text(), Json(&text).items().count());
        }
    }
}
