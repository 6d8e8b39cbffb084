//! What a node tells of its GPUs, through the fake management library: the node's own path, and
//! everything that a driver can do to it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use e2e_cloud::process::program;
use e2e_cloud::{Cluster, Engine, Options, eventually};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const GIB: u64 = 1024 * 1024 * 1024;
/// The node looks each five seconds, and waits three for an answer.
const LOOK: Duration = Duration::from_secs(15);

fn library(name: &str) -> PathBuf {
    let path = program("pool-managerd").with_file_name(format!("lib{name}.so"));
    assert!(path.is_file(), "{} is not built: run `cargo build --workspace` first", path.display());
    path
}

struct Gpus {
    cluster: Cluster,
    script: PathBuf,
    _folder: tempfile::TempDir,
}

impl Gpus {
    /// A node with a fake engine of its own and this driver.
    async fn start(lib: &str, script: Value, pools: Option<String>) -> Self {
        let gpus = Self::begin(lib, script, pools);
        gpus.cluster.wait_online(0).await;
        gpus
    }

    /// The same, before anything is ready.
    fn begin(lib: &str, script: Value, pools: Option<String>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("script.json");
        let node = vec![
            (0, "POOL_MANAGERD_NVML_LIB", library(lib).display().to_string()),
            (0, "FAKE_NVML_SCRIPT", path.display().to_string()),
        ];
        let pools = pools.map(|text| (0, text)).into_iter().collect();
        let mut cluster = Cluster::without_nodes(Options {
            nodes: 1,
            engine: Engine::steady(),
            node,
            pools,
            ..Options::default()
        });
        std::fs::write(&path, script.to_string()).unwrap();
        cluster.start_control();
        cluster.add_node(0);
        Self { cluster, script: path, _folder: folder }
    }

    fn set(&self, script: Value) {
        let draft = self.script.with_extension("new");
        std::fs::write(&draft, script.to_string()).unwrap();
        std::fs::rename(&draft, &self.script).unwrap();
    }

    async fn wait(&self, what: &str, test: impl Fn(&Value) -> bool) -> Value {
        eventually(what, LOOK, || async {
            let pools = self.cluster.node_client(0).get_json("/v2/pools").await?;
            Some(pools["gpus"].clone()).filter(&test)
        })
        .await
    }

    async fn serves(&self) {
        let transcript = self.cluster.client.run(self.cluster.task(4)).await;
        transcript.check();
        assert!(transcript.completed());
    }
}

// CLOUD-2470
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_gpus_are_told_with_their_memory_their_errors_and_their_strangers() {
    let stranger = std::process::id();
    let script = json!({"gpus": [{"used": 2 * GIB}, {"name": "Other", "total": 8 * GIB, "used": GIB, "ecc_uncorrected": 0, "mig": true}]});
    let gpus = Gpus::start("fake_nvml", script, None).await;
    let seen = gpus.wait("both are seen", |gpus| gpus.as_array().is_some_and(|all| all.len() == 2)).await;
    assert_eq!(seen[0]["vram_used_bytes"], 2 * GIB);
    assert_eq!((&seen[0]["utilization_pct"], &seen[0]["temperature_c"]), (&json!(37), &json!(61)));
    assert_eq!((&seen[0]["power_mw"], &seen[0]["energy_mj"]), (&json!(123_000), &json!(4_500_000)));
    assert_eq!((&seen[0]["health"], &seen[1]["health"]), (&json!("ok"), &json!("ok")));
    assert_eq!((seen[0].get("ecc_uncorrected"), &seen[1]["ecc_uncorrected"]), (None, &json!(0)));
    let node = gpus.cluster.client.get_json("/v2/nodes/gpu-node-1").await.unwrap();
    let capabilities = &node["capabilities"]["gpus"];
    assert_eq!((&capabilities[1]["name"], &capabilities[1]["uuid"]), (&json!("Other"), &json!("GPU-fake-1")));
    assert_eq!(
        (&capabilities[0]["compute_capability"], &capabilities[1]["mig"]),
        (&json!("8.6"), &json!(true))
    );
    // A stranger takes memory, and a device reports errors; its neighbour is not touched.
    let engine = gpus.cluster.nodes[0].engine.as_ref().unwrap().pid();
    gpus.set(json!({"gpus": [
        {"used": 20 * GIB, "processes": [[stranger, 18 * GIB], [engine, GIB]]},
        {"total": 8 * GIB, "used": GIB, "ecc_uncorrected": 3},
    ]}));
    let seen = gpus.wait("the errors are seen", |gpus| gpus[1]["health"] == "degraded").await;
    assert_eq!(seen[0]["unaccounted_vram_bytes"], 18 * GIB, "our own engine is accounted for");
    assert!(seen[1]["problem"].as_str().unwrap().contains("3 uncorrected ECC errors"));
    assert_eq!(seen[0]["health"], "ok");
    // What a program has done is no fault of its device; what the device has done is, even when it
    // is not told again.
    gpus.set(json!({"gpus": [{"xids": [13, 31]}, {"total": 8 * GIB, "used": GIB, "xids": [43, 79]}]}));
    let is_reported = |gpus: &Value| gpus[1]["problem"].as_str().is_some_and(|text| text.contains("Xid 79"));
    let seen = gpus.wait("the error is seen", is_reported).await;
    assert_eq!((&seen[1]["health"], &seen[0]["health"]), (&json!("degraded"), &json!("ok")), "{seen}");
    gpus.set(json!({"gpus": [{}, {"total": 8 * GIB, "used": 2 * GIB, "xids": [43, 79]}]}));
    let seen = gpus.wait("it was looked at again", |gpus| gpus[1]["vram_used_bytes"] == 2 * GIB).await;
    assert_eq!(seen[1]["health"], "degraded", "it stays so until the driver is reloaded");
}

// CLOUD-2473
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_gpu_a_lost_driver_and_one_that_hangs_stall_nothing_and_come_back() {
    let mut gpus = Gpus::start("fake_nvml", json!({}), None).await;
    gpus.wait("both are well", |gpus| gpus[0]["health"] == "ok" && gpus[1]["health"] == "ok").await;
    gpus.set(json!({"gpus": [{"state": "lost"}, {}]}));
    gpus.wait("one is lost", |gpus| gpus[0]["health"] == "lost" && gpus[1]["health"] == "ok").await;
    gpus.serves().await;
    gpus.set(json!({"driver": "lost"}));
    gpus.wait("all are lost", |gpus| gpus[0]["health"] == "lost" && gpus[1]["health"] == "lost").await;
    gpus.serves().await;
    gpus.set(json!({}));
    gpus.wait("the driver is back", |gpus| gpus[0]["health"] == "ok" && gpus[1]["health"] == "ok").await;
    gpus.set(json!({"driver": "hang"}));
    gpus.wait("it hangs", |gpus| gpus[0]["health"] == "unresponsive" && gpus[1]["health"] == "unresponsive")
        .await;
    gpus.serves().await;
    gpus.set(json!({}));
    gpus.wait("it answers again", |gpus| gpus[0]["health"] == "ok").await;
    gpus.set(json!({"driver": "hang"}));
    gpus.wait("it hangs again", |gpus| gpus[0]["health"] == "unresponsive").await;
    let daemon = gpus.cluster.nodes[0].daemon.as_mut().unwrap();
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait(Duration::from_secs(20)).success(), "it does not wait for the driver");
}

// CLOUD-2475
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_without_symbols_and_one_that_hangs_from_the_start_leave_the_node_working() {
    let gpus = Gpus::start("fake_nvml_bare", json!({}), None).await;
    let seen = gpus.wait("it is seen", |gpus| gpus[0].is_object()).await;
    assert_eq!(seen[0]["health"], "ok", "what is missing is no fault of the device");
    assert!(seen[0]["problem"].as_str().unwrap().contains("does not tell"));
    gpus.serves().await;
    let start = Instant::now();
    let gpus = Gpus::start("fake_nvml", json!({"driver": "hang"}), None).await;
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    gpus.serves().await;
}

// CLOUD-2414
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_error_of_an_engine_counts_when_the_driver_confirms_it() {
    let pools = format!(
        "[pools.pool-0]\nengine = \"llamacpp\"\nmodel = \"fake-model\"\nslots = 4\ndevices = [1]\nmemory_bytes = {}\n\
         [pools.pool-0.provision]\nmode = \"binary\"\nprogram = \"{}\"\n\
         args = [\"--addr\", \"127.0.0.1:{{port}}\", \"--model\", \"{{model}}\"]\n",
        GIB,
        program("fake-engine").display(),
    );
    let gpus = Gpus::start("fake_nvml", json!({}), Some(pools)).await;
    let restarts = || async {
        let pool = gpus.cluster.node_client(0).get_json("/v2/pools/pool-0/status").await?;
        Some(pool["supervised"]["restarts"].as_u64().unwrap_or(0)).filter(|_| pool["ready"] == true)
    };
    let print = || async {
        let mut task = gpus.cluster.task(4);
        task["prompt"] = json!("print-driver-error");
        let transcript = gpus.cluster.client.run(task).await;
        transcript.check();
        assert!(transcript.completed());
    };
    // The driver knows of none, and later of one on the neighbour's GPU.
    print().await;
    gpus.set(json!({"gpus": [{"xids": [79]}, {}]}));
    gpus.wait("the neighbour's error is seen", |gpus| gpus[0]["health"] == "degraded").await;
    print().await;
    gpus.serves().await;
    assert_eq!(restarts().await, Some(0));
    // A line waits 5 s for the driver's word, and no longer.
    tokio::time::sleep(Duration::from_secs(6)).await;
    // An error that a program causes says nothing of the device, and confirms what the engine writes.
    gpus.set(json!({"gpus": [{}, {"used": 2 * GIB, "xids": [31]}]}));
    gpus.wait("the GPU was looked at", |gpus| gpus[1]["vram_used_bytes"] == 2 * GIB).await;
    assert_eq!(restarts().await, Some(0), "the driver's word alone is none of the engine's");
    print().await;
    eventually("the engine is started again", LOOK, || async {
        restarts().await.filter(|restarts| *restarts == 1)
    })
    .await;
    gpus.serves().await;
}

// CLOUD-2471
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_waits_for_memory_that_a_stranger_holds_and_says_so_in_numbers() {
    let pools = format!(
        "[pools.pool-0]\nengine = \"llamacpp\"\nmodel = \"fake-model\"\nslots = 4\ndevices = [1]\nmemory_bytes = {}\n\
         [pools.pool-0.provision]\nmode = \"binary\"\nprogram = \"{}\"\n\
         args = [\"--addr\", \"127.0.0.1:{{port}}\", \"--model\", \"{{model}}\"]\n\
         [pools.pool-1]\nengine = \"llamacpp\"\nmodel = \"other\"\ndevices = [0]\nmemory_bytes = {}\n\
         [pools.pool-1.provision]\nmode = \"binary\"\nprogram = \"{}\"\n\
         args = [\"--addr\", \"127.0.0.1:{{port}}\", \"--model\", \"{{model}}\"]\n",
        10 * GIB,
        program("fake-engine").display(),
        GIB,
        program("fake-engine").display(),
    );
    let gpus = Gpus::start("fake_nvml", json!({"gpus": [{}, {"used": 20 * GIB}]}), Some(pools)).await;
    let status = || async { gpus.cluster.node_client(0).get_json("/v2/pools/pool-0/status").await };
    let waiting = eventually("it waits", LOOK, || async {
        status()
            .await
            .filter(|pool| pool["last_error"].as_str().is_some_and(|text| text.contains("waits for memory")))
    })
    .await;
    let error = waiting["last_error"].as_str().unwrap();
    for part in ["needs 10240 MiB on GPU1", "3584 MiB can be had", "24576 MiB in all", "4096 MiB free"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    gpus.set(json!({"gpus": [{}, {"used": GIB}]}));
    eventually("it starts", LOOK, || async { status().await.filter(|pool| pool["ready"] == true) }).await;
    // Its GPU is lost: it takes nothing more, and starts again when the GPU is back.
    gpus.set(json!({"gpus": [{}, {"state": "lost"}]}));
    let lost = eventually("it is taken out", LOOK, || async {
        status().await.filter(|pool| pool["ready"] == false)
    })
    .await;
    assert!(lost["last_error"].as_str().unwrap().contains("GPU1 is lost"), "{lost}");
    let other = gpus.cluster.node_client(0).get_json("/v2/pools/pool-1/status").await.unwrap();
    assert_eq!(other["ready"], true, "the neighbour's GPU is well");
    gpus.set(json!({"gpus": [{}, {}]}));
    eventually("it is back", Duration::from_secs(30), || async {
        status().await.filter(|pool| pool["ready"] == true)
    })
    .await;
}

/// A pool of the fake engine on these devices.
fn on_devices(devices: &str, memory_bytes: u64) -> String {
    format!(
        "[pools.pool-0]\nengine = \"llamacpp\"\nmodel = \"fake-model\"\nslots = 4\ndevices = [{devices}]\nmemory_bytes = {memory_bytes}\n\
         [pools.pool-0.provision]\nmode = \"binary\"\nprogram = \"{}\"\n\
         args = [\"--addr\", \"127.0.0.1:{{port}}\", \"--model\", \"{{model}}\"]\n",
        program("fake-engine").display(),
    )
}

impl Gpus {
    async fn wait_pool(&self, what: &str, test: impl Fn(&Value) -> bool) -> Value {
        eventually(what, LOOK, || async {
            self.cluster.node_client(0).get_json("/v2/pools/pool-0/status").await.filter(&test)
        })
        .await
    }
}

// CLOUD-2694
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_and_a_gpu_that_come_after_the_daemon_are_seen_and_the_engine_starts() {
    for absent in [json!({"driver": "lost"}), json!({"gpus": []})] {
        let gpus = Gpus::begin("fake_nvml", absent, Some(on_devices("0", GIB)));
        let seen = gpus.wait("the GPU that the file names is lost", |gpus| gpus[0]["health"] == "lost").await;
        assert_eq!((seen.as_array().unwrap().len(), &seen[0]["memory"]), (1, &json!("unknown")));
        let waits = |pool: &Value| {
            pool["last_error"]
                .as_str()
                .is_some_and(|error| error.contains("needs GPU0, and no such GPU is seen"))
        };
        gpus.wait_pool("its engine waits", waits).await;
        gpus.set(json!({}));
        gpus.wait("both are there", |gpus| gpus[0]["health"] == "ok" && gpus[1]["health"] == "ok").await;
        gpus.wait_pool("the engine is ready", |pool| pool["ready"] == true).await;
        let capabilities = || async {
            let node = gpus.cluster.client.get_json("/v2/nodes/gpu-node-1").await?;
            (node["capabilities"]["gpus"][1]["uuid"] == "GPU-fake-1").then_some(())
        };
        eventually("the control plane knows them", LOOK, capabilities).await;
        gpus.cluster.wait_online(0).await;
        gpus.serves().await;
    }
}

// CLOUD-2693
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_is_not_told_is_the_machines_or_unknown_and_no_engine_waits_for_it() {
    for (answer, memory, part) in [
        ("not_supported", "shared", "it has the machine's memory"),
        ("no_permission", "unknown", "the driver does not tell"),
    ] {
        let script = json!({"gpus": [{"memory": answer}]});
        let gpus = Gpus::begin("fake_nvml", script, Some(on_devices("0", GIB / 8)));
        let seen = gpus.wait("it is seen", |gpus| gpus[0]["memory"] == memory).await;
        assert_eq!(seen[0]["health"], "ok", "{seen}");
        assert!(seen[0]["problem"].as_str().unwrap().contains(part), "{seen}");
        assert_eq!(seen[0]["vram_total_bytes"].as_u64().unwrap() > 0, memory == "shared");
        gpus.wait_pool("the engine is ready", |pool| pool["ready"] == true).await;
        gpus.cluster.wait_online(0).await;
        gpus.serves().await;
    }
    let script = json!({"gpus": [{"memory": "not_supported"}]});
    let gpus = Gpus::begin("fake_nvml", script, Some(on_devices("0", 1 << 50)));
    let failed = gpus.wait_pool("it is more than the machine has", |pool| pool["state"] == "failed").await;
    assert!(
        failed["last_error"].as_str().unwrap().contains("GPU0, which has the machine's memory"),
        "{failed}"
    );
}

// CLOUD-2695
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_of_a_gpu_is_a_device_of_its_own_in_environment_books_and_report() {
    let instance =
        |name: &str, total: u64| json!({"uuid": name, "name": "Fake 1g", "total": total, "used": 0});
    let split = |instances: Value| json!({"gpus": [{"mig": true, "memory": "no_permission", "instances": instances}]});
    let both = split(json!([instance("MIG-a-0", 10 * GIB), instance("MIG-b-0", 5 * GIB)]));
    let gpus = Gpus::begin("fake_nvml", both, Some(on_devices("\"MIG-b-0\"", 4 * GIB)));
    let pool = gpus.wait_pool("the engine is ready", |pool| pool["ready"] == true).await;
    assert_eq!(pool["device_mask"], "MIG-b-0");
    let handoff = std::fs::read(gpus.cluster.nodes[0].runtime_dir.join("pool-0-r0.json")).unwrap();
    let handoff: Value = serde_json::from_slice(&handoff).unwrap();
    let environment = std::fs::read(format!("/proc/{}/environ", handoff["pid"])).unwrap();
    let environment = String::from_utf8_lossy(&environment);
    assert!(environment.split('\0').any(|entry| entry == "CUDA_VISIBLE_DEVICES=MIG-b-0"), "{environment}");
    let seen = gpus.wait("all are told", |gpus| gpus.as_array().is_some_and(|all| all.len() == 3)).await;
    let of = |n: usize| (seen[n]["device_id"].clone(), seen[n]["uuid"].clone(), seen[n]["health"].clone());
    assert_eq!(of(0), (json!(0), json!("GPU-fake-0"), json!("ok")), "not told is not lost: {seen}");
    assert_eq!(of(2), (json!(1001), json!("MIG-b-0"), json!("ok")), "{seen}");
    let free = pool["vram_free_bytes"].as_u64().unwrap();
    assert!(free < GIB, "4 GiB of 5 are claimed: {free}");
    gpus.cluster.wait_online(0).await;
    gpus.serves().await;
    // It is taken apart: whoever needs it waits, and the rest goes on.
    gpus.set(split(json!([instance("MIG-a-0", 10 * GIB)])));
    gpus.wait("one is left", |gpus| gpus.as_array().is_some_and(|all| all.len() == 2)).await;
    gpus.set(split(json!([instance("MIG-c-0", 2 * GIB), instance("MIG-b-0", 2 * GIB)])));
    let seen = gpus.wait("there are others", |gpus| gpus.as_array().is_some_and(|all| all.len() == 3)).await;
    assert_eq!(
        (&seen[1]["uuid"], &seen[2]["vram_total_bytes"]),
        (&json!("MIG-c-0"), &json!(2 * GIB)),
        "{seen}"
    );
}
