//! What an engine needs before its start: named when it is missing, fetched whole or not at all.

use std::sync::{Arc, Mutex};

use super::*;

// CLOUD-2446
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_missing_thing_is_named_with_what_brings_it() {
    let folder = tempfile::tempdir().unwrap();
    let truncated = folder.path().join("truncated.gguf");
    let whole = std::fs::read(real_engine::tiny_model()).unwrap();
    std::fs::write(&truncated, &whole[..200]).unwrap();
    let page = folder.path().join("page.gguf");
    std::fs::write(&page, b"<html>not found</html>").unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let llama = |id: &str, source: &str, more: &str| {
        let entry = real_engine::pool(id, &format!("m-{id}"), more);
        entry.replace(&real_engine::tiny_model().display().to_string(), source)
    };
    let tiny = real_engine::tiny_model().display().to_string();
    let package =
        "[pools.package]\nengine = \"llamacpp\"\nmodel = \"x\"\nprovision = { mode = \"package\" }\n";
    let big = "memory_bytes = 900000000000000\n";
    let pools = [
        package.to_owned(),
        fake("program", "p", "").replace(&program("fake-engine").display().to_string(), "no-such-program"),
        llama("absent", "/no/such/model.gguf", ""),
        llama("truncated", &truncated.display().to_string(), ""),
        llama("page", &page.display().to_string(), ""),
        llama("remote", "https://host.invalid/m.gguf", ""),
        llama("big", &tiny, big),
        fake("taken", "t", &format!("ports = [{port}]\nexit_limit = 3\n")),
        fake("digest", "d", "")
            + &llama("wrong", &tiny, "").replace(
                &format!("source = \"{tiny}\""),
                &format!("source = \"{tiny}\"\ndigest = \"sha256:{}\"", "0".repeat(64)),
            ),
    ];
    let pools = pools.concat();
    let checked = folder.path().join("check.toml");
    std::fs::write(&checked, &pools).unwrap();
    let cluster = node_with(pools).await;
    let expected = [
        ("package", "installs is off"),
        ("program", "no-such-program is not on the PATH"),
        ("absent", "No such file"),
        ("truncated", "truncated"),
        ("page", "not a GGUF file"),
        ("remote", "downloads is off; run: pool-managerd models stage"),
        ("big", "needs 858306884 MiB on host memory"),
        ("taken", "is in use by another program"),
        ("wrong", "expected sha256:0000"),
    ];
    for (id, part) in expected {
        let status = wait_state(&cluster, id, "failed", Duration::from_secs(20)).await;
        let error = status["last_error"].as_str().unwrap_or_default();
        assert!(error.contains(part), "{id}: {error}");
    }
    // The same is said before a daemon has read the file (CLOUD-2957).
    let mut check = std::process::Command::new(program("pool-managerd"));
    check.args(["pools", "check"]).arg(&checked);
    for folder_of in ["MODELS", "PACKAGES"] {
        check.env(format!("POOL_MANAGERD_{folder_of}_DIR"), folder.path().join("nothing"));
    }
    let output = check.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    for (id, part) in expected.iter().filter(|(id, _)| !["big", "taken"].contains(id)) {
        let line = text.lines().find(|line| line.starts_with(&format!("BAD  {id} "))).unwrap_or_default();
        assert!(line.contains(part), "{id}: {text}");
    }
    assert!(text.lines().any(|line| line == "good digest"), "{text}");
    assert_eq!(
        wait_state(&cluster, "digest", "ready", MINUTE).await["ready"],
        true,
        "the others' faults do not touch it"
    );
    // A file that is wrong from the start stops the start.
    let mut command = std::process::Command::new(program("pool-managerd"));
    std::fs::write(folder.path().join("bad.toml"), "[pools.a]\nengine = \"llama\"\n").unwrap();
    command
        .env("LLORCH_API_TOKEN", e2e_cloud::cluster::TOKEN)
        .env("ORCHESTRATORD_REGISTER_ON_STARTUP", "false")
        .env("POOL_MANAGERD_POOLS", folder.path().join("bad.toml"));
    let output = command.output().unwrap();
    let reported = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2));
    assert!(reported.contains("POOL_MANAGERD_POOLS") && reported.contains("line 2"), "{reported}");
}

/// A server that sends bytes without saying how many they will be.
async fn endless() -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/endless.gguf", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = [0; 4096];
            let _ = stream.read(&mut head).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\netag: \"a\"\r\nconnection: close\r\n\r\n").await;
            let piece = vec![7; 1024 * 1024];
            for _ in 0..400 {
                if stream.write_all(&piece).await.is_err() {
                    break;
                }
            }
        }
    });
    url
}

// CLOUD-2466
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_leaves_nothing_half_done() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let big = folder.path().join("big.gguf");
    std::fs::File::create(&big).unwrap().set_len(40 * 1024 * 1024).unwrap();
    let is_root = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap()) == 0;
    // A disk of 90 MiB in a mount namespace of its own, which goes with the process.
    let stage = |source: &str| {
        let script = format!(
            "mount -t tmpfs -o size=90m none '{disk}' || exit 99; '{daemon}' models stage m '{source}' --models-dir '{disk}'; code=$?; find '{disk}' -type f -not -name '.*.lock'; exit $code",
            disk = disk.display(),
            daemon = program("pool-managerd").display(),
        );
        let mut command = tokio::process::Command::new("unshare");
        if !is_root {
            command.arg("--map-root-user");
        }
        command.args(["--mount", "sh", "-c", &script]).kill_on_drop(true);
        async move { command.output().await.unwrap() }
    };
    for source in [big.display().to_string(), endless().await] {
        let reported = "bytes are needed and";
        let output = stage(&source).await;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(reported), "{error}");
        let left = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!left.contains(&disk.display().to_string()), "{left}");
    }
}

// CLOUD-2487
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_installed_from_the_package_index_serves_and_one_started_for_it_embeds() {
    let tiny = real_engine::tiny_model();
    let packaged = format!(
        "[provisioning]\ninstalls = true\n[models.packaged]\nsource = \"{}\"\n[pools.packaged]\nengine = \"llamacpp\"\nmodel = \"packaged\"\nslots = 2\nctx = 512\nprovision = {{ mode = \"package\" }}\n",
        tiny.display()
    );
    let cluster =
        node_with(packaged + &real_engine::pool("embeds", "embeds", "flags = [\"--embeddings\"]\n")).await;
    wait_state(&cluster, "embeds", "ready", MINUTE).await;
    cluster.wait_online(0).await;
    let task = json!({"workload": "embedding", "model_ref": "embeds", "inputs": {"embedding": ["once upon", "a time"]}});
    let embedded = cluster.client.run(task).await;
    embedded.check();
    assert!(embedded.completed(), "{:?} {}", embedded.events.last(), embedded.refusal);
    let lengths: Vec<usize> =
        embedded.results().iter().map(|result| result["embedding"].as_array().unwrap().len()).collect();
    assert!(lengths.len() == 2 && lengths[0] == lengths[1] && lengths[0] > 0, "{lengths:?}");
    assert_ne!(embedded.results()[0]["embedding"], embedded.results()[1]["embedding"]);
    wait_state(&cluster, "packaged", "ready", 3 * MINUTE).await;
    assert!(run(&cluster, "packaged", 8).await.completed());
    let status = pool(&cluster, "packaged").await.unwrap();
    assert_eq!((&status["ctx_max"], &status["replicas"][0]["slots_total"]), (&json!(512), &json!(2)));
    // Purged, its environment and its engine are gone; the model is not the node's to remove.
    let purge = json!({"engine_files": true, "model_files": true});
    assert_eq!(cluster.client.post("/v2/pools/packaged/purge", &purge).await.status(), 202);
    let packages = cluster.dir.path().join("gpu-node-1-packages/llamacpp-pinned");
    eventually("the environment is removed", MINUTE, || async { (!packages.exists()).then_some(()) }).await;
    let purged = wait_state(&cluster, "packaged", "failed", MINUTE).await;
    assert!(purged["last_error"].as_str().unwrap().contains("purged"));
    assert!(tiny.exists());
}

/// A hub with one model in three files, which it sends slowly. What it was asked for is in the list.
async fn hub(folder: &std::path::Path) -> (String, Arc<Mutex<Vec<String>>>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("engine/tiny_gguf.py");
    let mut write = std::process::Command::new(real_engine::python());
    write.arg(script).arg(folder.join("tiny.gguf")).args(["--parts", "3"]);
    assert!(write.status().unwrap().success(), "the parts were not written");
    let names: Vec<String> = (1..=3).map(|n| format!("tiny-{n:05}-of-00003.gguf")).collect();
    let content = |name: &str| std::fs::read(folder.join(name)).unwrap();
    let files: Vec<(String, Vec<u8>)> = names.iter().map(|name| (name.clone(), content(name))).collect();
    let list: Vec<_> =
        files.iter().map(|(name, content)| json!({"path": name, "size": content.len()})).collect();
    let list = serde_json::to_vec(&list).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let own = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (files, list, asked) = (files.clone(), list.clone(), Arc::clone(&own));
            tokio::spawn(async move {
                let mut head = [0; 4096];
                let read = stream.read(&mut head).await.unwrap_or(0);
                let head = String::from_utf8_lossy(&head[..read]).into_owned();
                let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
                asked.lock().unwrap().push(path.clone());
                let body =
                    files.into_iter().find(|(name, _)| path.ends_with(name)).map_or(list, |(_, body)| body);
                let head = format!(
                    "HTTP/1.1 200 OK\r\netag: \"a\"\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    body.len()
                );
                let _ = stream.write_all(head.as_bytes()).await;
                for piece in body.chunks(64 * 1024) {
                    tokio::time::sleep(Duration::from_millis(400)).await;
                    if stream.write_all(piece).await.is_err() {
                        break;
                    }
                }
            });
        }
    });
    (url, asked)
}

// CLOUD-2681
// CLOUD-2685
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_share_a_folder_and_a_model_in_three_files_is_fetched_once_and_served_by_both() {
    let folder = tempfile::tempdir().unwrap();
    let (url, asked) = hub(folder.path()).await;
    let shared = folder.path().join("models").display().to_string();
    let tiny = real_engine::tiny_model().display().to_string();
    let entry = real_engine::pool("parted", "parted", "").replace(&tiny, "hf:org/repo");
    let entry = format!("[provisioning]\ndownloads = true\n{entry}");
    let node = [0, 1]
        .into_iter()
        .flat_map(|n| [(n, "POOL_MANAGERD_MODELS_DIR", shared.clone()), (n, "HF_ENDPOINT", url.clone())]);
    let options = Options {
        nodes: 2,
        engine: Engine::None,
        pools: vec![(0, entry.clone()), (1, entry)],
        node: node.collect(),
        ..Options::default()
    };
    let mut cluster = Cluster::without_nodes(options);
    cluster.start_control();
    cluster.add_node(0);
    cluster.add_node(1);
    let waits = || async {
        for n in [0, 1] {
            let status = cluster.node_client(n).get_json("/v2/pools/parted/status").await;
            let text = status.map(|status| status.to_string()).unwrap_or_default();
            if text.contains("another process downloads parted: ") {
                return Some(text);
            }
        }
        None
    };
    eventually("one node shows the download of the other", MINUTE, waits).await;
    for n in [0, 1] {
        let ready = || async {
            let status = cluster.node_client(n).get_json("/v2/pools/parted/status").await?;
            (status["state"] == "ready").then_some(())
        };
        eventually("its engine is ready", MINUTE, ready).await;
        cluster.wait_online(n).await;
    }
    assert!(run(&cluster, "parted", 8).await.completed());
    let files = asked.lock().unwrap().iter().filter(|path| path.contains("/resolve/")).count();
    assert_eq!(files, 3, "each file was fetched once: {asked:?}");
    let mut list = std::process::Command::new(program("pool-managerd"));
    let listed = list.args(["models", "list", "--models-dir", &shared]).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let length =
        |n: u32| std::fs::metadata(folder.path().join(format!("tiny-{n:05}-of-00003.gguf"))).unwrap().len();
    let bytes: u64 = (1..=3).map(length).sum();
    assert!(listed.starts_with("parted ") && listed.ends_with(&format!(" {bytes} bytes\n")), "{listed}");
}
