//! Engines that are loaded as tasks ask, reloaded under load, and changed with their file.

use super::*;

async fn submit_many(
    cluster: &Cluster,
    models: &[&str],
    tokens: u32,
) -> Vec<tokio::task::JoinHandle<e2e_cloud::Transcript>> {
    let mut running = Vec::new();
    for model in models {
        let client = cluster.client.clone();
        let task = json!({"model_ref": model, "prompt": "once upon a time", "max_tokens": tokens});
        running.push(tokio::spawn(async move { client.run(task).await }));
    }
    running
}

async fn all_complete(running: Vec<tokio::task::JoinHandle<e2e_cloud::Transcript>>) {
    for task in running {
        let transcript = task.await.unwrap();
        transcript.check();
        assert!(transcript.completed(), "{:?} {}", transcript.events.last(), transcript.refusal);
    }
}

// CLOUD-2421
// CLOUD-2691
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_tasks_at_once_for_two_models_that_share_a_place_load_each_at_most_twice() {
    for (slots, resident) in [(1, 5), (4, 60)] {
        let more =
            format!("load = \"on_demand\"\nmemory_bytes = 600000000\nmin_resident_secs = {resident}\n");
        let pools: String = ["a", "b"]
            .map(|name| {
                let pool = fake(&format!("pool-{name}"), &format!("model-{name}"), &more);
                pool.replace("slots = 4", &format!("slots = {slots}"))
            })
            .concat();
        let memory = "[memory]\nreserve_bytes = 0\nhost_bytes = 1000000000\n";
        let cluster = node_with(format!("{memory}{pools}")).await;
        for pool in ["pool-a", "pool-b"] {
            wait_state(&cluster, pool, "loadable", MINUTE).await;
        }
        eventually("the node is known", MINUTE, || async { cluster.client.node("gpu-node-1").await }).await;
        let model = |name: &'static str| {
            let client = &cluster.client;
            async move {
                let all = client.get_json("/v2/catalog/availability").await?;
                all["models"].as_array()?.iter().find(|model| model["model_id"] == name).cloned()
            }
        };
        // What is not loaded can be asked for, and has no place yet.
        eventually("its models are loadable", MINUTE, || async {
            let of = model("model-a").await?;
            let is = (&of["state"], &of["nodes"], &of["total_capacity"]);
            (is == (&json!("loadable"), &json!(["gpu-node-1"]), &json!(0))).then_some(())
        })
        .await;
        let start = Instant::now();
        let models: Vec<&str> = (0..10).map(|n| ["model-a", "model-b"][n % 2]).collect();
        all_complete(submit_many(&cluster, &models, 8).await).await;
        let ready = ["model-a", "model-b"].map(model);
        let ready = futures::future::join_all(ready).await;
        assert!(
            ready.iter().flatten().any(|of| of["state"] == "ready" && of["total_capacity"] == slots),
            "{ready:?}"
        );
        let mut unloads = Vec::new();
        for name in ["pool-a", "pool-b"] {
            unloads.push(supervised(&pool(&cluster, name).await.unwrap(), "unloads"));
        }
        println!(
            "10 tasks in turns of two models, {slots} slots, resident {resident} s: {} ms, unloads {unloads:?}",
            start.elapsed().as_millis()
        );
        assert!(unloads.iter().all(|count| *count <= 1), "loaded more than twice: {unloads:?}");
    }
}

// CLOUD-2421
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_models_where_two_fit_are_loaded_as_tasks_ask_and_none_is_lost() {
    let more = "load = \"on_demand\"\nmemory_bytes = 400000000\nmin_resident_secs = 2\n";
    let pools: String = ["a", "b", "c"]
        .map(|name| real_engine::pool(&format!("pool-{name}"), &format!("tiny-{name}"), more))
        .concat();
    let memory = "[memory]\nreserve_bytes = 0\nhost_bytes = 1000000000\n";
    let cluster = node_with(format!("{memory}{pools}")).await;
    for pool in ["pool-a", "pool-b", "pool-c"] {
        wait_state(&cluster, pool, "loadable", MINUTE).await;
    }
    eventually("the node is known", MINUTE, || async { cluster.client.node("gpu-node-1").await }).await;
    let unloads = || async {
        let mut counts = Vec::new();
        for name in ["pool-a", "pool-b", "pool-c"] {
            counts.push(supervised(&pool(&cluster, name).await.unwrap(), "unloads"));
        }
        counts
    };
    // One after the other, in turns: both are loaded once and stay.
    let start = Instant::now();
    for n in 0..40 {
        let model = if n % 2 == 0 { "tiny-a" } else { "tiny-b" };
        assert!(run(&cluster, model, 8).await.completed());
    }
    let alternating = start.elapsed();
    assert_eq!(unloads().await, [0, 0, 0]);
    wait_state(&cluster, "pool-c", "loadable", Duration::from_secs(5)).await;
    // The third makes the least recently used go.
    assert!(run(&cluster, "tiny-c", 8).await.completed());
    assert_eq!(unloads().await, [1, 0, 0]);
    // All three at once, more than there are slots: nobody starves, nothing is lost.
    let start = Instant::now();
    let models: Vec<&str> = (0..60).map(|n| ["tiny-a", "tiny-b", "tiny-c"][n % 3]).collect();
    all_complete(submit_many(&cluster, &models, 200).await).await;
    let burst = start.elapsed();
    let counts = unloads().await;
    let total: u64 = counts.iter().sum();
    assert!(total <= 12, "it thrashes: {counts:?}");
    println!(
        "40 tasks in turns of two models: {} ms, no unload; 60 tasks of three models where two fit: {} ms, unloads {counts:?}",
        alternating.as_millis(),
        burst.as_millis()
    );
}

// CLOUD-2435
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_under_load_fails_no_task_and_a_failing_one_changes_nothing() {
    let pools = real_engine::pool("pool-a", "tiny-a", "aliases = [\"chat\"]\ndrain_timeout_secs = 30\n");
    let other = format!("[models.tiny-b]\nsource = \"{}\"\n", real_engine::tiny_model().display());
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.gguf");
    std::fs::write(&broken, b"GGUF\x03\0\0\0cut off").unwrap();
    let broken_model = format!("[models.broken]\nsource = \"{}\"\n", broken.display());
    let cluster = node_with(format!("{other}{broken_model}{pools}")).await;
    wait_state(&cluster, "pool-a", "ready", MINUTE).await;
    cluster.wait_online(0).await;
    let reload = |model: &'static str| {
        let client = cluster.client.clone();
        async move { client.post("/v2/pools/pool-a/reload", &json!({"new_model_ref": model})).await.status() }
    };
    // Load that goes on until the new model serves.
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut clients = Vec::new();
    for _ in 0..4 {
        let (client, stopped) = (cluster.client.clone(), stopped.clone());
        clients.push(tokio::spawn(async move {
            let mut done = 0;
            while !*stopped.borrow() {
                let task = json!({"model_ref": "chat", "prompt": "once upon a time", "max_tokens": 100});
                let transcript = client.run(task).await;
                transcript.check();
                assert!(transcript.completed(), "{:?} {}", transcript.events.last(), transcript.refusal);
                done += 1;
            }
            done
        }));
    }
    let before = engine_pid(&cluster, "pool-a").await;
    assert_eq!(reload("tiny-b").await, 202);
    let status = eventually("the new model serves", MINUTE, || async {
        pool(&cluster, "pool-a").await.filter(|pool| pool["ready"] == true && pool["models"][0] == "tiny-b")
    })
    .await;
    assert_eq!(status["models"], json!(["tiny-b", "chat"]));
    assert!(run(&cluster, "tiny-b", 8).await.completed());
    let after = std::fs::read_dir(&cluster.nodes[0].runtime_dir).unwrap().flatten();
    let handoffs: Vec<String> =
        after.filter_map(|f| f.file_name().into_string().ok()).filter(|f| f.ends_with(".json")).collect();
    assert_eq!(handoffs, ["pool-a-r0.1.json"], "beside the one that it replaces it has another name");
    eventually("the old engine is gone", Duration::from_secs(40), || async {
        (!Path::new(&format!("/proc/{before}")).exists()).then_some(())
    })
    .await;
    // A model that is not there, and one that cannot be loaded, leave the present one serving.
    let refused = cluster.client.post("/v2/pools/pool-a/reload", &json!({"new_model_ref": "nowhere"})).await;
    assert_eq!(refused.status(), 400);
    let refused: Value = refused.json().await.unwrap();
    assert!(refused["message"].as_str().unwrap().contains("nowhere has no entry"), "{refused}");
    assert_eq!(reload("broken").await, 202);
    let given_up = |error: &Value| error.as_str().is_some_and(|error| error.contains("truncated"));
    let status = eventually("the reload is given up", MINUTE, || async {
        pool(&cluster, "pool-a").await.filter(|pool| given_up(&pool["supervised"]["reload"]["error"]))
    })
    .await;
    assert_eq!((&status["models"][0], &status["ready"]), (&json!("tiny-b"), &json!(true)));
    eventually("the control plane shows why", MINUTE, || async {
        let list = cluster.client.get_json("/v2/pools").await?;
        let pool = list["pools"].as_array()?.iter().find(|pool| pool["pool_id"] == "pool-a")?;
        given_up(&pool["reload"]["error"]).then_some(())
    })
    .await;
    stop.send(true).unwrap();
    let mut done = 0;
    for client in clients {
        done += client.await.unwrap();
    }
    println!("{done} tasks through one reload and two that failed, none with an error");
}

// CLOUD-2445
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_file_is_taken_without_a_restart_and_a_bad_one_says_why_and_changes_nothing() {
    let first = fake("pool-a", "m-a", "");
    let cluster = node_with(first.clone()).await;
    wait_state(&cluster, "pool-a", "ready", MINUTE).await;
    let before = engine_pid(&cluster, "pool-a").await;
    let write = |text: &str| std::fs::write(cluster.pools_file(0), text).unwrap();
    let problem = || async {
        let pools = cluster.node_client(0).get_json("/v2/pools").await?;
        Some(pools["pools_file_problem"].as_str().unwrap_or_default().to_owned())
    };
    write(&format!("{first}slotz = 3\n"));
    let reported = eventually("the mistake is named", Duration::from_secs(5), || async {
        problem().await.filter(|text| text.contains("slotz"))
    })
    .await;
    assert!(reported.contains("line") && reported.contains("column"), "{reported}");
    assert_eq!(engine_pid(&cluster, "pool-a").await, before);
    write(&(first.clone() + &fake("pool-b", "m-b", "")));
    wait_state(&cluster, "pool-b", "ready", MINUTE).await;
    assert_eq!((problem().await.unwrap(), engine_pid(&cluster, "pool-a").await), (String::new(), before));
    write(&fake("pool-b", "m-b", ""));
    eventually("the pool that is not in the file goes", Duration::from_secs(10), || async {
        (pool(&cluster, "pool-a").await.is_none_or(|pool| pool["pool_id"] != "pool-a")).then_some(())
    })
    .await;
    assert_eq!(handoff(&cluster, "pool-a"), None);
}

// CLOUD-2437
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_announces_itself_outlives_a_change_of_its_entry() {
    let entry = |more: &str| {
        format!(
            "[pools.pool-0]\nengine = \"llamacpp\"\nmodel = \"fake-model\"\n{more}provision = {{ mode = \"external\" }}\n"
        )
    };
    let mut cluster = node_with(entry("")).await;
    cluster.options.engine = Engine::steady();
    cluster.start_engine(0);
    cluster.wait_online(0).await;
    let log = || std::fs::read_to_string(cluster.log("gpu-node-1")).unwrap_or_default();
    let taken = |times: usize| {
        let text = log();
        async move { (text.matches("the file of pools is taken").count() == times).then_some(()) }
    };
    // Its engine, which announces itself, may be found before the file is read.
    eventually("the file is taken", MINUTE, || taken(1)).await;
    std::fs::write(cluster.pools_file(0), entry("drain_timeout_secs = 3\n")).unwrap();
    eventually("the change is taken", MINUTE, || taken(2)).await;
    wait_state(&cluster, "pool-0", "ready", Duration::from_secs(10)).await;
    assert!(run(&cluster, "fake-model", 8).await.completed());
}

// CLOUD-2438
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_serves_while_its_handoff_file_cannot_be_written_which_is_done_when_it_can() {
    let cluster = Cluster::without_nodes(Options {
        nodes: 1,
        engine: Engine::None,
        pools: vec![(0, fake("pool-a", "m-a", ""))],
        ..Options::default()
    });
    let in_its_place = cluster.dir.path().join("gpu-node-1/pool-a-r0.json");
    std::fs::create_dir_all(in_its_place.join("something")).unwrap();
    let mut cluster = cluster;
    cluster.start_control();
    cluster.add_node(0);
    let log = || std::fs::read_to_string(cluster.log("gpu-node-1")).unwrap_or_default();
    eventually("it says so", MINUTE, || async { log().contains("is not written").then_some(()) }).await;
    wait_state(&cluster, "pool-a", "ready", Duration::from_secs(15)).await;
    assert!(run(&cluster, "m-a", 8).await.completed());
    std::fs::remove_dir_all(&in_its_place).unwrap();
    eventually("it is written", MINUTE, || async { handoff(&cluster, "pool-a") }).await;
    assert_eq!(log().matches("is not written").count(), 1, "it is said once");
}
