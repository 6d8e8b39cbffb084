//! Downloads from a server that breaks off where it is told to.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use pool_registry_types::ModelRef;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::models::{ModelError, Models, Staged};

/// How a server behaves, and what it was asked.
#[derive(Debug, Default)]
struct Server {
    content: Vec<u8>,
    etag: String,
    /// Bytes of the file before which each answer in turn breaks off; whole answers after them.
    cuts: VecDeque<usize>,
    no_ranges: bool,
    /// Says no length: the answer ends with its connection.
    no_length: bool,
    /// Where requests for files are sent instead.
    redirect: Option<String>,
    /// Answers with this status and nothing else.
    status: Option<u16>,
    requests: Vec<String>,
    list: String,
    /// What is answered in turn before anything else: a whole reply.
    first: VecDeque<String>,
    /// Contents by the ends of their paths, where they differ from `content`.
    files: Vec<(String, Vec<u8>)>,
}

type Shared = Arc<Mutex<Server>>;

async fn serve(content: Vec<u8>) -> (String, Shared) {
    let server = Server { content, etag: "\"one\"".into(), ..Server::default() };
    let shared = Arc::new(Mutex::new(server));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let own = Arc::clone(&shared);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // A client that goes away is as good.
            let _ = answer(stream, &own).await;
        }
    });
    (url, shared)
}

async fn answer(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    let mut head = Vec::new();
    let mut byte = [0; 1];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).await? == 1 {
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    let field =
        |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(|v| v.trim().to_owned());
    let (reply, body) = {
        let mut server = shared.lock();
        server.requests.push(head.clone());
        if let Some(reply) = server.first.pop_front() {
            (reply, Vec::new())
        } else if head.starts_with("get /api/") {
            let list = server.list.clone().into_bytes();
            (format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", list.len()), list)
        } else if let Some(to) = &server.redirect {
            let reply = format!(
                "HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            );
            (reply, Vec::new())
        } else if let Some(status) = server.status {
            (format!("HTTP/1.1 {status} No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"), Vec::new())
        } else {
            let unchanged = field("if-range:").is_some_and(|tag| tag == server.etag);
            let from = field("range:").filter(|_| unchanged && !server.no_ranges);
            let from =
                from.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
            let path = head.split(' ').nth(1).unwrap_or_default();
            let own = server.files.iter().find(|(end, _)| path.ends_with(end));
            let content = own.map_or(&server.content, |(_, content)| content).clone();
            let all = content.len();
            let start = from.unwrap_or(0);
            let status = match from {
                Some(from) => format!("206 Partial Content\r\ncontent-range: bytes {from}-{}/{all}", all - 1),
                None => "200 OK".to_owned(),
            };
            let end = server.cuts.pop_front().unwrap_or(all).clamp(start, all);
            let length = match server.no_length {
                true => String::new(),
                false => format!("content-length: {}\r\n", all - start),
            };
            let head =
                format!("HTTP/1.1 {status}\r\netag: {}\r\n{length}connection: close\r\n\r\n", server.etag);
            (head, content[start..end].to_vec())
        }
    };
    stream.write_all(reply.as_bytes()).await?;
    stream.write_all(&body).await?;
    stream.shutdown().await
}

fn content(bytes: usize) -> Vec<u8> {
    // Uneven, so that a piece in a wrong place is noticed.
    (0..bytes).map(|n| u8::try_from((n * n / 7 + n) % 251).unwrap()).collect()
}

fn digest(content: &[u8]) -> Digest {
    let hex: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    Digest::new(&format!("sha256:{hex}")).unwrap()
}

struct Bench {
    folder: tempfile::TempDir,
    client: Client,
    endpoint: String,
}

impl Bench {
    fn new(endpoint: &str) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = builder().no_proxy().read_timeout(Duration::from_secs(5)).build().unwrap();
        Self { folder: tempfile::tempdir().unwrap(), client, endpoint: endpoint.to_owned() }
    }

    fn models(&self) -> Models {
        Models::new(self.folder.path().join("models"))
    }

    async fn fetch(&self, source: &str, expected: Option<&Digest>) -> Result<Staged, ModelError> {
        let source = ModelSource::parse(source).unwrap();
        let hub = Hub { endpoint: &self.endpoint, token: Some(&"hub-token".into()) };
        let model = ModelRef::new("m").unwrap();
        self.models().fetch(&model, &source, expected, &self.client, &hub, &mut |_, _| {}).await
    }

    fn leftovers(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path().join("models")).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| !name.ends_with(".lock")).collect()
    }
}

// CLOUD-2463
#[tokio::test]
#[expect(clippy::print_stdout, reason = "what was drawn is shown when the test fails")]
async fn a_download_broken_at_twenty_random_bytes_is_resumed_and_verified() {
    let whole = content(200_000);
    let (url, server) = serve(whole.clone()).await;
    // Other places in every run: a failure shows them.
    let random = |n: u64| std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), n);
    let place = |n| usize::try_from(random(n) % whole.len() as u64).unwrap();
    let mut cuts: Vec<usize> = (0..20).map(place).collect();
    cuts.sort_unstable();
    println!("broken at {cuts:?}");
    server.lock().cuts = cuts.into();
    let bench = Bench::new(&url);
    let staged = bench.fetch(&format!("{url}/a.gguf"), Some(&digest(&whole))).await.unwrap();
    let Staged::Copied { manifest, resumed_at: 0 } = staged else { panic!("{staged:?}") };
    assert_eq!((manifest.bytes, manifest.file.as_str()), (200_000, "a.gguf"));
    let server = server.lock();
    assert_eq!(server.requests.len(), 21);
    let ranged = server.requests.iter().filter(|request| request.contains("\r\nrange: bytes=")).count();
    assert!(ranged >= 19, "{ranged} of 20 went on");
    let (path, _) = bench.models().find(&manifest.model_id).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), whole);
}

// CLOUD-2463
#[tokio::test]
async fn a_download_goes_on_in_the_next_process_and_starts_over_when_the_file_has_changed() {
    let whole = content(50_000);
    for changed in [false, true] {
        let (url, server) = serve(whole.clone()).await;
        let bench = Bench::new(&url);
        let path = bench.folder.path().join("part");
        let remote = Remote {
            url: format!("{url}/a.gguf"),
            file: "a.gguf".into(),
            digest: None,
            bytes: None,
            of_hub: false,
        };
        let hub = Hub { endpoint: &url, token: None };
        // The first process is killed after 20,000 bytes.
        server.lock().cuts = [20_000].into();
        let mut quiet = |_, _| {};
        let first = download(&bench.client, &hub, &remote, &path, free_bytes, &mut quiet);
        let first = tokio::time::timeout(Duration::from_millis(150), first).await;
        assert!(first.is_err(), "it pauses before its second try");
        let next = content(60_000);
        if changed {
            let mut server = server.lock();
            (server.etag, server.content) = ("\"two\"".into(), next.clone());
        }
        let resumed_at =
            download(&bench.client, &hub, &remote, &path, free_bytes, &mut |_, _| {}).await.unwrap();
        assert_eq!(resumed_at, 20_000);
        assert_eq!(std::fs::read(&path).unwrap(), if changed { next } else { whole.clone() });
    }
}

// CLOUD-2463
#[tokio::test]
async fn a_server_without_ranges_is_read_from_the_start() {
    let whole = content(50_000);
    let (url, server) = serve(whole.clone()).await;
    server.lock().no_ranges = true;
    server.lock().cuts = [30_000].into();
    let bench = Bench::new(&url);
    let staged = bench.fetch(&format!("{url}/a.gguf"), None).await.unwrap();
    let Staged::Copied { manifest, .. } = staged else { panic!("{staged:?}") };
    assert_eq!(manifest.digest, digest(&whole));
}

// CLOUD-2464
#[tokio::test]
async fn a_wrong_digest_is_refused_and_leaves_nothing() {
    let (url, _server) = serve(content(1_000)).await;
    let bench = Bench::new(&url);
    let error = bench.fetch(&format!("{url}/a.gguf"), Some(&digest(b"other"))).await.unwrap_err();
    assert!(matches!(&error, ModelError::Digest { .. }), "{error}");
    assert_eq!(bench.leftovers(), [""; 0]);
}

// CLOUD-2464
#[tokio::test]
async fn what_a_server_refuses_is_said_with_its_status() {
    let (url, server) = serve(content(1_000)).await;
    let bench = Bench::new(&url);
    server.lock().status = Some(404);
    let error = bench.fetch(&format!("{url}/a.gguf"), None).await.unwrap_err().to_string();
    assert!(error.contains("HTTP 404, there is no such file"), "{error}");
    assert_eq!(server.lock().requests.len(), 1, "nothing to try again");
}

// CLOUD-2465
#[tokio::test]
async fn a_repository_of_the_hub_is_resolved_with_its_digest_and_its_token() {
    let whole = content(3_000);
    let (url, server) = serve(whole.clone()).await;
    let oid = digest(&whole).as_str().trim_start_matches("sha256:").to_owned();
    let one = format!(
        r#"[{{"path":"README.md","size":5}},{{"path":"q/a.gguf","size":3000,"lfs":{{"oid":"{oid}"}}}}]"#
    );
    server.lock().list = one;
    let bench = Bench::new(&url);
    let staged = bench.fetch("hf:org/repo@v2", None).await.unwrap();
    let Staged::Copied { manifest, .. } = staged else { panic!("{staged:?}") };
    assert_eq!((manifest.file.as_str(), manifest.digest), ("a.gguf", digest(&whole)));
    let asked = server.lock().requests.clone();
    assert!(asked[0].starts_with("get /api/models/org/repo/tree/v2?recursive=true "), "{}", asked[0]);
    assert!(asked[1].starts_with("get /org/repo/resolve/v2/q/a.gguf "), "{}", asked[1]);
    assert!(asked.iter().all(|request| request.contains("authorization: bearer hub-token")));
    // Several files: which one is for a person to say. A wrong content is found by the hub's digest.
    let bench = Bench::new(&url);
    server.lock().list = r#"[{"path":"a.gguf"},{"path":"b.gguf"}]"#.into();
    let error = bench.fetch("hf:org/repo", None).await.unwrap_err().to_string();
    assert!(error.contains("2 models") && error.contains("a.gguf, b.gguf"), "{error}");
    server.lock().list = format!(r#"[{{"path":"a.gguf","lfs":{{"oid":"{}"}}}}]"#, "0".repeat(64));
    assert!(matches!(bench.fetch("hf:org/repo/a.gguf", None).await, Err(ModelError::Digest { .. })));
    assert_eq!(bench.leftovers(), [""; 0]);
}

/// Bytes of all files below a folder.
fn bytes_in(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(about) if about.is_dir() => bytes_in(&entry.path()),
            Ok(about) => about.len(),
            Err(_) => 0,
        })
        .sum()
}

/// A disk on which 12 MiB fit beside what stays free.
fn small_disk(folder: &Path) -> io::Result<u64> {
    // The folder of a model's beginning, or the one around it.
    let models = folder.ancestors().find(|folder| folder.ends_with("models")).unwrap_or(folder);
    Ok((SPARE_BYTES + 12 * 1024 * 1024).saturating_sub(bytes_in(models)))
}

// CLOUD-2753
// CLOUD-2754
#[tokio::test]
async fn a_download_without_a_length_leaves_what_stays_free_and_a_full_disk_is_not_filled_again() {
    let (url, server) = serve(content(20 * 1024 * 1024)).await;
    server.lock().no_length = true;
    let bench = Bench::new(&url);
    let most = Arc::new(Mutex::new(0));
    let small = bench.models().with_free_bytes(small_disk);
    let source = ModelSource::parse(&format!("{url}/a.gguf")).unwrap();
    let hub = Hub { endpoint: &url, token: None };
    let model = ModelRef::new("m").unwrap();
    let mut progress = |done: u64, _: Option<u64>| *most.lock() = done;
    for _ in 0..3 {
        let error = small.fetch(&model, &source, None, &bench.client, &hub, &mut progress).await.unwrap_err();
        assert!(matches!(error, ModelError::Download(DownloadError::NoSpace { .. })), "{error}");
        assert_eq!(bench.leftovers(), [""; 0]);
    }
    let written = *most.lock();
    assert!(written > 4 * 1024 * 1024 && written <= 12 * 1024 * 1024, "{written} bytes");
    assert_eq!(server.lock().requests.len(), 1, "what does not fit is not asked for again");
    // Once there is room it is.
    let staged = bench.fetch(&format!("{url}/a.gguf"), None).await.unwrap();
    assert!(matches!(staged, Staged::Copied { .. }), "{staged:?}");
}

// CLOUD-2755
#[tokio::test]
async fn each_hop_of_a_redirect_is_held_to_the_rule_of_sources() {
    let (target, _served) = serve(content(1_000)).await;
    for (to, refused) in [
        (format!("{target}/a.gguf"), None),
        ("http://192.0.2.7/a.gguf".into(), Some("must be https://")),
        ("https://169.254.169.254/a.gguf".into(), Some("link-local")),
        ("https://name:secret@192.0.2.7/a.gguf".into(), Some("a name or a password")),
    ] {
        // Two hops: the first is a good one.
        let (second, last) = serve(Vec::new()).await;
        last.lock().redirect = Some(to.clone());
        let (first, server) = serve(Vec::new()).await;
        server.lock().redirect = Some(format!("{second}/a.gguf"));
        let fetched = Bench::new(&first).fetch(&format!("{first}/a.gguf"), None).await;
        match refused {
            None => assert!(matches!(fetched, Ok(Staged::Copied { .. })), "{fetched:?}"),
            Some(reason) => {
                let error = fetched.unwrap_err().to_string();
                assert!(error.contains(reason) && !error.contains("secret"), "{to}: {error}");
                assert_eq!(last.lock().requests.len(), 1, "{to} is not tried again");
            }
        }
    }
    let (url, server) = serve(Vec::new()).await;
    server.lock().redirect = Some(format!("{url}/a.gguf"));
    let error = Bench::new(&url).fetch(&format!("{url}/a.gguf"), None).await.unwrap_err().to_string();
    assert!(error.contains("more than 5 redirects"), "{error}");
    assert_eq!(server.lock().requests.len(), 6);
}

/// A GGUF header that says nothing but how many files the model is, and some bytes behind it.
fn part(count: u16, bytes: usize) -> Vec<u8> {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend(0_u64.to_le_bytes());
    out.extend(1_u64.to_le_bytes());
    out.extend(11_u64.to_le_bytes());
    out.extend(b"split.count");
    out.extend(2_u32.to_le_bytes());
    out.extend(count.to_le_bytes());
    out.extend(content(bytes));
    out
}

fn oid(content: &[u8]) -> String {
    digest(content).as_str().trim_start_matches("sha256:").to_owned()
}

// CLOUD-2681
#[tokio::test]
async fn a_model_in_several_files_is_fetched_whole_from_any_of_them_and_goes_on_in_the_middle() {
    let parts: Vec<Vec<u8>> = [30_000, 20_000, 10_000].into_iter().map(|bytes| part(3, bytes)).collect();
    let whole = parts.concat();
    let (url, server) = serve(Vec::new()).await;
    let names: Vec<String> = (1..=3).map(|n| format!("big-0000{n}-of-00003.gguf")).collect();
    let entry = |(name, part): (&String, &Vec<u8>)| {
        format!(r#"{{"path":"q/{name}","size":{},"lfs":{{"oid":"{}"}}}}"#, part.len(), oid(part))
    };
    let entries: Vec<String> = names.iter().zip(&parts).map(entry).collect();
    server.lock().list = format!("[{},{{\"path\":\"q/mmproj-F16.gguf\"}}]", entries.join(","));
    server.lock().files = names.iter().cloned().zip(parts.iter().cloned()).collect();
    for source in [
        "hf:org/repo".to_owned(),
        "hf:org/repo/q/big-00002-of-00003.gguf".into(),
        format!("{url}/q/{}", names[2]),
    ] {
        server.lock().requests.clear();
        // The second file breaks off once.
        server.lock().cuts = [usize::MAX, 9_000].into();
        let bench = Bench::new(&url);
        let staged = bench.fetch(&source, Some(&digest(&whole))).await.unwrap();
        let Staged::Copied { manifest, .. } = staged else { panic!("{staged:?}") };
        assert_eq!((manifest.bytes, manifest.file.as_str()), (whole.len() as u64, names[0].as_str()));
        assert_eq!(
            manifest.parts.iter().map(|part| &part.file).collect::<Vec<_>>(),
            names.iter().collect::<Vec<_>>()
        );
        let files = server.lock().requests.iter().filter(|request| !request.starts_with("get /api/")).count();
        assert_eq!(files, 4, "each once, and the one that broke off again");
        let (path, _) = bench.models().find(&manifest.model_id).unwrap();
        let mut there: Vec<String> = std::fs::read_dir(path.parent().unwrap())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        there.sort();
        assert_eq!(there[..3], names[..], "and {:?}", &there[3..]);
        assert_eq!(there.len(), 4, "and the manifest: {there:?}");
        assert!(bench.models().verify(&manifest.model_id).is_ok());
        assert_eq!(bench.models().list().unwrap(), std::slice::from_ref(&manifest));
        std::fs::write(path.with_file_name(&names[2]), b"cut").unwrap();
        assert_eq!(bench.models().list().unwrap(), [], "one of its files is not whole");
        bench.models().remove(&manifest.model_id).unwrap();
        assert_eq!(bench.leftovers(), [""; 0]);
    }
    // One that is not what the hub says of it.
    server.lock().files[1].1[2_000] ^= 1;
    let bench = Bench::new(&url);
    assert!(matches!(bench.fetch("hf:org/repo", None).await, Err(ModelError::Digest { .. })));
    assert_eq!(bench.leftovers(), [""; 0]);
    // One that says it is a part, and is called otherwise.
    server.lock().content = part(3, 100);
    let error = bench.fetch(&format!("{url}/alone.gguf"), None).await.unwrap_err().to_string();
    assert!(error.contains("split.count") && error.contains("-00001-of-00003.gguf"), "{error}");
}

// CLOUD-2681
#[tokio::test]
async fn a_set_that_was_interrupted_asks_only_for_what_is_missing() {
    let parts = [part(2, 5_000), part(2, 6_000)];
    let (url, server) = serve(Vec::new()).await;
    let names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"];
    server.lock().files = names.iter().map(|name| (*name).to_owned()).zip(parts.clone()).collect();
    // The process is killed within the second file.
    server.lock().cuts = [usize::MAX, 2_000].into();
    let bench = Bench::new(&url);
    let source = format!("{url}/{}", names[0]);
    let first = tokio::time::timeout(Duration::from_millis(150), bench.fetch(&source, None)).await;
    assert!(first.is_err(), "it pauses before its next try");
    let model = ModelRef::new("m").unwrap();
    let all = (parts[0].len() + parts[1].len()) as u64;
    assert_eq!(bench.models().under_way(&model), ((parts[0].len() + 2_000) as u64, Some(all)));
    server.lock().requests.clear();
    let staged = bench.fetch(&source, Some(&digest(&parts.concat()))).await.unwrap();
    assert!(
        matches!(staged, Staged::Copied { resumed_at, .. } if resumed_at == (parts[0].len() + 2_000) as u64)
    );
    let asked = server.lock().requests.clone();
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert!(
        asked[0].contains(&format!("range: bytes={}-", parts[0].len() - 1)),
        "whether it is the same still"
    );
    assert!(asked[1].contains("range: bytes=2000-"), "{asked:?}");
    // The server has others by now: nothing of the old ones stays.
    let bench = Bench::new(&url);
    server.lock().cuts = [usize::MAX, 2_000].into();
    let first = tokio::time::timeout(Duration::from_millis(150), bench.fetch(&source, None)).await;
    assert!(first.is_err(), "it pauses before its next try");
    let newer = [part(2, 5_000), part(2, 6_000)].map(|mut part| {
        part.extend(b"new");
        part
    });
    server.lock().files = names.iter().map(|name| (*name).to_owned()).zip(newer.clone()).collect();
    server.lock().etag = "\"two\"".into();
    let staged = bench.fetch(&source, Some(&digest(&newer.concat()))).await;
    assert!(staged.is_ok(), "{staged:?}");
}

// CLOUD-2682
#[tokio::test]
async fn a_list_comes_in_pages_and_a_hub_that_wants_to_be_left_alone_is() {
    let whole = content(500);
    let (url, server) = serve(whole.clone()).await;
    let page = |more: &str, list: &str| {
        format!("HTTP/1.1 200 OK\r\n{more}content-length: {}\r\nconnection: close\r\n\r\n{list}", list.len())
    };
    let refusal = |status: &str| {
        format!("HTTP/1.1 {status}\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    };
    let next = format!("link: <{url}/api/models/org/repo/tree/main?cursor=a>; rel=\"next\"\r\n");
    let last = format!(r#"[{{"path":"Model.GGUF","size":500,"lfs":{{"oid":"{}"}}}}]"#, oid(&whole));
    server.lock().first = [
        refusal("429 Too Many Requests"),
        page(&next, r#"[{"path":"README.md"}]"#),
        refusal("503 Service Unavailable"),
        page("", &last),
    ]
    .into();
    let bench = Bench::new(&url);
    let began = std::time::Instant::now();
    let staged = bench.fetch("hf:org/repo", None).await.unwrap();
    let Staged::Copied { manifest, .. } = staged else { panic!("{staged:?}") };
    assert_eq!(manifest.file, "Model.GGUF");
    assert!(began.elapsed() >= Duration::from_secs(2), "twice it was asked to wait a second");
    let asked = server.lock().requests.clone();
    assert!(asked[3].contains("cursor=a"), "{}", asked[3]);
    // A page elsewhere would be sent the hub's token: it is not asked, and half a list is none.
    let elsewhere = page("link: <https://192.0.2.9/x>; rel=\"next\"\r\n", &last);
    let other = Bench::new(&url);
    server.lock().first = [elsewhere.clone()].into();
    let error = other.fetch("hf:org/repo", None).await.unwrap_err().to_string();
    assert!(error.contains("goes on at https://192.0.2.9"), "{error}");
    // For a file that is named and found nothing more is asked.
    server.lock().first = [page(&next, &last)].into();
    server.lock().requests.clear();
    assert!(other.fetch("hf:org/repo/Model.GGUF", None).await.is_ok());
    assert_eq!(server.lock().requests.len(), 2, "one page, and the file");
    let headers = |value: &str| HeaderMap::from_iter([(header::RETRY_AFTER, value.parse().unwrap())]);
    assert_eq!(retry_after(&headers("86400")), MAX_WAIT);
    assert_eq!(retry_after(&headers("Wed, 21 Oct 2015 07:28:00 GMT")), Duration::ZERO, "it is past");
    assert_eq!(retry_after(&headers("Mon, 21 Oct 2115 07:28:00 GMT")), MAX_WAIT);
    assert_eq!(retry_after(&headers("soon")), Duration::ZERO);
}

// CLOUD-2685
#[tokio::test]
async fn who_only_reads_takes_no_lock_and_of_two_who_fetch_one_does() {
    let whole = content(40_000);
    let (url, server) = serve(whole.clone()).await;
    let bench = Bench::new(&url);
    let source = format!("{url}/a.gguf");
    let (first, second) = tokio::join!(bench.fetch(&source, None), bench.fetch(&source, None));
    let busy = [&first, &second].into_iter().filter(|of| matches!(of, Err(ModelError::Busy(_)))).count();
    let copied = [&first, &second].into_iter().filter(|of| matches!(of, Ok(Staged::Copied { .. }))).count();
    assert_eq!((busy, copied), (1, 1), "{first:?} {second:?}");
    assert_eq!(server.lock().requests.len(), 1, "one transfer");
    // As on a share that is only read: nothing can be written there, not even a lock.
    let model = ModelRef::new("m").unwrap();
    let lock = bench.folder.path().join("models/.m.lock");
    std::fs::remove_file(&lock).unwrap();
    std::fs::create_dir(&lock).unwrap();
    assert!(matches!(bench.fetch(&source, None).await, Ok(Staged::WasHere(_))));
    assert!(bench.models().verify(&model).is_ok() && bench.models().find(&model).is_some());
}
