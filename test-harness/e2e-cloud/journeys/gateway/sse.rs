//! Streams of events, however an engine cuts them, breaks them off, or goes on.

use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::iter;
use reqwest::Response;

use super::{CHAT, Script, chat, header, post, scripted, set};
use crate::attacks::resident_mib;

/// Every line end, comments before, between and behind events, and characters of several bytes.
const ODD: &str = ": begun\r\n\r\nevent: message\r\ndata: {\"choices\":[{\"delta\":{\"content\":\"日本\"}}]}\r\n\r\n\
    : a comment, 😀\n\nid: 7\ndata: {\"choices\":[{\"delta\":\ndata: {\"content\":\"é\"}}]}\n\n\
    data:{\"choices\":[{\"delta\":{\"content\":\"[DONE] \\\"\"}}]}\r\r: \r\rdata: [DONE]\r\n\r\n";
/// Before a second piece comes, so that it comes apart.
const PAUSE_MS: u64 = 3;

fn stream() -> Script {
    Script::new(200, "text/event-stream; charset=utf-8")
}

async fn body(response: Response) -> Vec<u8> {
    response.bytes().await.expect("an orderly end").to_vec()
}

// CLOUD-2901
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_cut_in_two_at_any_byte_passes_without_the_change_of_one() {
    let (cluster, engines) = scripted(1, 4).await;
    let bytes = ODD.as_bytes();
    for at in 1..bytes.len() {
        let mut script = stream().piece(&bytes[..at]).piece(&bytes[at..]);
        script.pause_ms = PAUSE_MS;
        set(&engines[0], &script).await;
        let ours = post(&cluster.client, CHAT, chat(9).to_string()).await;
        assert_eq!(
            (ours.status().as_u16(), header(&ours, "content-type")),
            (200, "text/event-stream; charset=utf-8")
        );
        let ours = body(ours).await;
        assert!(ours == bytes, "cut at {at}: {}", String::from_utf8_lossy(&ours));
    }
    // And in single bytes.
    let mut script = stream();
    script.pieces = bytes.iter().map(|byte| (vec![*byte], 1)).collect();
    script.pause_ms = 1;
    set(&engines[0], &script).await;
    assert!(body(post(&cluster.client, CHAT, chat(9).to_string()).await).await == bytes);
    eprintln!("{} cuts", bytes.len() - 1);
}

/// Where each event of [`ODD`] ends, and whether it is more than comments.
fn ends() -> Vec<(usize, bool)> {
    let mut ends = Vec::new();
    let (mut from, mut at) = (0, 0);
    let bytes = ODD.as_bytes();
    while at < bytes.len() {
        let blank =
            ["\r\n\r\n", "\n\n", "\r\r"].into_iter().find(|blank| bytes[at..].starts_with(blank.as_bytes()));
        let Some(blank) = blank else {
            at += 1;
            continue;
        };
        at += blank.len();
        ends.push((at, !bytes[from..at].starts_with(b":")));
        from = at;
    }
    ends
}

// CLOUD-2901
// CLOUD-2846
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_breaks_off_at_any_byte_has_whole_events_and_one_error_and_never_a_silent_end() {
    let (cluster, engines) = scripted(2, 4).await;
    let (bytes, ends) = (ODD.as_bytes(), ends());
    assert_eq!(ends.len(), 7);
    let first = ends.iter().find(|(_, is_event)| *is_event).expect("an event").0;
    let mut before = 0;
    for at in 0..bytes.len() {
        let mut script = stream();
        if at > 0 {
            script = script.piece(&bytes[..at]);
        }
        script.breaks = true;
        // What was sent has gone out by then.
        script.pause_ms = PAUSE_MS;
        for engine in &engines {
            set(engine, &script).await;
        }
        let ours = post(&cluster.client, CHAT, chat(9).to_string()).await;
        let status = ours.status().as_u16();
        let ours = body(ours).await;
        let text = String::from_utf8_lossy(&ours);
        let has_mark = String::from_utf8_lossy(&bytes[..at]).trim_end().ends_with("data: [DONE]");
        if at < first {
            before += 1;
            assert!(status >= 500 && text.contains("\"error\""), "broken off at {at}: {status} {text}");
            continue;
        }
        assert_eq!(status, 200, "broken off at {at}: {text}");
        // The mark without its empty line, behind which a connection broke, may be taken for either.
        if has_mark && text.contains("data: [DONE]") {
            assert!(bytes.starts_with(&ours) && !text.contains("\"error\""), "broken off at {at}: {text}");
            continue;
        }
        // So may an event whose last line end may be a half of one.
        let is_whole = |end: &usize| *end < at || *end == at && !bytes[..at].ends_with(b"\r");
        let least = ends.iter().map(|(end, _)| *end).filter(is_whole).max().expect("an event is whole");
        let passed =
            ends.iter().map(|(end, _)| *end).filter(|end| *end <= at && ours.starts_with(&bytes[..*end]));
        let whole = passed.max().unwrap_or_default();
        assert!(whole >= least, "broken off at {at}: {text}");
        let rest = String::from_utf8_lossy(&ours[whole..]);
        assert!(
            rest.starts_with("data: {\"error\":") && rest.ends_with("}\n\n"),
            "broken off at {at}: {rest}"
        );
        assert_eq!(rest.matches("data:").count(), 1, "broken off at {at}: {rest}");
    }
    eprintln!("{} breaks, {before} of them before the first event", bytes.len());
}

// CLOUD-2902
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_events_and_long_answers_pass_whole() {
    let (cluster, engines) = scripted(1, 4).await;
    let event = |letter: &str| {
        format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{}\"}}}}]}}\n\n", letter.repeat(300_000))
    };
    let script = stream().piece(event("a")).piece(event("é")).piece(event("b")).piece("data: [DONE]\n\n");
    set(&engines[0], &script).await;
    assert!(body(post(&cluster.client, CHAT, chat(9).to_string()).await).await == script.bytes());

    let mut script = Script::new(200, "application/json").piece("{\"data\":\"");
    script.pieces.push((vec![b'x'; 64 * 1024], 20 * 16));
    let script = script.piece("\"}");
    set(&engines[0], &script).await;
    let whole = r#"{"model":"fake-model","input":"x"}"#;
    let ours = post(&cluster.client, "/v1/embeddings", whole).await;
    assert_eq!(ours.status(), 200);
    let (ours, wanted) = (body(ours).await, script.bytes());
    assert_eq!(ours.len(), wanted.len());
    assert!(ours == wanted, "20 MiB");
}

/// Tokens of a long stream.
const TOKENS: usize = 100_000;
const AT_ONCE: usize = 50;
/// What a daemon may take while one passes, MiB.
const MOST_MIB: u64 = 150;

// CLOUD-2902
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_of_a_hundred_thousand_tokens_with_logprobs_passes_in_bounded_memory() {
    let (cluster, engines) = scripted(1, 4).await;
    let alternatives: Vec<String> =
        (0..5).map(|n| format!("{{\"token\":\"t{n}\",\"logprob\":-{n}.25,\"bytes\":[116,48]}}")).collect();
    let token = format!(
        "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"t0\"}},\"logprobs\":{{\"content\":[{{\"token\":\"t0\",\"logprob\":-0.25,\"bytes\":[116,48],\"top_logprobs\":[{}]}}]}},\"finish_reason\":null}}]}}\n\n",
        alternatives.join(",")
    );
    let mut script = stream();
    // As batches of many streams come; a client that is 8 MiB behind would be ended.
    script.pieces.push((token.repeat(AT_ONCE).into_bytes(), TOKENS / AT_ONCE));
    script.pause_ms = 4;
    let script = script.piece("data: [DONE]\n\n");
    // Before it is asked: a client that takes nothing meanwhile is soon 8 MiB behind.
    let wanted = script.bytes();
    set(&engines[0], &script).await;
    let begun = Instant::now();
    let ours =
        cluster.client.request(reqwest::Method::POST, CHAT).json(&chat(9)).send().await.expect("an answer");
    let pids = [cluster.control.as_ref().unwrap().pid(), cluster.nodes[0].daemon.as_ref().unwrap().pid()];
    let (mut pieces, mut most, mut got) = (ours.bytes_stream(), [0; 2], 0_usize);
    while let Some(piece) = pieces.next().await {
        let piece = piece.expect("an orderly end");
        let is_right = wanted.get(got..got + piece.len()) == Some(&piece[..]);
        assert!(
            is_right,
            "at byte {got}: … {}",
            String::from_utf8_lossy(&piece[piece.len().saturating_sub(300)..])
        );
        got += piece.len();
        if got / 1_000_000 != (got - piece.len()) / 1_000_000 {
            for (most, pid) in most.iter_mut().zip(pids) {
                *most = resident_mib(pid).max(*most);
            }
        }
    }
    assert_eq!(got, wanted.len());
    eprintln!("{TOKENS} tokens, {got} bytes in {} ms; resident {most:?} MiB", begun.elapsed().as_millis());
    assert!(most.iter().all(|mib| *mib < MOST_MIB), "{most:?} MiB");
}

// CLOUD-2902
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_pass_beside_each_other_and_none_takes_of_another() {
    let (cluster, engines) = scripted(1, 16).await;
    let mut script = stream();
    script.pieces = vec![(b"data: {\"choices\":[{\"delta\":{\"content\":\"w\"}}]}\n\n".to_vec(), 500)];
    let script = script.piece("data: [DONE]\n\n");
    set(&engines[0], &script).await;
    let wanted = script.bytes();
    let answers =
        iter((0..64).map(|_| post(&cluster.client, CHAT, chat(9).to_string()))).buffer_unordered(16);
    let got: Vec<_> = answers.then(body).collect().await;
    assert!(got.iter().all(|got| *got == wanted) && got.len() == 64);
    tokio::time::timeout(Duration::from_secs(10), super::is_idle(&cluster, &engines, Duration::from_secs(9)))
        .await
        .expect("idle");
}
