//! Thoughts in a raw completion, between the delimiters of the model's own template.
//!
//! Where messages are written out and completed as a prompt, the engine does not tell thoughts from
//! text: the template's delimiters do. Only pairs that are known are used; a template that speaks of
//! thoughts in another way is not guessed at.

/// What one event brings: thoughts come before text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Delta {
    pub thought: String,
    pub text: String,
}

impl Delta {
    pub(crate) fn text(text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::default() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.thought.is_empty() && self.text.is_empty()
    }

    pub(super) fn append(&mut self, other: &Self) {
        self.thought.push_str(&other.thought);
        self.text.push_str(&other.text);
    }
}

/// What stands before and after the thoughts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Delimiters {
    pub(super) open: &'static str,
    pub(super) close: &'static str,
}

const KNOWN: [Delimiters; 8] = [
    // DeepSeek, Qwen, GLM, MiniMax, Kimi, Nemotron, EXAONE 4, Phi-4.
    Delimiters { open: "<think>", close: "</think>" },
    // Magistral, Ministral 3.
    Delimiters { open: "[THINK]", close: "[/THINK]" },
    // Seed-OSS.
    Delimiters { open: "<seed:think>", close: "</seed:think>" },
    // MiniMax-M3.
    Delimiters { open: "<mm:think>", close: "</mm:think>" },
    // Kimi-VL.
    Delimiters { open: "◁think▷", close: "◁/think▷" },
    // Command A.
    Delimiters { open: "<|START_THINKING|>", close: "<|END_THINKING|>" },
    // EXAONE Deep.
    Delimiters { open: "<thought>", close: "</thought>" },
    // Apertus.
    Delimiters { open: "<|inner_prefix|>", close: "<|inner_suffix|>" },
];

/// Words, in lower case, by which a template that has none of the known delimiters shows that its model
/// thinks; and delimiters that wrap the answer itself.
const HINTS: [&str; 7] = ["think", "thought", "reasoning", "channel", "analysis", "<response>", "<answer>"];
const WRAPPED: [&str; 3] = ["<response>", "<answer>", "<|start_text|>"];

/// What a template says of thoughts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Template {
    /// Its model does not think.
    Plain,
    Delimited(Delimiters),
    /// It does, and where its thoughts end is not known.
    Unknown,
}

impl Template {
    pub(super) fn of(template: &str) -> Self {
        let mut known = KNOWN.iter().filter(|delimiters| template.contains(delimiters.close));
        let words = template.to_lowercase();
        match (known.next(), known.next()) {
            (Some(_), None) if WRAPPED.iter().any(|delimiter| words.contains(delimiter)) => Self::Unknown,
            (Some(delimiters), None) => Self::Delimited(*delimiters),
            (Some(_), Some(_)) => Self::Unknown,
            (None, _) if HINTS.iter().any(|hint| words.contains(hint)) => Self::Unknown,
            (None, _) => Self::Plain,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Section {
    /// Nothing but white space has come.
    Start,
    Thoughts,
    /// White space before the text is the delimiter's.
    AfterThoughts,
    Text,
}

/// Separates thoughts from text as it comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Splitter {
    delimiters: Delimiters,
    section: Section,
    /// What may be the beginning of a delimiter, or white space before one.
    held: String,
    /// Thoughts have come.
    thinks: bool,
}

impl Splitter {
    /// After a prompt: many templates open the thoughts themselves.
    pub(super) fn after(delimiters: Delimiters, prompt: &str) -> Self {
        let opened = prompt.trim_end().ends_with(delimiters.open);
        let section = if opened { Section::Thoughts } else { Section::Start };
        Self { delimiters, section, held: String::new(), thinks: false }
    }

    /// Takes what came, and gives out what is sure.
    pub(super) fn push(&mut self, text: &str) -> Delta {
        self.held.push_str(text);
        let mut out = Delta::default();
        loop {
            match self.section {
                Section::Start => {
                    let begun = self.held.trim_start();
                    if let Some(rest) = begun.strip_prefix(self.delimiters.open) {
                        self.held = rest.to_owned();
                        self.section = Section::Thoughts;
                    } else if self.delimiters.open.starts_with(begun) {
                        return out;
                    } else {
                        self.section = Section::Text;
                    }
                }
                Section::Thoughts => {
                    if !self.thinks {
                        self.held = self.held.trim_start().to_owned();
                    }
                    if let Some(at) = self.held.find(self.delimiters.close) {
                        out.thought.push_str(self.held[..at].trim_end());
                        self.held.drain(..at + self.delimiters.close.len());
                        self.section = Section::AfterThoughts;
                        continue;
                    }
                    let sure = self.held.len() - longest_beginning(&self.held, self.delimiters.close);
                    let sure = self.held[..sure].trim_end().len();
                    out.thought.extend(self.held.drain(..sure));
                    self.thinks |= sure > 0;
                    return out;
                }
                Section::AfterThoughts => {
                    self.held = self.held.trim_start().to_owned();
                    if self.held.is_empty() {
                        return out;
                    }
                    self.section = Section::Text;
                }
                Section::Text => {
                    out.text.push_str(&std::mem::take(&mut self.held));
                    return out;
                }
            }
        }
    }

    /// Thoughts and text as the model would have written them after the same prompt, and how what
    /// follows is read.
    pub(super) fn written_out(mut self, thoughts: &str, text: &str) -> (String, Self) {
        let mut raw = String::new();
        if !thoughts.is_empty() {
            if self.section == Section::Start {
                raw.push_str(self.delimiters.open);
                raw.push('\n');
            }
            raw.push_str(thoughts);
            if !text.is_empty() {
                raw.push('\n');
                raw.push_str(self.delimiters.close);
                raw.push_str("\n\n");
            }
        } else if !text.is_empty() && self.section == Section::Thoughts {
            raw.push_str(self.delimiters.close);
            raw.push_str("\n\n");
        }
        raw.push_str(text);
        let _ = self.push(&raw);
        (raw, self)
    }

    /// Nothing follows: what was held back is what it is.
    pub(super) fn finish(&mut self) -> Delta {
        let rest = std::mem::take(&mut self.held);
        match self.section {
            Section::Thoughts => Delta { thought: rest.trim_end().to_owned(), text: String::new() },
            Section::Start | Section::AfterThoughts | Section::Text => Delta::text(rest),
        }
    }
}

/// How much of the end of the text could be the beginning of the delimiter, bytes.
fn longest_beginning(text: &str, delimiter: &str) -> usize {
    let mut lengths = delimiter.char_indices().map(|(at, _)| at).rev();
    lengths.find(|length| *length > 0 && text.ends_with(&delimiter[..*length])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const THINK: Delimiters = KNOWN[0];

    fn split(prompt: &str, pieces: &[&str]) -> (String, String) {
        let mut splitter = Splitter::after(THINK, prompt);
        let (mut thought, mut text) = (String::new(), String::new());
        let mut all: Vec<Delta> = pieces.iter().map(|piece| splitter.push(piece)).collect();
        all.push(splitter.finish());
        for delta in all {
            assert!(delta.thought.is_empty() || text.is_empty(), "thoughts come first");
            thought.push_str(&delta.thought);
            text.push_str(&delta.text);
        }
        (thought, text)
    }

    // CLOUD-1521
    #[test]
    fn a_template_is_known_by_its_delimiters_and_not_guessed_at() {
        assert_eq!(Template::of("{{ m.content }}<|im_end|>"), Template::Plain);
        assert_eq!(Template::of("{% if '</think>' in content %}<think>\n"), Template::Delimited(THINK));
        for unknown in [
            "<|channel|>analysis<|message|>",
            "Here is my thought process:",
            "</think> and [/THINK]",
            "</think><response>",
            "{{ reasoning_content }}",
        ] {
            assert_eq!(Template::of(unknown), Template::Unknown, "{unknown}");
        }
    }

    // CLOUD-1521
    #[test]
    fn thoughts_end_at_their_delimiter_and_white_space_around_it_is_the_delimiters() {
        let whole = ("Let me think".to_owned(), "Hi there ".to_owned());
        assert_eq!(split("<|a|>", &["\n<think>\nLet me think\n</think>\n\nHi there "]), whole);
        assert_eq!(split("<|a|><think>\n", &["Let me think</think>Hi there "]), whole);
        assert_eq!(split("<|a|><think>\n\n</think>\n\n", &["Hi"]), (String::new(), "Hi".into()));
        assert_eq!(split("", &[" Hi <think> there"]), (String::new(), " Hi <think> there".into()));
        assert_eq!(split("<think>", &["cut </thi"]), ("cut </thi".into(), String::new()));
        assert_eq!(split("", &["<thi"]), (String::new(), "<thi".into()));
    }

    // CLOUD-1521
    #[test]
    fn what_was_sent_is_written_out_as_it_is_read() {
        for (prompt, thoughts, text) in
            [("", "a b", "c"), ("<think>", "a b", "c"), ("<think>", "", "c"), ("", "a", ""), ("", "", "c")]
        {
            let begun = Splitter::after(THINK, prompt);
            let (raw, after) = begun.clone().written_out(thoughts, text);
            let mut again = begun;
            let read = again.push(&raw);
            assert_eq!((read.thought.as_str(), read.text.as_str()), (thoughts, text), "{raw:?}");
            assert_eq!(again, after);
        }
    }

    proptest! {
        // CLOUD-1521
        #[test]
        fn it_is_the_same_wherever_the_text_is_cut(
            text in "(<think>)?[ \n]?[a<th ]{0,6}(</think>)?[ \n]{0,2}[a</think>]{0,8}",
            at in 0_usize..40,
            opened in any::<bool>(),
        ) {
            let prompt = if opened { "<think>" } else { "" };
            let at = at.min(text.len());
            let whole = split(prompt, &[&text]);
            prop_assert_eq!(split(prompt, &[&text[..at], &text[at..]]), whole.clone());
            let single: Vec<&str> = text.split_inclusive(|_| true).collect();
            prop_assert_eq!(split(prompt, &single), whole);
        }
    }
}
