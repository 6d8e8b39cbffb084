//! The fields of a line of the text log: `name=value`, each value as its `Debug` shows it, and nothing in them
//! that ends the line or steers a terminal.

use std::fmt::{self, Write};

use tracing::field::{Field, Visit};
use tracing_subscriber::field::{RecordFields, VisitOutput};
use tracing_subscriber::fmt::format::{FormatFields, Writer};

/// Writes fields as the subscriber does by itself, colours too, with the values escaped and errors without their
/// sources. Everything else in a line of text (time, level, names) is our own.
pub(crate) struct OneLine;

impl<'w> FormatFields<'w> for OneLine {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'w>, fields: R) -> fmt::Result {
        let mut line = Fields { writer, is_empty: true, outcome: Ok(()) };
        fields.record(&mut line);
        line.finish()
    }
}

/// Each kind of value has its own way here: with all of them by way of `Debug` a line costs twice as much.
struct Fields<'w> {
    writer: Writer<'w>,
    is_empty: bool,
    outcome: fmt::Result,
}

impl Fields<'_> {
    /// The name before a value; none where the value is the line's message.
    fn name(&mut self, field: &Field) -> fmt::Result {
        if !std::mem::take(&mut self.is_empty) {
            self.writer.write_char(' ')?;
        }
        let name = field.name().strip_prefix("r#").unwrap_or(field.name());
        match (name, self.writer.has_ansi_escapes()) {
            ("message", _) => Ok(()),
            // Italic, and a dim sign.
            (name, true) => write!(self.writer, "\u{1b}[3m{name}\u{1b}[0m\u{1b}[2m=\u{1b}[0m"),
            (name, false) => {
                self.writer.write_str(name)?;
                self.writer.write_char('=')
            }
        }
    }

    fn field(&mut self, field: &Field, value: impl FnOnce(&mut Writer<'_>) -> fmt::Result) {
        // What the `log` crate says of its own lines stands in them already.
        if self.outcome.is_ok() && !field.name().starts_with("log.") {
            self.outcome = self.name(field).and_then(|()| value(&mut self.writer));
        }
    }
}

impl Visit for Fields<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            return self.field(field, |out| Escaping(out).write_str(value));
        }
        self.field(field, |out| {
            if !value.bytes().all(|byte| is_plain(byte) && !matches!(byte, b'"' | b'\\')) {
                return write!(Escaping(out), "{value:?}");
            }
            // As it would be shown, without a look at each character.
            out.write_char('"')?;
            out.write_str(value)?;
            out.write_char('"')
        });
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.field(field, |out| write!(out, "{value}"));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.field(field, |out| write!(out, "{value}"));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.field(field, |out| out.write_str(if value { "true" } else { "false" }));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.field(field, |out| write!(Escaping(out), "{value:?}"));
    }
}

impl VisitOutput<fmt::Result> for Fields<'_> {
    fn finish(self) -> fmt::Result {
        self.outcome
    }
}

/// Passes text on; what [`steers`] finds in it becomes `\n`, `\u{1b}` and the like.
struct Escaping<W>(W);

impl<W: Write> Write for Escaping<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.bytes().all(is_plain) {
            return self.0.write_str(text);
        }
        let mut rest = text;
        while let Some(at) = rest.find(steers) {
            let (clean, from) = rest.split_at(at);
            self.0.write_str(clean)?;
            let mut chars = from.chars();
            for escape in chars.next().into_iter().flat_map(char::escape_default) {
                self.0.write_char(escape)?;
            }
            rest = chars.as_str();
        }
        self.0.write_str(rest)
    }
}

/// Printable ASCII.
fn is_plain(byte: u8) -> bool {
    (b' '..=b'~').contains(&byte)
}

/// Whether a character ends a line, steers a terminal or turns the direction of text: the controls
/// of ASCII and ISO 6429, the separators of lines and paragraphs, and those of UAX #9.
fn steers(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use tracing_subscriber::fmt::format::DefaultFields;

    use super::*;

    /// What is written to it.
    #[derive(Debug, Clone, Default)]
    struct Shown(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Shown {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// What is shown of what is logged meanwhile.
    fn logged(
        fields: impl for<'w> FormatFields<'w> + Send + Sync + 'static,
        colours: bool,
        log: impl FnOnce(),
    ) -> String {
        // Beside a single subscriber, what other threads log first is nobody's from then on.
        let _other = tracing::Dispatch::new(tracing_subscriber::registry());
        let shown = Shown::default();
        let to = shown.clone();
        let builder = tracing_subscriber::fmt().with_writer(move || to.clone()).with_ansi(colours);
        let subscriber = builder.without_time().fmt_fields(fields).finish();
        tracing::subscriber::with_default(subscriber, log);
        let shown = shown.0.lock().clone();
        String::from_utf8(shown).unwrap()
    }

    /// Lines that have values of each kind between them.
    fn all_kinds() {
        let error = std::io::Error::other("no \"room\"");
        tracing::info!(
            text = "plain",
            quoted = "a \"word\" and a \\ and é",
            shown = %"a b",
            debugged = ?Some("x"),
            unsigned = 18_446_744_073_709_551_615_u64,
            signed = -7_i64,
            wide = 1_u128 << 100,
            yes = true,
            no = false,
            part = 0.5,
            absent = None::<u64>,
            r#type = "t",
            error = &error as &dyn std::error::Error,
            log.target = "of the log crate",
            "what {} says",
            "it"
        );
        tracing::info!("nothing but words");
        tracing::info!(only = 1);
    }

    // CLOUD-1141
    #[test]
    fn what_has_nothing_to_hide_stands_there_as_the_subscriber_writes_it() {
        for colours in [false, true] {
            let ours = logged(OneLine, colours, all_kinds);
            assert!(ours.contains(r#"a \"word\" and a \\ and é"#) && ours.lines().count() == 3, "{ours}");
            assert!(!ours.contains("of the log crate"), "{ours}");
            assert_eq!(ours, logged(DefaultFields::new(), colours, all_kinds));
        }
    }

    /// What says its text as it is, however it is asked.
    #[derive(thiserror::Error)]
    #[error("{0}")]
    struct Raw(String);

    impl fmt::Debug for Raw {
        fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
            out.write_str(&self.0)
        }
    }

    // CLOUD-1141
    #[test]
    fn no_kind_of_value_ends_the_line_or_steers_a_terminal() {
        let hidden =
            ['\0', '\n', '\r', '\t', '\x1b', '\x7f', '\u{85}', '\u{9b}', '\u{200e}', '\u{2028}', '\u{202e}'];
        let raw = Raw(format!("a{}\nERROR forged", String::from_iter(hidden)));
        let text = raw.0.as_str();
        for colours in [false, true] {
            let shown = logged(OneLine, colours, || {
                tracing::info!(text, shown = %raw, debugged = ?raw, error = &raw as &dyn std::error::Error, "{raw}");
                tracing::info!(message = text);
            });
            assert_eq!((shown.lines().count(), shown.matches("ERROR forged").count()), (2, 6), "{shown}");
            // Those that are ours.
            let colour = |code: &str| format!("\u{1b}[{code}m");
            let codes = ["0", "2", "3", "32"];
            let bare = codes.iter().fold(shown, |shown, code| shown.replace(&colour(code), ""));
            assert!(!bare.trim_end().replace('\n', "").contains(hidden), "{bare:?}");
            assert_eq!(
                bare.matches(r"\n\r\t\u{1b}\u{7f}\u{85}\u{9b}\u{200e}\u{2028}\u{202e}").count(),
                6,
                "{bare}"
            );
        }
    }
}
