//! What a client writes is what an engine reads, and what the engine answers is what the client reads.

use std::fmt::Write;
use std::ops::RangeInclusive;

use fastrand::Rng;
use reqwest::Method;

use super::{CHAT, PATIENCE, Script, header, received, scripted, set};

/// Bodies that are drawn. Source: the seed stands in the test's output.
const BODIES: usize = 500;
const SEED: u64 = 0x11a_2026;
const WHOLE_ROUTES: [&str; 5] = [CHAT, "/v1/completions", "/v1/embeddings", "/v1/rerank", "/v1/messages"];
/// As numbers may be written; some are beyond every type.
const NUMBERS: [&str; 14] = [
    "0",
    "-0",
    "0.1",
    "1e400",
    "-1E+400",
    "1.50",
    "1E-7",
    "12345678901234567890123",
    "0.30000000000000004",
    "-0.0",
    "1e0",
    "9007199254740993",
    "5E-324",
    "100.000",
];
const TEXTS: [&str; 14] = [
    "",
    "plain",
    "h\\u00e9",
    "\\ud83d\\ude00",
    "😀",
    "line\\nbreak\\ttab",
    "\\u0000",
    "\\/slash/",
    "\\\"quoted\\\"",
    "日本語",
    "e\u{301}",
    "\u{202e}right to left",
    "\\\\back",
    "\u{7f}\u{80}",
];
const NAMES: [&str; 8] = ["a", "unknown", "x-y", "", "Model", "mod\\u0065ls", "日本", "metadata"];

/// Writes JSON as odd as JSON may be.
struct Writer {
    rng: Rng,
    out: String,
}

impl Writer {
    fn space(&mut self) {
        for _ in 0..self.rng.usize(0..3) {
            self.out.push_str(["", " ", "\n", "\t", "\r\n", "  "][self.rng.usize(0..6)]);
        }
    }

    fn raw(&mut self, text: &str) {
        self.space();
        self.out.push_str(text);
        self.space();
    }

    fn one_of(&mut self, texts: &[&str]) {
        let n = self.rng.usize(0..texts.len());
        self.raw(texts[n]);
    }

    fn text(&mut self) {
        let mut text = String::from("\"");
        for _ in 0..self.rng.usize(0..4) {
            text.push_str(TEXTS[self.rng.usize(0..TEXTS.len())]);
        }
        if self.rng.usize(0..60) == 0 {
            text.push_str(&"ü long ".repeat(self.rng.usize(1..30_000)));
        }
        text.push('"');
        self.raw(&text);
    }

    fn value(&mut self, depth: usize) {
        match self.rng.usize(0..if depth == 0 { 4 } else { 7 }) {
            0 => self.one_of(&NUMBERS),
            1 => self.one_of(&["true", "false", "null"]),
            2 | 3 => self.text(),
            4 => self.list(depth, 0..=4),
            5 => {
                // Nested as deep as is taken.
                let levels = self.rng.usize(1..100);
                self.raw(&"[".repeat(levels));
                self.raw(&"]".repeat(levels));
            }
            _ => {
                let members = self.rng.usize(0..4);
                self.raw("{");
                for n in 0..members {
                    self.member(n, depth);
                }
                self.raw("}");
            }
        }
    }

    fn list(&mut self, depth: usize, length: RangeInclusive<usize>) {
        self.raw("[");
        for n in 0..self.rng.usize(length) {
            if n > 0 {
                self.raw(",");
            }
            self.value(depth - 1);
        }
        self.raw("]");
    }

    fn member(&mut self, n: usize, depth: usize) {
        if n > 0 {
            self.raw(",");
        }
        let name = NAMES[self.rng.usize(0..NAMES.len())];
        self.raw(&format!("\"{name}\""));
        self.raw(":");
        self.value(depth.saturating_sub(1));
    }

    /// A body that asks for `model`, and where the value of that stands.
    fn body(mut self, model: &str) -> (String, std::ops::Range<usize>) {
        self.space();
        self.out.push('{');
        let (before, behind) = (self.rng.usize(0..4), self.rng.usize(0..4));
        for n in 0..before {
            self.member(n, 4);
        }
        if before > 0 {
            self.raw(",");
        }
        self.one_of(&["\"model\"", "\"mod\\u0065l\"", "\"\\u006dodel\""]);
        self.raw(":");
        self.space();
        let at = self.out.len();
        write!(self.out, "\"{model}\"").expect("a text takes all");
        let place = at..self.out.len();
        self.space();
        // What is read of a body, as clients write it.
        for known in [
            "\"temperature\":0.10",
            "\"max_tokens\": 1e2",
            "\"stop\":[\"\\n\"]",
            "\"user\":\"\\u0041\"",
            "\"n\":1.0",
        ] {
            if self.rng.bool() {
                self.raw(",");
                self.raw(known);
            }
        }
        for n in 1..=behind {
            self.member(n, 4);
        }
        self.out.push('}');
        self.space();
        (self.out, place)
    }
}

/// An answer that is no stream of events.
fn answer(rng: &mut Rng, n: usize) -> Script {
    let script = match n % 7 {
        0 => Script::new(200, "application/json").piece("{ \"a\": 1.50,\n \"a\": 1e400}\r\n"),
        1 => Script::new(200, "application/octet-stream").piece(bytes(rng, 2_000)).piece(bytes(rng, 60)),
        2 => {
            // Nobody on the way unpacks it.
            let mut script = Script::new(200, "application/json").piece(bytes(rng, 300));
            script.headers.push(("content-encoding".into(), b"gzip".to_vec()));
            script
        }
        3 => Script::new([400, 410, 415, 418, 422][rng.usize(0..5)], "application/json")
            .piece(format!("{{\"error\":{{\"message\":\"no, {}\"}} }}", "x".repeat(rng.usize(0..200_000)))),
        4 => Script::new([200, 204, 201][rng.usize(0..3)], "text/plain"),
        5 => Script::new(200, "text/html; charset=latin1").piece("<html>\u{e9}</html>").piece(bytes(rng, 10)),
        _ => Script::new(202, "audio/mpeg").piece(bytes(rng, 100_000)),
    };
    let mut script = script;
    script.headers.push(("x-engine".into(), format!("number {n}").into_bytes()));
    script.headers.push(("set-cookie".into(), b"a=1".to_vec()));
    script.headers.push(("set-cookie".into(), b"b=2".to_vec()));
    script.headers.push(("x-words".into(), "wörter".as_bytes().to_vec()));
    script.headers.push(("keep-alive".into(), b"timeout=5".to_vec()));
    script
}

fn bytes(rng: &mut Rng, most: usize) -> Vec<u8> {
    (0..rng.usize(0..=most)).map(|_| rng.u8(..)).collect()
}

// CLOUD-2900
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_drawn_bodies_and_their_answers_pass_without_the_change_of_a_byte() {
    eprintln!("seed {SEED:#x}");
    let (cluster, engines) = scripted(1, 4).await;
    let engine = &engines[0];
    let mut rng = Rng::with_seed(SEED);
    let mut most = 0;
    for n in 0..BODIES {
        let model = if n % 4 == 3 { "gpt-4o" } else { "fake-model" };
        let (body, place) = Writer { rng: Rng::with_seed(rng.u64(..)), out: String::new() }.body(model);
        let script = answer(&mut rng, n);
        set(engine, &script).await;
        let path = WHOLE_ROUTES[n % WHOLE_ROUTES.len()];
        let query = ["", "?a=b", "?api-version=2024-10-21&x=%20%2f", "?"][rng.usize(0..4)];
        let request = cluster
            .client
            .request(Method::POST, &format!("{path}{query}"))
            .header(
                "content-type",
                ["application/json", "text/plain", "application/json; charset=utf-8"][n % 3],
            )
            .header("openai-organization", format!("org {n}"))
            .header("anthropic-version", "2023-06-01")
            .header("x-title", "wörter")
            .header("cookie", "secret=1")
            .header("x-llorch-priority", "interactive")
            .body(body.clone());
        let ours = request.timeout(PATIENCE).send().await.expect("an answer");
        let what = || format!("body {n} of seed {SEED:#x} to {path}{query}: {}", shown(&body));
        assert_eq!(ours.status().as_u16(), script.status, "{}", what());
        for name in ["x-engine", "content-type", "content-encoding", "set-cookie", "x-words", "keep-alive"] {
            let got: Vec<_> =
                ours.headers().get_all(name).iter().map(|value| value.as_bytes().to_vec()).collect();
            let sent = script.headers.iter().filter(|(of, _)| of == name && name != "keep-alive");
            assert_eq!(got, sent.map(|(_, value)| value.clone()).collect::<Vec<_>>(), "{name} of {}", what());
        }
        assert_eq!(header(&ours, "x-llorch-node"), "gpu-node-1", "{}", what());
        assert!(ours.bytes().await.expect("a body") == script.bytes(), "the answer to {}", what());

        let mut seen = received(engine).await;
        assert_eq!(seen.len(), 1, "{}", what());
        let seen = seen.remove(0);
        let sent_query = query.strip_prefix('?');
        assert_eq!((seen.path.as_str(), seen.query.as_deref()), (path, sent_query), "{}", what());
        let mut wanted = body.clone();
        if model == "gpt-4o" {
            wanted.replace_range(place, "\"fake-model\"");
        }
        assert!(
            seen.body == wanted.as_bytes(),
            "came as {}: {}",
            shown(&String::from_utf8_lossy(&seen.body)),
            what()
        );
        assert_eq!(seen.header("openai-organization"), Some(format!("org {n}")));
        assert_eq!(seen.header("x-title").as_deref(), Some("wörter"), "{}", what());
        assert_eq!((seen.header("cookie"), seen.header("authorization")), (None, None), "{}", what());
        assert!(seen.headers.iter().all(|(name, _)| !name.starts_with("x-llorch-")), "{:?}", seen.headers);
        most = most.max(body.len());
    }
    eprintln!("{BODIES} bodies of at most {most} bytes");
}

fn shown(text: &str) -> String {
    text.chars().take(400).collect()
}
