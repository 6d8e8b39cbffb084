//! One pass over JSON, without a tree.
//!
//! Whoever calls decides at each value whether it is entered or skipped; what is skipped is checked
//! all the same, so that every reader of the same bytes sees the same fields. Nesting is bounded, and
//! no memory is taken but for a name that has escapes.

use std::borrow::Cow;

/// Deepest nesting of objects and arrays. Source: .specs/01 CLOUD-1108.
pub(crate) const MAX_DEPTH: usize = 127;
/// Bytes of a string that are looked at together.
const STRIDE: usize = 32;

/// Why a text is no JSON. Places are bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadJson {
    #[error("ends before its JSON does")]
    Cut,
    #[error("is no JSON at byte {at}")]
    Unexpected { at: usize },
    #[error("is nested deeper than {MAX_DEPTH} at byte {at}")]
    Deep { at: usize },
}

#[derive(Debug)]
pub(crate) struct Scanner<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl<'a> Scanner<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Self { text, at: 0, depth: 0 }
    }

    /// Where the next byte is.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    fn byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn unexpected(&self) -> BadJson {
        if self.at < self.text.len() { BadJson::Unexpected { at: self.at } } else { BadJson::Cut }
    }

    /// The next byte that is no blank, which is not taken.
    pub(crate) fn peek(&mut self) -> Result<u8, BadJson> {
        while let Some(byte) = self.byte() {
            if !matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
                return Ok(byte);
            }
            self.at += 1;
        }
        Err(BadJson::Cut)
    }

    fn expect(&mut self, wanted: u8) -> Result<(), BadJson> {
        if self.peek()? != wanted {
            return Err(self.unexpected());
        }
        self.at += 1;
        Ok(())
    }

    fn enter(&mut self) -> Result<(), BadJson> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(BadJson::Deep { at: self.at });
        }
        self.at += 1;
        Ok(())
    }

    /// Takes an object. For each member `read` gets its name and takes its value.
    pub(crate) fn object<E: From<BadJson>>(
        &mut self,
        mut read: impl FnMut(&mut Self, Name<'a>) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.peek()? != b'{' {
            return Err(self.unexpected().into());
        }
        self.enter()?;
        if self.peek()? != b'}' {
            loop {
                if self.peek()? != b'"' {
                    return Err(self.unexpected().into());
                }
                let at = self.at;
                let name = Name { raw: self.string()?, at };
                self.expect(b':')?;
                self.peek()?;
                read(self, name)?;
                if self.peek()? != b',' {
                    break;
                }
                self.at += 1;
            }
        }
        self.expect(b'}')?;
        self.depth -= 1;
        Ok(())
    }

    /// Takes an array. `read` takes each of its values.
    pub(crate) fn array<E: From<BadJson>>(
        &mut self,
        mut read: impl FnMut(&mut Self) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.peek()? != b'[' {
            return Err(self.unexpected().into());
        }
        self.enter()?;
        if self.peek()? != b']' {
            loop {
                self.peek()?;
                read(self)?;
                if self.peek()? != b',' {
                    break;
                }
                self.at += 1;
            }
        }
        self.expect(b']')?;
        self.depth -= 1;
        Ok(())
    }

    /// Takes any value. Returns its text, without blanks around it.
    pub(crate) fn value(&mut self) -> Result<&'a str, BadJson> {
        let first = self.peek()?;
        let from = self.at;
        match first {
            b'{' => self.object(|scanner, _| scanner.value().map(drop))?,
            b'[' => self.array(|scanner| scanner.value().map(drop))?,
            b'"' => drop(self.string()?),
            b't' => self.word("true")?,
            b'f' => self.word("false")?,
            b'n' => self.word("null")?,
            _ => self.number()?,
        }
        Ok(&self.text[from..self.at])
    }

    fn word(&mut self, word: &str) -> Result<(), BadJson> {
        for wanted in word.bytes() {
            if self.byte() != Some(wanted) {
                return Err(self.unexpected());
            }
            self.at += 1;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), BadJson> {
        let from = self.at;
        while self.byte().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        if self.at == from { Err(self.unexpected()) } else { Ok(()) }
    }

    fn number(&mut self) -> Result<(), BadJson> {
        if self.byte() == Some(b'-') {
            self.at += 1;
        }
        if self.byte() == Some(b'0') {
            self.at += 1;
        } else {
            self.digits()?;
        }
        if self.byte() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.byte(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.byte(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    /// Takes a string whose quote is the next byte. Returns it with its quotes.
    fn string(&mut self) -> Result<&'a str, BadJson> {
        let from = self.at;
        self.at += 1;
        loop {
            let bytes = self.text.as_bytes();
            while bytes.get(self.at..self.at + STRIDE).is_some_and(is_plain) {
                self.at += STRIDE;
            }
            match self.byte() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(&self.text[from..self.at]);
                }
                Some(b'\\') => self.escape()?,
                Some(0x20..) => self.at += 1,
                Some(_) | None => return Err(self.unexpected()),
            }
        }
    }

    fn escape(&mut self) -> Result<(), BadJson> {
        self.at += 1;
        match self.byte() {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.at += 1,
            Some(b'u') => {
                self.at += 1;
                for _ in 0..4 {
                    if !self.byte().is_some_and(|byte| byte.is_ascii_hexdigit()) {
                        return Err(self.unexpected());
                    }
                    self.at += 1;
                }
            }
            Some(_) | None => return Err(self.unexpected()),
        }
        Ok(())
    }
}

/// Whether no byte of a string's piece means anything. Without a branch, so that many are compared
/// at a time.
fn is_plain(piece: &[u8]) -> bool {
    let special = |byte: u8| (byte < 0x20) | (byte == b'"') | (byte == b'\\');
    !piece.iter().fold(false, |found, byte| found | special(*byte))
}

/// The name of a member, as it is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Name<'a> {
    raw: &'a str,
    at: usize,
}

impl<'a> Name<'a> {
    /// What the name stands for: escapes make no other name of it.
    pub(crate) fn text(self) -> Result<Cow<'a, str>, BadJson> {
        text(self.raw).ok_or(BadJson::Unexpected { at: self.at })
    }
}

/// What a string stands for, whose quotes are given too. None for half of a pair of code units, which
/// no text has.
pub(crate) fn text(raw: &str) -> Option<Cow<'_, str>> {
    if raw.contains('\\') {
        return serde_json::from_str(raw).ok().map(Cow::Owned);
    }
    raw.get(1..raw.len().checked_sub(1)?).map(Cow::Borrowed)
}
