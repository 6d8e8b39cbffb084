//! In how many ways a place of a grammar can begin, which is what llama.cpp's work grows with.
//!
//! llama.cpp keeps a stack for each way from a rule to the next character, looks for each among all
//! others, and checks for left recursion by following each way anew. A dozen rules that each name
//! the next one twice are enough to stop an engine, and everybody's requests with it. Here each rule
//! is measured once: the ways of alternatives add up, and so do those of the parts of a sequence up
//! to the first that cannot be empty. Rules are followed with a stack of our own, because a text can
//! make a chain of thousands.
//!
//! Not bounded here: alternatives that begin alike and go on differently, of which each character
//! keeps all. Not known here: whether a grammar is valid. Names without a rule and rules that begin
//! with themselves are the engine's to refuse, except where it does not see the latter.

use std::collections::BTreeMap;
use std::slice::Iter;

use super::bounds::{ConstraintTooLarge, MAX_STEPS, MAX_WAYS};

/// Whether the byte is part of a rule's name.
pub(super) fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

/// Holds a grammar against the bounds of ways. Memory: at most 128 bytes for each of the text.
pub(super) fn check(text: &[u8]) -> Result<(), ConstraintTooLarge> {
    let rules = Rules::read(text);
    let mut walk = Walk::new(&rules);
    for rule in 0..rules.bodies.len() {
        if matches!(walk.states[rule], State::Unknown) {
            walk.measure(rule)?;
        }
    }
    // Now that each rule is known, also what does not stand at the start of one.
    for rule in 0..rules.bodies.len() {
        walk.measure(rule)?;
    }
    walk.most.check()
}

/// What a rule is made of, in the order of the text.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// A literal, a class, a token.
    Leaf {
        empty: bool,
    },
    /// A name, as the place of its rule.
    Rule(usize),
    Open,
    Close,
    Or,
    /// An operator on what stands before it.
    Repeat {
        optional: bool,
        times: u64,
    },
}

/// A rule's parts and the byte at which its name stands.
#[derive(Debug, Clone, Copy, Default)]
struct Body {
    at: usize,
    first: usize,
    end: usize,
}

#[derive(Default)]
struct Rules<'t> {
    names: BTreeMap<&'t [u8], usize>,
    /// Absent for a name that only others mention. Of several rules with one name the last counts.
    bodies: Vec<Option<Body>>,
    parts: Vec<Part>,
}

impl<'t> Rules<'t> {
    fn read(text: &'t [u8]) -> Self {
        // To llama.cpp a text ends there.
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let (mut rules, mut current, mut at) = (Self::default(), None, 0);
        while let Some(byte) = text.get(at).copied() {
            let rest = text.get(at..).unwrap_or_default();
            if !is_name(byte) {
                let (part, length) = read_part(rest);
                rules.parts.extend(part);
                at += length;
                continue;
            }
            let length = rest.iter().take_while(|byte| is_name(**byte)).count();
            let rule = rules.rule(rest.get(..length).unwrap_or_default());
            match defines(rest.get(length..).unwrap_or_default()) {
                Some(sign) => {
                    rules.end(current);
                    let first = rules.parts.len();
                    current = Some((rule, Body { at, first, end: first }));
                    at += length + sign;
                }
                None => {
                    rules.parts.push(Part::Rule(rule));
                    at += length;
                }
            }
        }
        rules.end(current);
        rules
    }

    fn rule(&mut self, name: &'t [u8]) -> usize {
        let next = self.bodies.len();
        let rule = *self.names.entry(name).or_insert(next);
        if rule == next {
            self.bodies.push(None);
        }
        rule
    }

    fn end(&mut self, current: Option<(usize, Body)>) {
        if let Some((rule, body)) = current {
            self.bodies[rule] = Some(Body { end: self.parts.len(), ..body });
        }
    }

    fn parts(&self, rule: usize) -> Iter<'_, Part> {
        let body = self.bodies[rule].unwrap_or_default();
        self.parts[body.first..body.end].iter()
    }
}

/// The length of a `::=` and the blanks before it.
fn defines(text: &[u8]) -> Option<usize> {
    let blanks = text.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
    text.get(blanks..)?.starts_with(b"::=").then_some(blanks + 3)
}

/// Reads what is no name. Returns its length, at least one byte.
fn read_part(text: &[u8]) -> (Option<Part>, usize) {
    let optional = |optional| (Some(Part::Repeat { optional, times: 1 }), 1);
    match text.first().copied() {
        Some(b'"') => leaf(text, b'"'),
        Some(b'[') => leaf(text, b']'),
        Some(b'<') => leaf(text, b'>'),
        Some(b'.') => (Some(Part::Leaf { empty: false }), 1),
        Some(b'(') => (Some(Part::Open), 1),
        Some(b')') => (Some(Part::Close), 1),
        Some(b'|') => (Some(Part::Or), 1),
        Some(b'*' | b'?') => optional(true),
        Some(b'+') => optional(false),
        Some(b'{') => read_times(text),
        Some(b'#') => (None, text.iter().take_while(|byte| !matches!(byte, b'\n' | b'\r')).count()),
        _ => (None, 1),
    }
}

/// Reads to `end`. A literal and a class without characters are empty.
fn leaf(text: &[u8], end: u8) -> (Option<Part>, usize) {
    let (mut length, mut escaped) = (1, false);
    for byte in text.iter().skip(1) {
        length += 1;
        if std::mem::take(&mut escaped) {
            continue;
        }
        if *byte == end {
            break;
        }
        // A token's name has no escapes.
        escaped = *byte == b'\\' && end != b'>';
    }
    let empty = matches!(text.get(..length), Some(br#""""# | b"[]" | b"[^]"));
    (Some(Part::Leaf { empty }), length)
}

/// Reads a `{m,n}`, of which the larger number counts; what stands in a comment in it is none.
fn read_times(text: &[u8]) -> (Option<Part>, usize) {
    let (mut numbers, mut length, mut comment) = ([0_u64; 2], 0, false);
    let mut second = 0;
    for byte in text {
        length += 1;
        match byte {
            b'\n' | b'\r' => comment = false,
            _ if comment => {}
            b'#' => comment = true,
            b'0'..=b'9' => {
                let number = &mut numbers[second];
                *number = number.saturating_mul(10).saturating_add(u64::from(*byte - b'0'));
            }
            b',' => second = 1,
            b'}' => break,
            _ => {}
        }
    }
    let times = numbers[0].max(numbers[1]);
    (Some(Part::Repeat { optional: numbers[0] == 0, times }), length)
}

/// The measures of a part, of a sequence or of alternatives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ways {
    ways: u64,
    /// The names to follow on each of the ways, and the ways to go on from each across what may be
    /// empty.
    steps: u64,
    empty: bool,
}

/// A sequence without parts.
const NOTHING: Ways = Ways { ways: 0, steps: 0, empty: true };
/// No alternative yet.
const NEVER: Ways = Ways { ways: 0, steps: 0, empty: false };
const LEAF: Ways = Ways { ways: 1, steps: 0, empty: false };

impl Ways {
    fn then(self, next: Self) -> Self {
        let on = self.ways.saturating_mul(next.ways);
        Self {
            ways: self.ways.saturating_add(next.ways),
            steps: self.steps.saturating_add(next.steps).saturating_add(on),
            empty: next.empty,
        }
    }

    fn or(self, other: Self) -> Self {
        Self {
            ways: self.ways.saturating_add(other.ways),
            steps: self.steps.saturating_add(other.steps),
            empty: self.empty || other.empty,
        }
    }

    /// What may be empty begins anew within each of its repetitions.
    fn repeated(self, optional: bool, times: u64) -> Self {
        if !self.empty {
            return Self { empty: optional, ..self };
        }
        let times = times.max(1);
        let ways = self.ways.saturating_mul(times);
        let steps = self.steps.saturating_mul(times).saturating_add(ways.saturating_mul(ways));
        Self { ways, steps, empty: true }
    }

    /// The same behind a name.
    fn named(self) -> Self {
        Self { steps: self.steps.saturating_add(self.ways), ..self }
    }

    fn most(self, other: Self) -> Self {
        Self { ways: self.ways.max(other.ways), steps: self.steps.max(other.steps), empty: false }
    }

    fn check(self) -> Result<(), ConstraintTooLarge> {
        if self.ways > MAX_WAYS {
            Err(ConstraintTooLarge::Ways { ways: self.ways })
        } else if self.steps > MAX_STEPS {
            Err(ConstraintTooLarge::Steps { steps: self.steps })
        } else {
            Ok(())
        }
    }
}

/// A rule or a group, as far as it was read.
#[derive(Debug, Clone, Copy)]
struct Sum {
    /// The starts of the alternatives that were read.
    total: Ways,
    /// The parts since the last one that cannot be empty, and that one.
    run: Ways,
    /// Whether that run is the start of the alternative.
    leads: bool,
    item: Option<Ways>,
    /// Whether the rule can begin here, and whether it does only after a part that may be empty.
    reached: bool,
    skipping: bool,
}

impl Sum {
    fn new(reached: bool, skipping: bool) -> Self {
        Self { total: NEVER, run: NOTHING, leads: true, item: None, reached, skipping }
    }

    /// No operator applies to the item any more. Returns what the run has come to.
    fn end_item(&mut self) -> Ways {
        if let Some(item) = self.item.take() {
            if !self.run.empty {
                self.end_start();
                self.run = NOTHING;
            }
            self.run = self.run.then(item);
        }
        self.run
    }

    fn end_start(&mut self) {
        if std::mem::take(&mut self.leads) {
            self.total = self.total.or(self.run);
        }
    }

    /// The item has been ended.
    fn end_alternative(&mut self) {
        if self.leads && self.run == NOTHING {
            self.run = Ways { ways: 1, ..NOTHING };
        }
        self.end_start();
        self.run = NOTHING;
        self.leads = true;
    }

    /// Whether the rule can begin with the next item.
    fn reaches(&self) -> bool {
        self.reached && self.leads && self.run.empty
    }

    fn skips(&self) -> bool {
        self.skipping || self.run.ways > 0
    }
}

#[derive(Debug, Clone, Copy)]
enum State {
    Unknown,
    /// Being measured, in this of the frames.
    Busy {
        frame: usize,
    },
    Known(Ways),
}

/// A rule that is being measured.
struct Frame<'r> {
    rule: usize,
    parts: Iter<'r, Part>,
    /// Its own place among the sums; those of its open groups follow.
    sum: usize,
    /// How many of the rules to here were reached only after a part that may be empty.
    skips: usize,
}

struct Walk<'r> {
    rules: &'r Rules<'r>,
    states: Vec<State>,
    frames: Vec<Frame<'r>>,
    sums: Vec<Sum>,
    /// The most that a run or a rule came to.
    most: Ways,
}

impl<'r> Walk<'r> {
    fn new(rules: &'r Rules<'r>) -> Self {
        let state = |body: &Option<Body>| if body.is_some() { State::Unknown } else { State::Known(LEAF) };
        let states = rules.bodies.iter().map(state).collect();
        Self { rules, states, frames: Vec::new(), sums: Vec::new(), most: NEVER }
    }

    /// Measures a rule, and first those that it can begin with.
    fn measure(&mut self, rule: usize) -> Result<(), ConstraintTooLarge> {
        if self.rules.bodies[rule].is_none() {
            return Ok(());
        }
        self.enter(rule, 0);
        while let Some(frame) = self.frames.last_mut() {
            let (part, base) = (frame.parts.next().copied(), frame.sum);
            match part {
                Some(Part::Leaf { empty }) => self.begin(Ways { empty, ..LEAF }),
                Some(Part::Rule(rule)) => self.refer(rule)?,
                Some(Part::Open) => self.open(),
                Some(Part::Close) if self.sums.len() > base + 1 => self.close(),
                Some(Part::Close) => {}
                Some(Part::Or) => self.end_alternative(),
                Some(Part::Repeat { optional, times }) => self.repeat(optional, times),
                None if self.sums.len() > base + 1 => self.close(),
                None => self.leave(),
            }
        }
        Ok(())
    }

    fn enter(&mut self, rule: usize, skips: usize) {
        let parts = self.rules.parts(rule);
        // What is known already stays so for its own names in it.
        if matches!(self.states[rule], State::Unknown) {
            self.states[rule] = State::Busy { frame: self.frames.len() };
        }
        self.frames.push(Frame { rule, parts, sum: self.sums.len(), skips });
        self.sums.push(Sum::new(true, false));
    }

    fn leave(&mut self) {
        self.end_alternative();
        let (Some(frame), Some(sum)) = (self.frames.pop(), self.sums.pop()) else { return };
        self.most = self.most.most(sum.total);
        self.states[frame.rule] = State::Known(sum.total);
        self.set_item(sum.total.named());
    }

    /// Reads a name.
    fn refer(&mut self, rule: usize) -> Result<(), ConstraintTooLarge> {
        self.end_item();
        let (Some(sum), Some(frame)) = (self.sums.last(), self.frames.last()) else { return Ok(()) };
        let (reaches, skips) = (sum.reaches(), frame.skips + usize::from(sum.skips()));
        match self.states[rule] {
            State::Known(ways) => self.set_item(ways.named()),
            State::Unknown if reaches => self.enter(rule, skips),
            State::Busy { frame } if reaches && skips > self.frames[frame].skips => {
                let at = self.rules.bodies[rule].unwrap_or_default().at;
                return Err(ConstraintTooLarge::LeftRecursive { at });
            }
            State::Unknown | State::Busy { .. } => self.set_item(LEAF),
        }
        Ok(())
    }

    fn begin(&mut self, item: Ways) {
        self.end_item();
        self.set_item(item);
    }

    fn set_item(&mut self, item: Ways) {
        if let Some(sum) = self.sums.last_mut() {
            sum.item = Some(item);
        }
    }

    fn repeat(&mut self, optional: bool, times: u64) {
        if let Some(item) = self.sums.last_mut().and_then(|sum| sum.item.as_mut()) {
            *item = item.repeated(optional, times);
        }
    }

    fn end_item(&mut self) {
        if let Some(sum) = self.sums.last_mut() {
            self.most = self.most.most(sum.end_item());
        }
    }

    fn end_alternative(&mut self) {
        self.end_item();
        if let Some(sum) = self.sums.last_mut() {
            sum.end_alternative();
        }
    }

    fn open(&mut self) {
        self.end_item();
        if let Some(sum) = self.sums.last().copied() {
            self.sums.push(Sum::new(sum.reaches(), sum.skips()));
        }
    }

    fn close(&mut self) {
        self.end_alternative();
        if let Some(sum) = self.sums.pop() {
            self.set_item(sum.total);
        }
    }
}
